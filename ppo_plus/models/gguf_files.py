"""Checks of GGUF files before their weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.utils import cached_file

# Tensors of scaled rotary frequencies (Llama 3.1; Phi-3), which replace the type of scaling in the metadata.
SCALED_FREQUENCIES = ("rope_freqs.weight", "rope_factors_long.weight")


def check_rope_scaling(name: str, config: Any, init_kwargs: Mapping[str, Any]) -> None:
    """Refuse a GGUF file whose rotary positions are scaled if its loaded configuration has no scaling.

    transformers (5.24) reads the base of the rotation alone, see findings/transformers_gguf_loses_rope_scaling.sh.

    Args:
        name: model on the Hub, or a folder.
        config: configuration that the model would be loaded with.
        init_kwargs: arguments of `from_pretrained`; without `gguf_file` nothing is checked.

    Raises:
        ValueError: the model would have unscaled positions.
    """
    file = init_kwargs.get("gguf_file")
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    by_layer_type = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    if not file or any(each.get("rope_type", "default") != "default" for each in by_layer_type):
        return
    if scaling := _rope_scaling(name, file, init_kwargs):
        raise ValueError(
            f"{file!r} of {name!r} has scaled rotary positions ({scaling}), which transformers does not read from GGUF "
            "files, so the model would compute other numbers. Load the model's safetensors files, or pass its "
            "configuration (model_init_kwargs={'config': AutoConfig.from_pretrained(...), 'gguf_file': ...})."
        )


def _rope_scaling(name: str, file: str, init_kwargs: Mapping[str, Any]) -> str | None:
    from gguf import GGUFReader  # only installed where GGUF files are used

    hub = {key: init_kwargs[key] for key in ("revision", "subfolder", "token", "cache_dir") if init_kwargs.get(key)}
    reader = GGUFReader(cached_file(name, file, **hub))
    tensors = {tensor.name for tensor in reader.tensors}
    if factors := [key for key in SCALED_FREQUENCIES if key in tensors]:
        return factors[0]
    fields = (field for key, field in reader.fields.items() if key.endswith(".rope.scaling.type"))
    kinds = (bytes(field.parts[field.data[0]]).decode() for field in fields)
    return next((kind for kind in kinds if kind not in ("none", "")), None)

"""Compare base models by samples of their weights.

An adapter works only on the base that it was trained on. Names do not identify a base: two merged models may be in
`a/merged` and `b/merged`, and one model has a name on the Hub, a snapshot folder and copies. A hash does not either,
because one base exists in fp32, bf16 and 4 bits. So a few numbers of each weight of the first, a middle and the last
layer, of the embeddings and of the last norm are compared, up to the rounding of bf16.
"""

from __future__ import annotations

import base64
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..utils.files import read_json_object, reraise_as_corrupt_file

# Samples by the name of a weight, each `(K,)` bfloat16; K grows with the logarithm of the weight's rows.
WeightSamples = dict[str, Tensor]

PRECISE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IN_LAYER = re.compile(r"[A-Za-z_]+\.(\d+)\..+")
WRAPPERS = {"base_layer", "original_module", "token_adapter"}  # parts that PEFT adds to a weight's name
OTHER_TOWERS = re.compile("vision|visual|audio|image|speech|tower|projector")
HEADS = ("lm_head", "score", "classifier", "embed_out", "v_head")
LATER_EXPERT = re.compile(r"\.experts\.[1-9]\d*\.")  # only the first of each layer is sampled
ALLOWED_SHARE = 0.02  # of samples that may differ, because 4-bit kernels round single numbers differently


def sample_model(model: nn.Module) -> WeightSamples:
    """Sample the weights of a base in memory, without its adapters; 4- and 8-bit weights are dequantized."""
    weights: dict[str, Callable[[], Tensor]] = {}
    adapters = set(getattr(model, "peft_config", {}))
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            if parameter.is_meta or not parameter.dim() or adapters & set(full.split(".")):
                continue
            if parameter.dtype in PRECISE and getattr(parameter, "quant_state", None) is None:
                weights[full] = lambda parameter=parameter: parameter  # type: ignore[misc]
            elif kind := _quantization(parameter, module):
                weights[f"{full}:{kind}"] = lambda module=module: _dequantize(module.weight, module)  # type: ignore[misc]
    return {name: _pick(weights[full]().detach()) for name, full in _choose(weights).items()}


def sample_files(folder: Path | None) -> WeightSamples:
    """Sample the weights in a folder's safetensors files; empty if there are none."""
    samples: WeightSamples = {}
    files = weight_files(folder)
    chosen = {full: name for name, full in _choose(files).items()}
    by_file: dict[Path, list[str]] = defaultdict(list)
    for full in chosen:
        by_file[files[full]].append(full)
    for file, names in by_file.items():
        with reraise_as_corrupt_file(file), safe_open(file, framework="pt") as tensors:
            for full in names:
                part = tensors.get_slice(full)
                if part.get_shape() and part.get_dtype() in ("F64", "F32", "BF16", "F16"):
                    samples[chosen[full]] = _pick_rows(part)
    return samples


def are_different(samples: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool | None:
    """Compare two bases by the weights that both have samples of; None if there are none."""
    names = samples.keys() & others.keys()
    if not names:
        return None
    pairs = [(samples[name], others[name]) for name in names]
    # Resized embeddings have more rows, whose first samples are the same.
    pairs = [(a[: len(b)].double(), b[: len(a)].double()) for a, b in pairs]
    gaps = torch.cat([(a - b).abs() > 2**-7 * torch.maximum(a.abs(), b.abs()) + 1e-7 for a, b in pairs])
    return gaps.double().mean().item() > ALLOWED_SHARE


def encode_samples(samples: WeightSamples) -> dict[str, str]:
    """Write samples as text, for JSON."""
    return {
        name: base64.b64encode(tensor.view(torch.uint8).numpy().tobytes()).decode() for name, tensor in samples.items()
    }


def decode_samples(encoded: Mapping[str, str]) -> WeightSamples:
    """Read what `encode_samples` wrote."""
    return {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.bfloat16)
        for name, text in encoded.items()
    }


def local_folder(name: str | None, revision: str | None = None) -> Path | None:
    """Find the folder of a model on this machine: the folder of that name, or its download from the Hub."""
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    if len(parts := name.split("/")) > 2 or not all(parts):
        return None
    config = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def read_configuration(folder: Path | None) -> dict[str, Any]:
    """Read the configuration of a model's folder; empty if there is none."""
    file = None if folder is None else folder / CONFIG_NAME
    if file is None or not file.is_file():
        return {}
    return read_json_object(file)


def read_weight(folder: Path | None, name: str) -> Tensor:
    """Read one weight of a model from its safetensors files.

    Raises:
        ValueError: no file contains it.
    """
    file = weight_files(folder).get(name)
    if file is None:
        raise ValueError(f"{name} is not in the safetensors files of {folder}: save the model with save_pretrained.")
    with reraise_as_corrupt_file(file), safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _choose(names: Iterable[str]) -> dict[str, str]:
    """Choose weights to sample, by names that models of different wrappers share: `layers.0.mlp.up_proj.weight`."""
    pairs = list(_shared_names(names))
    # Two stacks of layers (HrmText) share names, and files list them in another order than the model: skip both.
    counts = Counter(name for name, _ in pairs)
    shared = {name: full for name, full in pairs if counts[name] == 1}
    numbers = [int(match[1]) for name in shared if (match := IN_LAYER.match(name))]
    last = max(numbers, default=0)
    layers = {0, (last + 1) // 2, last}
    return {
        name: full for name, full in shared.items() if not (match := IN_LAYER.match(name)) or int(match[1]) in layers
    }


def _shared_names(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    for full in names:
        if OTHER_TOWERS.search(full) or LATER_EXPERT.search(full):
            continue
        name = ".".join(part for part in full.split(".") if part not in WRAPPERS)
        if match := IN_LAYER.search(name):
            yield match[0], full
        elif name.split(".")[-2:-1] not in [[head] for head in HEADS]:
            yield ".".join(name.split(".")[-2:]), full


def _quantization(parameter: nn.Parameter, module: nn.Module) -> str | None:
    """Return the bitsandbytes format of a parameter; None for other integers, whose scales are unknown."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        # The CPU's kernel for decoding has another order of the numbers, which bitsandbytes cannot dequantize.
        return None if getattr(state, "packing_format_for_cpu", False) else cast(str, state.quant_type)
    return "int8" if _int8_scales(parameter, module) is not None else None


def _int8_scales(weight: Any, module: Any) -> Tensor | None:
    """Return the scales of 8-bit rows, `(rows,)`, which the first forward pass moves from weight to module."""
    scales = getattr(weight, "SCB", None)
    return scales if scales is not None else getattr(getattr(module, "state", None), "SCB", None)


def _dequantize(weight: Any, module: Any) -> Tensor:
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    scales = cast(Tensor, _int8_scales(weight, module))
    return weight.data.float() * scales.to(weight.device).float()[:, None] / 127


def weight_files(folder: Path | None) -> dict[str, Path]:
    """Return the safetensors file of each weight in a model's folder, by the weight's name; empty without files."""
    if folder is None:
        return {}
    whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file():
        with reraise_as_corrupt_file(whole), safe_open(whole, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), whole)
    if not index.is_file():
        return {}
    weight_map = read_json_object(index)["weight_map"]
    return {name: folder / file for name, file in weight_map.items() if (folder / file).is_file()}


def _places(shape: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """Yield the sampled indices of a weight: rows 0, 1, 2, 4, ... over all leading dimensions, and a column."""
    *leading, columns = shape if len(tuple(shape)) > 1 else (*shape, 1)
    rows, row = int(torch.Size(leading).numel()), 0
    while row < rows:
        yield (*_unravel(row, leading), (31 * row + 7) % columns)
        row = max(1, 2 * row)


def _unravel(index: int, shape: list[int]) -> list[int]:
    indices = []
    for size in reversed(shape):
        index, rest = divmod(index, size)
        indices.append(rest)
    return indices[::-1]


def _pick(weight: Tensor) -> Tensor:
    places = torch.tensor(list(_places(weight.shape)), device=weight.device).T
    weight = weight[:, None] if weight.dim() == 1 else weight
    return weight[tuple(places)].float().bfloat16().cpu()


def _pick_rows(part: Any) -> Tensor:
    shape = part.get_shape()
    rows = [(part[tuple(place[:-1])] if len(shape) > 1 else part[place[0]], place[-1]) for place in _places(shape)]
    return torch.stack([row.float().flatten()[column] for row, column in rows]).bfloat16()

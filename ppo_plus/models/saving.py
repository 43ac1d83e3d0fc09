"""Save and load a policy as transformers and PEFT do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from ..utils.files import reraise_as_corrupt_file
from .adapter_files import adapter_weights
from .adapter_loading import explain_state_dict_mismatch, load_adapter


def save_model(model: PreTrainedModel | PeftModel, directory: Path) -> None:
    """Write a model with its generation config as it is.

    transformers validates the generation config and writes nothing after a mistake in it, such as a `temperature`
    without `do_sample`. The weights are worth more than that, and the base was published with the same mistake.
    """
    config = getattr(model, "generation_config", None)
    if isinstance(model, PeftModel) or not isinstance(config, GenerationConfig):
        with without_generation_parameters(model.config):
            model.save_pretrained(str(directory))
        return
    try:
        model.generation_config = GenerationConfig()
        with without_generation_parameters(model.config):
            model.save_pretrained(str(directory))
    finally:
        model.generation_config = config
    if (file := directory / GENERATION_CONFIG_NAME).is_file():
        config.to_json_file(file, keys_to_pop=["compile_config"])


@contextlib.contextmanager
def without_generation_parameters(config: Any) -> Iterator[None]:
    """Leave out of a model's configuration, inside the block, what scripts set there for `generate`.

    transformers refuses to save a model with them (`model.config.max_length = 50`), after it was trained.
    """
    declared = {field.name for field in fields(config)}
    names = (GenerationConfig().to_dict().keys() & vars(config).keys()) - declared - {"use_cache"}
    names = {name for name in names if not name.endswith("_token_id")}  # which belong to a model as well
    hidden = {name: vars(config).pop(name) for name in names}
    try:
        yield
    finally:
        vars(config).update(hidden)


def load_model(model: PreTrainedModel | PeftModel, directory: Path, adapter: str = "default") -> None:
    """Read weights into a model: those of its adapter where it has one, else all."""
    if isinstance(model, PeftModel):
        load_adapter(model, adapter, adapter_weights(directory), directory, "Use the same base and peft_config.")
        return
    with reraise_as_corrupt_file(directory):
        saved, info = cast(Any, type(model)).from_pretrained(
            str(directory), dtype=model.dtype, output_loading_info=True
        )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(
            f"The model in {directory} does not fit this one: missing {sorted(info['missing_keys'])[:3]}, "
            f"unexpected {sorted(info['unexpected_keys'])[:3]}."
        )
    with explain_state_dict_mismatch(f"The model in {directory}", "Use the same base."):
        model.load_state_dict(saved.state_dict())

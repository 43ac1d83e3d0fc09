"""Save and load an actor-critic: an adapter or model in the format of PEFT or transformers, and the critic."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from ..algo.prefix_reward_baseline import REWARD_LINE, saved_reward_line
from ..utils.contexts import set_attributes
from ..utils.files import reraise_as_corrupt_file
from .adapter_files import adapter_weights
from .adapter_loading import explain_state_dict_mismatch, load_adapter
from .adapters import CRITIC_ADAPTER
from .value_head import VALUE_HEAD_FILE

if TYPE_CHECKING:
    from .actor_critic import ActorCritic

VALUE_MODEL = "value_model"


def save_actor_critic(model: ActorCritic, directory: Path) -> None:
    """Write the adapter (or the whole model) and `value_head.safetensors`.

    A critic's adapter is written to the folder `critic`, its model to `value_model`. The header of the head's file has
    the slope and intercept of a prefix reward baseline, `reward_line`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(model.policy, PeftModel):
        adapters = ["default", CRITIC_ADAPTER] if model.critic == "adapter" else ["default"]
        model.policy.save_pretrained(str(directory), selected_adapters=adapters)
    else:
        save_model(model.policy, directory)
    if model.value_model is not None:
        save_model(model.value_model, directory / VALUE_MODEL)
    head = {name: tensor.contiguous() for name, tensor in model.value_head.state_dict().items()}
    line = {} if model.reward_line is None else {REWARD_LINE: json.dumps(model.reward_line)}
    save_file(head, directory / VALUE_HEAD_FILE, metadata={"format": "pt", **line})


def load_actor_critic(model: ActorCritic, directory: Path) -> None:
    """Load the files of `save_actor_critic` into a model; refuse missing and unexpected tensors."""
    head_file = directory / VALUE_HEAD_FILE
    if not head_file.is_file():
        raise ValueError(f"{directory} has no {VALUE_HEAD_FILE}: ppo_plus did not write it, or saving was interrupted.")
    load_model(model.policy, directory)
    load_critic(model, directory)


def load_critic(model: ActorCritic, directory: Path) -> None:
    """Read the critic alone: its head, its own adapter or model, and the slope and intercept of a reward baseline."""
    head_file = directory / VALUE_HEAD_FILE
    if model.critic == "adapter":
        load_model(model.policy, directory / CRITIC_ADAPTER, CRITIC_ADAPTER)
    if model.value_model is not None:
        load_model(model.value_model, directory / VALUE_MODEL)
    with reraise_as_corrupt_file(head_file):
        head = load_file(head_file)
    with explain_state_dict_mismatch(
        f"The value head in {directory}", "Use the same base, value_head and value_head_activation."
    ):
        model.value_head.load_state_dict(head)
    model.reward_line = saved_reward_line(head_file)


def save_model(model: PreTrainedModel | PeftModel, directory: Path) -> None:
    """Write a model and its generation config without validation.

    transformers refuses to save a model with an invalid generation config, such as a `temperature` without
    `do_sample`, even if the base was published with it; or without any (None). The trained weights must not be lost
    for that.
    """
    config = getattr(model, "generation_config", None)
    if isinstance(model, PeftModel) or not isinstance(config, GenerationConfig | None):
        with without_generation_parameters(model.config):
            model.save_pretrained(str(directory))
        return
    with set_attributes(model, generation_config=GenerationConfig()), without_generation_parameters(model.config):
        model.save_pretrained(str(directory))
    if config is not None and (file := directory / GENERATION_CONFIG_NAME).is_file():
        config.to_json_file(file, keys_to_pop=["compile_config"])


@contextlib.contextmanager
def without_generation_parameters(config: Any) -> Iterator[None]:
    """Context manager: remove parameters of `generate` from a model's configuration.

    transformers refuses to save a model with them (`model.config.max_length = 50`).
    """
    declared = {field.name for field in fields(config)}
    names = (GenerationConfig().to_dict().keys() & vars(config).keys()) - declared - {"use_cache"}
    names = {name for name in names if not name.endswith("_token_id")}  # which a model's configuration has, too
    hidden = {name: vars(config).pop(name) for name in names}
    try:
        yield
    finally:
        vars(config).update(hidden)


def check_same_scaling(model: PeftModel, adapter: str, directory: Path) -> None:
    """Refuse an adapter whose weights would be scaled by another factor than in its training."""
    saved, current = PeftConfig.from_pretrained(str(directory)), model.peft_config[adapter]
    for name in ("lora_alpha", "use_rslora", "alpha_pattern"):
        trained, set_value = getattr(saved, name, None), getattr(current, name, None)
        if trained != set_value:
            field = "critic_peft_config or peft_config" if adapter == CRITIC_ADAPTER else "peft_config"
            raise ValueError(
                f"The adapter in {directory} was trained with {name}={trained}, and here it is {set_value}, so its "
                f"weights would be scaled otherwise. Set {name}={trained} in {field}."
            )


def load_model(model: PreTrainedModel | PeftModel, directory: Path, adapter: str = "default") -> None:
    """Load weights into a model: those of its adapter if it has one, else all."""
    if isinstance(model, PeftModel):
        load_adapter(model, adapter, adapter_weights(directory), directory, "Use the same base and peft_config.")
        check_same_scaling(model, adapter, directory)
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

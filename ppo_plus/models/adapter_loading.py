"""Load the weights of an adapter onto a base model, and refuse those that do not fit it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import TrainableTokensWrapper
from safetensors import safe_open
from torch import Tensor, nn

from ..utils.files import reraise_as_corrupt_file
from .adapter_checks import check_base_weights, check_reward_adapter
from .adapter_files import HEADS, PEFT_PREFIX, adapter_weights, weights_file
from .adapters import is_adapter_parameter, preserve_requires_grad, set_adapter_trainable
from .base_weights import sample_model
from .score_heads import pop_score_head

TO_TEXT_KEYS, TO_MULTIMODAL_KEYS = {r"^model\.language_model\.": "model."}, {r"^model\.": "model.language_model."}


def load_reward_adapter(policy: PeftModel, name: str, directory: Path, *, trained: bool = False) -> nn.Linear:
    """Load the adapter of a reward model onto a base, next to the adapters it has.

    Args:
        policy: the base with its adapters.
        name: what the adapter is called here.
        directory: an adapter of `AutoModelForSequenceClassification` with one label, as `RewardTrainer` saves it, or
            one of a causal language model beside its value head, as LLaMA-Factory saves it.
        trained: whether its weights are trained.

    Returns:
        the score head, a frozen linear layer from H to 1.
    """
    check_reward_adapter(directory, policy.config.get_text_config().hidden_size)
    check_base_weights(directory, sample_model(policy), policy.config._name_or_path)
    weights, config = load_adapter_state_dict(policy, directory), PeftConfig.from_pretrained(str(directory))
    head = pop_score_head(weights, directory)
    extra_modules_to_save = [module for module in config.modules_to_save or [] if module not in HEADS]
    config.modules_to_save, config.inference_mode, config.task_type = (
        extra_modules_to_save or None,
        not trained,
        "CAUSAL_LM",
    )
    with preserve_requires_grad(policy):
        policy.add_adapter(name, config)
        patch_trainable_token_wrappers(policy)
        load_adapter(policy, name, weights, directory, "It was trained on another architecture.")
    set_adapter_trainable(policy, name, trained)
    return head


def patch_trainable_token_wrappers(policy: PeftModel) -> None:
    """Let adapters that train single tokens stand beside others.

    PEFT (0.21) looks for the tokens of every adapter that it saves or loads, and fails where that one trains none.
    """
    for wrapper in policy.modules():
        if isinstance(wrapper, TrainableTokensWrapper):
            for method in ("adapter_state_dict", "adapter_state_dict_load_map"):
                vars(wrapper)[method] = partial(_call_own_tokens, wrapper, method)


def _call_own_tokens(wrapper: Any, method: str, adapter: str, *args: Any) -> dict:
    own = adapter in wrapper.token_adapter.trainable_tokens_delta
    return getattr(type(wrapper), method)(wrapper, adapter, *args) if own else {}


def load_adapter(policy: PeftModel, name: str, weights: dict[str, Tensor], directory: Path, fix: str) -> None:
    """Put weights into an adapter; nothing missing, nothing left over, and nothing into the base below it."""
    check_base_unchanged(policy, name, weights, directory)
    with explain_state_dict_mismatch(f"The adapter in {directory}", fix):
        result = set_peft_model_state_dict(policy, weights, adapter_name=name)
    check_keys_match(policy, name, weights, result.unexpected_keys, directory, fix)


def check_keys_match(
    policy: PeftModel, name: str, weights: dict[str, Tensor], unexpected: Collection[str], directory: Path, fix: str
) -> None:
    """Refuse an adapter that lacks tensors, or has some that found no place."""
    # Of what would be saved: some kinds derive further tensors, which PEFT would name as missing.
    absent = sorted(get_peft_model_state_dict(policy, adapter_name=name).keys() - weights.keys())
    if absent or unexpected:
        raise ValueError(
            f"The adapter in {directory} does not fit this model: missing {absent[:3]}, unexpected "
            f"{sorted(unexpected)[:3]}. {fix}"
        )


def check_base_unchanged(policy: PeftModel, name: str, weights: dict[str, Tensor], directory: Path) -> None:
    """Refuse weights of the base among those of an adapter (PEFT saves embeddings that were resized) unless equal."""
    here = policy.state_dict()
    for key, tensor in weights.items():
        own = None if is_adapter_parameter(key, name) else here.get(key)
        if own is not None and (own.shape != tensor.shape or not torch.equal(own.cpu(), tensor.to(own.dtype).cpu())):
            raise ValueError(
                f"The adapter in {directory} brings other weights than this base has at {key}, and every role shares "
                "the base. Train it on this base, with save_embedding_layer=False where only PEFT saved them."
            )


def load_adapter_state_dict(model: nn.Module, directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter on disk under the names that they have in this model, without those that do nothing.

    An adapter of all linear layers of a multimodal model has some in its tower, which text alone does not train.
    """
    names = adapter_key_mapping(model, directory)
    weights = adapter_weights(directory, names)
    if names != TO_TEXT_KEYS:
        return weights
    modules = {PEFT_PREFIX + name for name in module_names(model)}
    zero_lora_keys = {key.partition(".lora_")[0] for key, b in weights.items() if ".lora_B." in key and not b.any()}
    idle = zero_lora_keys - modules
    return {key: tensor for key, tensor in weights.items() if key.partition(".lora_")[0] not in idle}


def adapter_key_mapping(model: nn.Module, directory: Path) -> dict[str, str] | None:
    """How to rename the tensors of an adapter that was trained on this language model within a multimodal one, or out
    of it; None where names are the same.

    Of Qwen3.5, `AutoModelForCausalLM` makes the language model, `AutoModelForSequenceClassification` the whole.
    """
    whole = "model.language_model" in module_names(model)
    with (
        reraise_as_corrupt_file(weights_file(directory)),
        safe_open(weights_file(directory), framework="pt") as tensors,
    ):
        theirs = any(key.startswith(f"{PEFT_PREFIX}model.language_model.") for key in tensors.keys())  # noqa: SIM118
    return None if whole == theirs else TO_MULTIMODAL_KEYS if whole else TO_TEXT_KEYS


def module_names(model: nn.Module) -> set[str]:
    """As the base calls them, with adapters or without."""
    return {name for name, _ in (model.get_base_model() if isinstance(model, PeftModel) else model).named_modules()}


@contextlib.contextmanager
def explain_state_dict_mismatch(what: str, fix: str) -> Iterator[None]:
    """Say in one sentence that tensors have other names or shapes than the model's."""
    try:
        yield
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise ValueError(f"{what} does not fit this model ({first[:200]}). {fix}") from error

"""Load the weights of an adapter onto a base model, and refuse those that do not fit it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import TrainableTokensWrapper
from safetensors import safe_open
from torch import Tensor, nn

from ..utils.files import reraise_as_corrupt_file
from .adapter_checks import check_base_weights, check_copied_modules, check_reward_adapter
from .adapter_files import HEADS, PEFT_PREFIX, adapter_weights, weights_file
from .adapters import is_adapter_parameter, preserve_requires_grad, set_adapter_trainable
from .base_weights import sample_model
from .score_heads import pop_score_head

TO_TEXT_KEYS, TO_MULTIMODAL_KEYS = {r"^model\.language_model\.": "model."}, {r"^model\.": "model.language_model."}


def load_reward_adapter(policy: PeftModel, name: str, directory: Path, *, trained: bool = False) -> nn.Linear:
    """Load the adapter of a reward model onto a base, next to the adapters it has.

    Args:
        policy: the base with its adapters.
        name: new name of the adapter.
        directory: an adapter of `AutoModelForSequenceClassification` with one label, as `RewardTrainer` saves it, or
            one of a causal language model with a value head in the same folder, as LLaMA-Factory saves it.
        trained: whether its weights are trained.

    Returns:
        the score head, a frozen linear layer from H to 1.
    """
    check_reward_adapter(directory, policy.config.get_text_config().hidden_size)
    check_base_weights(directory, sample_model(policy), policy.config._name_or_path)
    weights, config = load_adapter_state_dict(policy, directory), PeftConfig.from_pretrained(str(directory))
    head = pop_score_head(weights, directory)
    check_finite(directory, {**weights, **head.state_dict(prefix="score.")})
    # PEFT adds both names of heads for a classifier; the router of LongCat's experts has one of them, too.
    extra_modules_to_save = [
        module
        for module in config.modules_to_save or []
        if module not in HEADS or any(f".{module}." in key for key in weights)
    ]
    check_copied_modules(policy, extra_modules_to_save, directory)
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
    """Allow adapters with and without trainable tokens on one base.

    PEFT (0.21) fails when it saves or loads an adapter without trainable tokens if another adapter has some.
    """
    for wrapper in policy.modules():
        if isinstance(wrapper, TrainableTokensWrapper):
            for method in ("adapter_state_dict", "adapter_state_dict_load_map"):
                vars(wrapper)[method] = partial(_call_own_tokens, wrapper, method)


def _call_own_tokens(wrapper: Any, method: str, adapter: str, *args: Any) -> dict:
    has_tokens = adapter in wrapper.token_adapter.trainable_tokens_delta
    return getattr(type(wrapper), method)(wrapper, adapter, *args) if has_tokens else {}


def check_finite(directory: Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse a reward adapter with NaN or infinite weights; the check of the policy's own comes before it is loaded."""
    if damaged := next((key for key, tensor in weights.items() if not tensor.isfinite().all()), None):
        raise ValueError(
            f"The adapter in {directory} has NaN or infinite numbers in {damaged}, and so would all that is computed "
            "with it. Its training diverged, or the file is damaged: use another checkpoint."
        )


def load_adapter(policy: PeftModel, name: str, weights: dict[str, Tensor], directory: Path, fix: str) -> None:
    """Load weights into an adapter; refuse missing and unexpected ones, and changed weights of the base."""
    check_base_unchanged(policy, name, weights, directory)
    if copy_lora_weights(policy, name, weights):
        return
    with explain_state_dict_mismatch(f"The adapter in {directory}", fix):
        result = set_peft_model_state_dict(policy, weights, adapter_name=name)
    check_keys_match(policy, name, weights, result.unexpected_keys, directory, fix)


@torch.no_grad()
def copy_lora_weights(policy: PeftModel, name: str, weights: Mapping[str, Tensor]) -> bool:
    """Copy the tensors of a LoRA adapter whose names are those under which PEFT would save them.

    When PEFT (0.21) loads LoRA, it renames tensors as transformers renames those of the base's published checkpoints,
    although an adapter has the model's names already: it would lose layers of Laguna and Inkling 2 (see
    findings/peft_renames_adapters_like_checkpoints.sh).

    Returns:
        False, without a change, where names or shapes differ or the adapter is not LoRA.
    """
    if policy.peft_config[name].peft_type != PeftType.LORA:
        return False
    saved = get_peft_model_state_dict(policy, adapter_name=name, save_embedding_layers=False)
    shapes, shapes_on_disk = ({key: t.shape for key, t in tensors.items()} for tensors in (saved, weights))
    if not shapes.items() <= shapes_on_disk.items() or weights.keys() - shapes - policy.state_dict().keys():
        return False
    for key, tensor in saved.items():
        tensor.copy_(weights[key])
    return True


def check_keys_match(
    policy: PeftModel, name: str, weights: dict[str, Tensor], unexpected: Collection[str], directory: Path, fix: str
) -> None:
    """Refuse an adapter with missing or unexpected tensors."""
    # Compared to the tensors that PEFT saves, because some kinds derive further ones; it would also save embeddings of
    # a base that was resized, which are not the adapter's.
    saved = get_peft_model_state_dict(policy, adapter_name=name, save_embedding_layers=False)
    absent = sorted(saved.keys() - weights.keys())
    if absent or unexpected:
        raise ValueError(
            f"The adapter in {directory} does not fit this model: missing {absent[:3]}, unexpected "
            f"{sorted(unexpected)[:3]}. {fix}"
        )


def check_base_unchanged(policy: PeftModel, name: str, weights: dict[str, Tensor], directory: Path) -> None:
    """Refuse weights of the base in an adapter's file (PEFT saves resized embeddings) unless they are equal."""
    state = policy.state_dict()
    for key, tensor in weights.items():
        base = None if is_adapter_parameter(key, name) else state.get(key)
        if base is not None and not (
            base.shape == tensor.shape and torch.equal(base.cpu(), tensor.to(base.dtype).cpu())
        ):
            raise ValueError(
                f"The adapter in {directory} has other weights than this base for {key}, and every role shares the "
                "base. Train it on this base, or save it with save_embedding_layer=False if PEFT added them."
            )


def load_adapter_state_dict(model: nn.Module, directory: Path) -> dict[str, Tensor]:
    """Load the tensors of an adapter on disk by their names in this model, without untrained ones of other towers.

    An adapter of all linear layers of a multimodal model has some in its vision tower, which text does not train.
    """
    names = adapter_key_mapping(model, directory)
    weights = adapter_weights(directory, names)
    if names != TO_TEXT_KEYS:
        return weights
    modules = {PEFT_PREFIX + name for name in module_names(model)}
    zero_lora_keys = {key.partition(".lora_")[0] for key, b in weights.items() if ".lora_B." in key and not b.any()}
    untrained = zero_lora_keys - modules
    return {key: tensor for key, tensor in weights.items() if key.partition(".lora_")[0] not in untrained}


def adapter_key_mapping(model: nn.Module, directory: Path) -> dict[str, str] | None:
    """Map an adapter's tensor names between a language model and the multimodal model around it; None if equal.

    For Qwen3.5, `AutoModelForCausalLM` loads the first, `AutoModelForSequenceClassification` the second.
    """
    is_multimodal = "model.language_model" in module_names(model)
    with (
        reraise_as_corrupt_file(weights_file(directory)),
        safe_open(weights_file(directory), framework="pt") as tensors,
    ):
        prefix = f"{PEFT_PREFIX}model.language_model."
        was_multimodal = any(key.startswith(prefix) for key in tensors.keys())  # noqa: SIM118
    return None if is_multimodal == was_multimodal else TO_MULTIMODAL_KEYS if is_multimodal else TO_TEXT_KEYS


def module_names(model: nn.Module) -> set[str]:
    """Return the names of a model's modules without PEFT's prefix."""
    return {name for name, _ in (model.get_base_model() if isinstance(model, PeftModel) else model).named_modules()}


@contextlib.contextmanager
def explain_state_dict_mismatch(what: str, fix: str) -> Iterator[None]:
    """Shorten torch's error about names or shapes of tensors to one sentence, and add the fix."""
    try:
        yield
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise ValueError(f"{what} does not fit this model ({first[:200]}). {fix}") from error

"""Refuse adapters that would change the base model or that do not fit it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .adapter_files import base_samples, resolve_adapter_path, trained_on, weights_file
from .adapters import is_adapter_parameter
from .base_weights import WeightSamples, are_different
from .score_heads import find_other_heads, score_head_shapes

BASE_PRESERVING_INITS = ("gaussian", "eva", "orthogonal", "mica")  # values of init_lora_weights
UNSUPPORTED_OPTIONS = {
    "kasa_config": "which removes the smallest singular values from the base's weights",
    "layer_replication": "which makes the base a deeper model",
    "alora_invocation_tokens": "which works only in PeftModel's own forward",
}


def check_no_adapter(model: Any, fix: str) -> None:
    """Refuse an adapter's name, and a model that transformers loaded with an adapter: PEFT would replace it.

    `fix` is a sentence with the value to pass instead.
    """
    if resolve_adapter_path(model) is not None:
        reason = f"model={str(model)!r} is an adapter"
    elif getattr(model, "_hf_peft_config_loaded", False):
        reason = "transformers has loaded a frozen adapter into model"
    else:
        return
    raise ValueError(f"{reason}, and a new adapter would silently replace it. {fix}")


def check_base_is_frozen(policy: PeftModel) -> None:
    """Refuse trainable weights of the base: it is also reference and reward model."""
    adapters = policy.peft_config
    trained = [
        name
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad and not any(is_adapter_parameter(name, adapter) for adapter in adapters)
    ]
    if trained:
        raise ValueError(
            f"{len(trained)} weights of the adapter's base would be trained, the first is {trained[0]}. The base is "
            "also the reference and the base of reward adapters: freeze it (requires_grad_(False)), or name its "
            "modules in LoraConfig(modules_to_save=...), which trains copies."
        )


def check_preserves_base(config: PeftConfig | None, label: str) -> None:
    """Refuse an adapter that changes the base that other roles share, or that works only in PEFT's own forward."""
    if not isinstance(config, PeftConfig | None):
        raise TypeError(
            f"{label} must be a PeftConfig; got {type(config).__name__}. Pass LoraConfig(...), or for a dict "
            "LoraConfig(**options)."
        )
    if isinstance(saved := getattr(config, "modules_to_save", None), str):
        raise ValueError(f"{label} has modules_to_save={saved!r}, which must be a list: write [{saved!r}].")
    init, bias = getattr(config, "init_lora_weights", True), getattr(config, "bias", "none")
    shared = "Actor, reference, critic and reward adapters share that base"
    if isinstance(init, str) and init.lower() not in BASE_PRESERVING_INITS:
        raise ValueError(
            f"{label} has init_lora_weights={init!r}, which may change the base's weights. {shared}: use the default "
            f"or one of {', '.join(BASE_PRESERVING_INITS)}; save a trained adapter of that kind as plain LoRA "
            "(path_initial_model_for_weight_conversion)."
        )
    if bias != "none":
        raise ValueError(
            f"{label} has bias={bias!r}, which trains biases of the base. {shared}, and they would stay changed with "
            "the adapter off: use bias='none'."
        )
    for option, reason in UNSUPPORTED_OPTIONS.items():
        if getattr(config, option, None) is not None:
            raise ValueError(f"{label} has {option}, {reason}. {shared}: leave the option out.")


def check_reward_adapter(directory: Path, hidden_size: int) -> None:
    """Refuse an adapter that is no reward model of this base; reads only its configuration and a file header."""
    file = weights_file(directory)
    check_preserves_base(PeftConfig.from_pretrained(str(directory)), f"The adapter in {directory}")
    shapes = score_head_shapes(directory, file)
    if shapes not in ({"weight": (1, hidden_size)}, {"weight": (1, hidden_size), "bias": (1,)}):
        other = find_other_heads(file)
        raise ValueError(
            f"{directory} is not a reward adapter for this base: its score head has shape {[*shapes.values()]}, "
            f"expected one of (1, {hidden_size})"
            + (f"; it has {other[0]}, which is no head 'score' on the last token's hidden state" if other else "")
            + ". Train it on the same base, with num_labels=1 and modules_to_save=['score']. A causal adapter is a "
            "reward model if value_head.safetensors in its folder has v_head.summary.weight."
        )


def check_copied_modules(policy: PeftModel, modules: list[str], directory: Path) -> None:
    """Refuse an adapter that trains whole copies of modules to which another adapter of the model adds LoRA."""
    names = (name for name, module in policy.named_modules() if isinstance(module, BaseTunerLayer))
    adapted = sorted({name.rpartition(".")[2] for name in names} & set(modules))
    if adapted:
        raise ValueError(
            f"The adapter in {directory} trains whole copies of {adapted} (modules_to_save), and the actor's adapter "
            f"adds LoRA to them, which PEFT cannot combine. Set exclude_modules={adapted} in peft_config."
        )


def warn_of_skipped_layers(model: Any, peft_config: PeftConfig | None) -> None:
    """Warn of linear layers that `target_modules` of a new adapter names and PEFT leaves out.

    In families whose experts were modules before transformers 5, PEFT (0.21) takes such names for parts of the routed
    experts (see findings/peft_targets_of_a_shared_expert_are_routed_ones.sh).
    """
    targets = getattr(peft_config, "target_modules", None)
    if not targets:
        return
    base: Any = model.get_base_model()
    added = {*(getattr(model.peft_config["default"], "target_parameters", None) or ())}
    if not added - {*(getattr(peft_config, "target_parameters", None) or ())}:
        return
    if targets == "all-linear":
        pattern = ".*"
    elif isinstance(targets, str):
        pattern = targets
    else:
        pattern = rf"(.*\.)?({'|'.join(map(re.escape, targets))})"
    head = base.get_output_embeddings()
    skipped = [
        name for name, module in base.named_modules()
        if type(module) is nn.Linear and module is not head and re.fullmatch(pattern, name)
        and not re.search(r"\.base_layer$|\.lora_|\.modules_to_save\.|\.original_module$", name)
    ]  # fmt: skip
    if skipped and not getattr(peft_config, "exclude_modules", None):
        warnings.warn(
            f"target_modules names {len(skipped)} linear layers of {type(base).__name__} that get no adapter (the "
            f"first is {skipped[0]}): PEFT takes their names for parts of the routed experts, which it adapts instead.",
            stacklevel=3,
        )


def check_trained_tokens(directory: Path, num_embeddings: int) -> None:
    """Refuse an adapter that trains the embedding of a token that its base does not have."""
    indices = getattr(PeftConfig.from_pretrained(str(directory)), "trainable_token_indices", None) or []
    by_module = indices.values() if isinstance(indices, dict) else [indices]
    largest = max((index for tokens in by_module for index in tokens), default=-1)
    if largest >= num_embeddings:
        raise ValueError(
            f"The adapter in {directory} trains the embedding of token {largest}, but the actor's base has "
            f"embeddings for {num_embeddings} tokens: tokens were added to the base before the adapter was trained. "
            "Save that base with its tokens (resize_token_embeddings, save_pretrained), and train reward model and "
            "actor on it."
        )


def check_base_weights(directory: Path, samples: WeightSamples, base: str) -> bool:
    """Refuse a reward adapter that was trained on a base with different weights.

    Args:
        directory: folder of the adapter.
        samples: weight samples of the actor's base; empty if they are unknown.
        base: name of the actor's base.

    Returns:
        True if both bases are known to be the same, False if their weights could not be compared.
    """
    different = are_different(base_samples(directory), samples)
    if different:
        raise ValueError(
            f"The reward adapter in {directory} was trained on {trained_on(directory)!r}, and the actor's base is "
            f"{base!r}, which has different weights: its scores would be meaningless. Train one on the actor's base."
        )
    return different is not None

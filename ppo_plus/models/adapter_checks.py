"""Refuse adapters that would change the base model or that do not fit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

from .adapter_files import base_samples, resolve_adapter_path, trained_on, weights_file
from .adapters import is_adapter_parameter
from .base_weights import WeightSamples, are_different
from .score_heads import find_other_heads, score_head_shapes

BASE_PRESERVING_INITS = ("gaussian", "eva", "orthogonal", "mica")  # of the ways to start LoRA that have names


UNSUPPORTED_OPTIONS = {
    "kasa_config": "which cuts the smallest singular values out of the base's own weights",
    "layer_replication": "which makes another, deeper model of the base",
    "alora_invocation_tokens": "so it speaks only after these tokens, which PeftModel's own forward alone looks for",
}


def check_no_adapter(model: Any, fix: str) -> None:
    """Refuse the name of an adapter, and a model into which transformers has put one: PEFT would put another over it.

    Args:
        model: a name or a model.
        fix: what to pass instead, a sentence.

    Raises:
        ValueError: there is an adapter, and nothing of it would be left in the model that is trained.
    """
    if resolve_adapter_path(model) is not None:
        what = f"model={str(model)!r} is an adapter, and a new one would take its place"
    elif getattr(model, "_hf_peft_config_loaded", False):
        what = "transformers has put an adapter into this model, frozen, and a new one would take its place"
    else:
        return
    raise ValueError(f"{what}: what it has learned would be lost without a word. {fix}")


def check_base_is_frozen(policy: PeftModel) -> None:
    """Refuse to train weights of the base beside those of adapters: the base is reference and reward model as well."""
    adapters = policy.peft_config
    trained = [
        name
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad and not any(is_adapter_parameter(name, adapter) for adapter in adapters)
    ]
    if trained:
        raise ValueError(
            f"Weights of the adapter's base would be trained, {len(trained)} of them, the first {trained[0]}. The base "
            "is the reference, and what reward adapters were trained on: freeze it (requires_grad_(False)), or name "
            "its modules in LoraConfig(modules_to_save=...), which trains copies."
        )


def check_preserves_base(config: PeftConfig | None, whose: str) -> None:
    """Refuse an adapter that changes its base, which then is not that of the other roles, or that would not speak."""
    if not isinstance(config, PeftConfig | None):
        raise TypeError(
            f"{whose} must be a PeftConfig; got {type(config).__name__}. Pass LoraConfig(...), of a dict "
            "LoraConfig(**options)."
        )
    if isinstance(saved := getattr(config, "modules_to_save", None), str):
        raise ValueError(f"{whose} has modules_to_save={saved!r}, which must be a list: write [{saved!r}].")
    init, bias = getattr(config, "init_lora_weights", True), getattr(config, "bias", "none")
    shared = "Actor, reference, critic and reward adapters share that base"
    if isinstance(init, str) and init.lower() not in BASE_PRESERVING_INITS:
        raise ValueError(
            f"{whose} has init_lora_weights={init!r}, which is not known to leave the base's weights as they are, as "
            f"the default and {', '.join(BASE_PRESERVING_INITS)} do. {shared}: choose one of these; save a trained "
            f"adapter of that kind as plain LoRA (path_initial_model_for_weight_conversion)."
        )
    if bias != "none":
        raise ValueError(
            f"{whose} has bias={bias!r}, which trains biases of the base itself. {shared}, and an adapter that is "
            "switched off would leave them changed: use bias='none'."
        )
    for option, reason in UNSUPPORTED_OPTIONS.items():
        if getattr(config, option, None) is not None:
            raise ValueError(f"{whose} has {option}, {reason}. {shared}: leave the option out.")


def check_reward_adapter(directory: Path, hidden_size: int) -> None:
    """Refuse an adapter that is no reward model of this base; reads no more than its configuration and a header."""
    file = weights_file(directory)
    check_preserves_base(PeftConfig.from_pretrained(str(directory)), f"The adapter in {directory}")
    shapes = score_head_shapes(directory, file)
    if shapes not in ({"weight": (1, hidden_size)}, {"weight": (1, hidden_size), "bias": (1,)}):
        other = find_other_heads(file)
        raise ValueError(
            f"{directory} is not a reward adapter for this base: its score head has shape {[*shapes.values()]}, "
            f"expected one of (1, {hidden_size})"
            + (f"; it has {other[0]}, which is no head 'score' on the last token's hidden state" if other else "")
            + ". Train it on the same base, with num_labels=1 and modules_to_save=['score']; a causal adapter is a "
            "reward model where v_head.summary.weight lies beside it, in value_head.safetensors."
        )


def check_trained_tokens(directory: Path, num_embeddings: int) -> None:
    """Refuse an adapter that trains the embedding of a token that its base does not have."""
    indices = getattr(PeftConfig.from_pretrained(str(directory)), "trainable_token_indices", None) or []
    by_module = indices.values() if isinstance(indices, dict) else [indices]
    largest = max((index for tokens in by_module for index in tokens), default=-1)
    if largest >= num_embeddings:
        raise ValueError(
            f"The adapter in {directory} trains the embedding of token {largest}, but the actor's base has "
            f"embeddings for {num_embeddings} tokens: tokens were added to the base before it was trained. Save that "
            "base with its tokens (resize_token_embeddings, save_pretrained), and train reward model and actor on it."
        )


def check_base_weights(directory: Path, samples: WeightSamples, base: str) -> bool:
    """Refuse a reward adapter that was trained on a base of other weights.

    Args:
        directory: of the adapter.
        samples: of the weights of the actor's base; empty where they are not known yet.
        base: name of the actor's base.

    Returns:
        whether both bases are known, so that they are the same; False where weights tell nothing.
    """
    different = are_different(base_samples(directory), samples)
    if different:
        raise ValueError(
            f"The reward adapter in {directory} was trained on {trained_on(directory)!r}, the actor's base is "
            f"{base!r}, whose weights are others: its numbers mean nothing there. Train one on the actor's base."
        )
    return different is not None

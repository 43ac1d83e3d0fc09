"""Construction of the rewards of a run from functions, models, names and adapter folders."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..models.actor_critic import ROLES, ActorCritic
from ..models.adapter_files import load_reward_metadata, resolve_adapter_path
from ..models.adapters import CRITIC_ADAPTER, REFERENCE_ADAPTER
from ..models.backbone import move_if_movable
from ..models.classifier import load_classifier, load_reward_tokenizer
from ..models.weight_checks import check_model_weights
from .adapters import AdapterReward
from .classifiers import ClassifierReward
from .completions import Reward
from .functions import REWARD_ARGUMENTS, FunctionReward
from .reward_set import RewardSet


def build_rewards(
    reward_funcs: Any,
    tokenizers: Any,
    model: ActorCritic,
    tokenizer: PreTrainedTokenizerBase,
    *,
    weights: Sequence[float] | None,
    batch_size: int,
    chat_template_kwargs: dict[str, Any],
    on_error: str = "raise",
    timeout: float | None = None,
    pessimism: float | None = None,
) -> RewardSet:
    """Build the rewards of a run from functions, models, names, adapter folders, or a list of these."""
    funcs, reward_tokenizers = normalize_rewards(reward_funcs, tokenizers)
    options: dict[str, Any] = {"batch_size": batch_size, "chat_template_kwargs": chat_template_kwargs}
    rewards: list[Reward] = []
    for func, reward_tokenizer in zip(funcs, reward_tokenizers, strict=True):
        taken = ["default", REFERENCE_ADAPTER, CRITIC_ADAPTER, *ROLES, *(r.name for r in rewards)]
        if resolve_adapter_path(func) is not None:
            # An adapter's name identifies its parameters, so it must not be a part of other parameter names.
            taken += {part for weight, _ in model.policy.named_parameters() for part in weight.split(".")}
        name = unique_name(reward_name(func), taken)
        rewards.append(_build_reward(func, reward_tokenizer, name, model, tokenizer, options, timeout))
    return RewardSet(rewards, weights, on_error, pessimism)


def _build_reward(
    func: Any,
    reward_tokenizer: Any,
    name: str,
    model: ActorCritic,
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
    timeout: float | None,
) -> Reward:
    adapter, reward = resolve_adapter_path(func), func
    if adapter is not None:
        return AdapterReward(adapter, model, tokenizer, name, **options)
    if isinstance(func, str | Path):
        reward_tokenizer = reward_tokenizer or load_reward_tokenizer(func)
        func, missing = load_classifier(str(func), dtype="auto")
        if missing:
            raise ValueError(
                f"{str(reward)!r} is not a trained reward model: its files lack {', '.join(missing[:3])}, which would "
                "be initialized at random. Pass a reward model saved by RewardTrainer, or a classifier with one label."
            )
    if isinstance(func, nn.Module):
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        if func is reward and not trained.isdisjoint(map(id, func.parameters())):
            raise ValueError(
                f"The reward model {name!r} shares trainable weights with the policy or its critic: scoring would "
                "freeze these weights, and training would change the scores. Load the reward model separately, or pass "
                "its name."
            )
        check_model_weights(func, f"The reward model {name!r}")
        move_if_movable(func, model.device)
        source = reward if func is not reward else getattr(getattr(func, "config", None), "_name_or_path", "")
        expects_single_text = bool(source and load_reward_metadata(source))
        reward_tokenizer = reward_tokenizer or load_reward_tokenizer(func) or tokenizer
        options = {**options, "expects_single_text": expects_single_text, "use_kernels": model.use_kernels}
        return ClassifierReward(func, reward_tokenizer, name, **options)
    return FunctionReward(func, name, timeout)


def normalize_rewards(reward_funcs: Any, tokenizers: Any) -> tuple[list, list]:
    """Return reward functions and their tokenizers as two lists of equal length."""
    funcs = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    reward_tokenizers = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(funcs)
    if not funcs or any(f is None for f in funcs):
        raise ValueError("PPOTrainer needs reward_funcs: a function, a reward model, an adapter folder, or a list.")
    if len(reward_tokenizers) != len(funcs):
        raise ValueError(
            f"reward_processing_classes has {len(reward_tokenizers)} entries for {len(funcs)} reward functions; pass "
            "one for each, None for a function."
        )
    for func in funcs:
        if not callable(func) and not isinstance(func, str | Path):
            raise TypeError(f"A reward must be a function, a model, or a name; got {func!r}.")
    return funcs, reward_tokenizers


def check_signature(function: Callable, columns: Sequence[str], dataset: str = "train_dataset") -> None:
    """Refuse a reward function that cannot be called with these columns of a dataset."""
    name, taken = reward_name(function), [c for c in columns if c in REWARD_ARGUMENTS]
    if taken:
        raise ValueError(
            f"{dataset} has a column {taken[0]!r}, which is the name of a standard argument of reward functions. "
            f"Rename it: dataset.rename_column({taken[0]!r}, '...')."
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables written in C have none
        return
    try:
        signature.bind(**dict.fromkeys([*REWARD_ARGUMENTS, *columns]))
    except TypeError as error:
        raise ValueError(
            f"The reward function {name!r} cannot be called: {error}. It receives {', '.join(REWARD_ARGUMENTS)} and "
            f"the other columns of {dataset}, {list(columns)}; end its signature with **kwargs."
        ) from error


def reward_name(func: Any) -> str:
    """Return the name of a reward in metrics: the function's name, or the last part of the model's name."""
    if isinstance(func, nn.Module):
        func = getattr(getattr(func, "config", None), "_name_or_path", "") or type(func).__name__
    if isinstance(func, str | Path):
        return Path(func).name
    return getattr(func, "__name__", type(func).__name__)


def unique_name(name: str, taken: Sequence[str]) -> str:
    """Make a name unique with a number, and free of dots, since PEFT uses it as a module name."""
    name = name.replace(".", "_")
    numbered = (f"{name}_{i}" for i in range(2, 1000))
    return name if name not in taken else next(n for n in numbered if n not in taken)

"""From what the user passed to the rewards of a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..models.actor_critic import CRITIC_ADAPTER, REFERENCE_ADAPTER, ActorCritic
from ..models.adapter_files import load_reward_metadata, resolve_adapter_path
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
) -> RewardSet:
    """Turn what the user passed (functions, models, names, adapter folders, lists of these) into rewards."""
    funcs, own = normalize_rewards(reward_funcs, tokenizers)
    options: dict[str, Any] = {"batch_size": batch_size, "chat_template_kwargs": chat_template_kwargs}
    rewards: list[Reward] = []
    for func, its_tokenizer in zip(funcs, own, strict=True):
        taken = ["default", REFERENCE_ADAPTER, CRITIC_ADAPTER, *(r.name for r in rewards)]
        if resolve_adapter_path(func) is not None:
            # An adapter's weights are told from others by its name among the parts of theirs.
            taken += {part for weight, _ in model.policy.named_parameters() for part in weight.split(".")}
        name = unique_name(reward_name(func), taken)
        rewards.append(_build_reward(func, its_tokenizer, name, model, tokenizer, options, timeout))
    return RewardSet(rewards, weights, on_error)


def _build_reward(
    func: Any,
    own: Any,
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
        own = own or load_reward_tokenizer(func)
        func, missing = load_classifier(str(func), dtype="auto")
        if missing:
            raise ValueError(
                f"{str(reward)!r} is no trained reward model: its files lack {', '.join(missing[:3])}, which would be "
                "drawn at random, and so would rewards. Pass what RewardTrainer wrote, or a classifier with one label."
            )
    if isinstance(func, nn.Module):
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        if func is reward and not trained.isdisjoint(map(id, func.parameters())):
            raise ValueError(
                f"The reward model {name!r} shares weights with the policy or its critic, which train them: it would "
                "freeze them, and change with them. Load it a second time, or pass its name."
            )
        check_model_weights(func, f"The reward model {name!r}")
        move_if_movable(func, model.device)
        source = reward if func is not reward else getattr(getattr(func, "config", None), "_name_or_path", "")
        trained_here = bool(source and load_reward_metadata(source))
        own = own or load_reward_tokenizer(func) or tokenizer
        return ClassifierReward(func, own, name, expects_single_text=trained_here, **options)
    return FunctionReward(func, name, timeout)


def normalize_rewards(reward_funcs: Any, tokenizers: Any) -> tuple[list, list]:
    """Reward functions and their tokenizers, as two lists of the same length."""
    funcs = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    own = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(funcs)
    if not funcs or any(f is None for f in funcs):
        raise ValueError("PPOTrainer needs reward_funcs: a function, a reward model, an adapter folder, or a list.")
    if len(own) != len(funcs):
        raise ValueError(
            f"reward_processing_classes has {len(own)} entries for {len(funcs)} reward functions; give one each, None "
            "for a function."
        )
    for func in funcs:
        if not callable(func) and not isinstance(func, str | Path):
            raise TypeError(f"A reward function is a function, a model, or a name; got {func!r}.")
    return funcs, own


def check_signature(function: Callable, columns: Sequence[str], dataset: str = "train_dataset") -> None:
    """Refuse a reward function that could not be called with these columns of a dataset."""
    name, taken = reward_name(function), [c for c in columns if c in REWARD_ARGUMENTS]
    if taken:
        raise ValueError(
            f"{dataset} has a column {taken[0]!r}, but reward functions get something else by that name: use "
            f"dataset.rename_column({taken[0]!r}, '...')."
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables written in C have none
        return
    try:
        signature.bind(**dict.fromkeys([*REWARD_ARGUMENTS, *columns]))
    except TypeError as error:
        raise ValueError(
            f"The reward function {name!r} cannot be called: {error}. It gets {', '.join(REWARD_ARGUMENTS)} and the "
            f"further columns that {dataset} has, {list(columns)}; end its signature in **kwargs."
        ) from error


def reward_name(func: Any) -> str:
    """What metrics call a reward: the function's name, or the last part of the model's."""
    if isinstance(func, nn.Module):
        func = getattr(getattr(func, "config", None), "_name_or_path", "") or type(func).__name__
    if isinstance(func, str | Path):
        return Path(func).name
    return getattr(func, "__name__", type(func).__name__)


def unique_name(name: str, taken: Sequence[str]) -> str:
    """The name, numbered if it is taken (and never a dotted one: PEFT uses it as the name of a module)."""
    name = name.replace(".", "_")
    numbered = (f"{name}_{i}" for i in range(2, 1000))
    return name if name not in taken else next(n for n in numbered if n not in taken)

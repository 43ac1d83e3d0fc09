"""What can be known to fail before any weight is loaded, said in one sentence with the fix."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, IterableDataset

from .config import PPOConfig


def model_name(model: Any) -> str:
    """Where a model came from."""
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    if not name:
        raise ValueError("This model does not say where it came from: pass its tokenizer as processing_class.")
    return name


def named_datasets(eval_dataset: Any) -> dict[str, Dataset]:
    """One evaluation dataset under its argument's name, several under their own."""
    if eval_dataset is None:
        return {}
    return dict(eval_dataset) if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}


def check_arguments(args: Any, train_dataset: Any, reward_funcs: Any, reward_model: Any) -> None:
    """Refuse what can be known to fail before any weight is loaded."""
    if not isinstance(args, PPOConfig):
        raise TypeError(f"args must be a ppo_plus.PPOConfig; got {type(args).__name__}.")
    if (reward_funcs is None) == (reward_model is None):
        both = "both" if reward_funcs is not None else "neither"
        raise ValueError(f"Pass reward_funcs or its other name reward_model; got {both}.")
    if isinstance(train_dataset, IterableDataset):
        raise ValueError(
            "train_dataset is a stream; PPO needs its length: pass Dataset.from_list(list(stream.take(n)))."
        )
    if not isinstance(train_dataset, Dataset):
        raise ValueError(f"train_dataset must be a datasets.Dataset of prompts; got {type(train_dataset).__name__}.")


def check_enough_prompts(args: PPOConfig, num_prompts: int) -> None:
    """A rollout needs as many prompts as it has responses."""
    needed = args.rollout_batch_size * args.world_size
    if num_prompts < needed:
        raise ValueError(
            f"train_dataset has {num_prompts} prompts, but one rollout takes {needed} (per_device_train_batch_size "
            f"{args.per_device_train_batch_size} x gradient_accumulation_steps {args.gradient_accumulation_steps} x "
            f"num_mini_batches {args.num_mini_batches} x processes {args.world_size}). Add prompts, or lower one."
        )

"""Base class of PPO callbacks: `TrainerCallback` with the events of a rollout.

A callback with state inherits `ExportableState`, so its state is saved in every checkpoint. Trainer rebuilds such
callbacks when it resumes: constructor arguments must be JSON values, and no code may keep a reference to an instance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..config import PPOConfig

if TYPE_CHECKING:
    from ..rollout.buffer import Rollout
    from ..rollout.experience import Experience


@dataclass
class RolloutSettings:
    """Settings of a rollout that callbacks may change before it begins.

    Attributes:
        kl_coef: coefficient of the KL penalty, reward units per nat; `PPOConfig.kl_coef` unless a callback sets it.
    """

    kl_coef: float


class PPOCallback(TrainerCallback):
    """A `TrainerCallback` with the events of a rollout; override the events you need.

    All events also receive `model`, `processing_class` and further keyword arguments: end the signature with
    `**kwargs`.
    """

    def check_arguments(self, args: PPOConfig) -> None:
        """Raise a ValueError if the callback cannot work with these arguments; called before weights are loaded."""

    def on_rollout_begin(
        self, args: PPOConfig, state: TrainerState, control: TrainerControl, settings: RolloutSettings, **kwargs: Any
    ) -> None:
        """Handle the begin of a rollout, before generation; `settings` may be changed."""

    def on_rollout_progress(
        self, args: PPOConfig, state: TrainerState, control: TrainerControl, phase: str, done: int, total: int,
        tokens: int, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Handle progress of generation and scoring, in rollouts and evaluations; called at every decoded token.

        `phase` is "generating", "scoring", "frozen_layers" (if `cache_frozen_layers` applies), "logprobs" or
        "reference"; `done` of `total` responses have completed it, and the model has processed `tokens` tokens in it.
        """

    def on_rewards_computed(
        self, args: PPOConfig, state: TrainerState, control: TrainerControl, scores: Tensor, gathered_scores: Tensor,
        token_rewards: Tensor, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Handle the scores `(N,)`, reward units, which may be changed in place.

        `gathered_scores` holds the scores of all processes after the previous callback's changes. A callback that is
        installed on some processes only receives them after the last preceding callback installed on all processes.

        NaN marks a response that no reward function scored. A score is the total reward of a response, including the
        rewards of single tokens in `token_rewards`, `(N, R)`, which may be changed in place too.
        """

    def on_rollout_end(
        self, args: PPOConfig, state: TrainerState, control: TrainerControl, rollout: Rollout, samples: Experience,
        metrics: dict[str, float], **kwargs: Any,
    ) -> None:  # fmt: skip
        """Handle the end of a rollout, after advantages; `metrics` (of all processes) is logged and may be extended."""


def hears_scores(callback: PPOCallback) -> bool:
    """Return whether a callback overrides `on_rewards_computed`."""
    return getattr(callback.on_rewards_computed, "__func__", None) is not PPOCallback.on_rewards_computed


def is_logging_rollout(args: PPOConfig, state: TrainerState, num_logs: int) -> bool:
    """Return whether this step's rollout is the first, or one of `num_logs` spread evenly over training."""
    rollouts, index = -(-state.max_steps // args.steps_per_rollout), state.global_step // args.steps_per_rollout
    logs_before, logs_now = ((i * num_logs) // max(1, rollouts) for i in (index - 1, index))
    return index == 0 or logs_now > logs_before

"""Callbacks: rollout events beside Trainer's own, and what listens to them. They look and steer; they never train.

A callback that keeps a state exports it (`ExportableState`), so it is in every checkpoint. Trainer rebuilds such
callbacks when it resumes: constructor arguments must be JSON, and nobody may hold on to an instance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..config import PPOConfig

if TYPE_CHECKING:
    from ..rollout.buffer import Rollout
    from ..rollout.collector import Experience


@dataclass
class RolloutSettings:
    """What a callback may set before a rollout.

    Attributes:
        kl_coef: coefficient of the KL penalty, reward units per nat; `PPOConfig.kl_coef` unless a callback sets it.
    """

    kl_coef: float


class PPOCallback(TrainerCallback):
    """A `TrainerCallback` with the events of a rollout; override what you need.

    All events also get `model`, `processing_class` and further keyword arguments: end the signature in `**kwargs`.
    """

    def check_arguments(self, args: PPOConfig) -> None:
        """Raise a ValueError where the callback cannot work with these arguments; called before weights are loaded."""

    def on_rollout_begin(
        self, args: PPOConfig, state: TrainerState, control: TrainerControl, settings: RolloutSettings, **kwargs: Any
    ) -> None:
        """Before prompts are answered; `settings` may be changed."""

    def on_rollout_progress(
        self, args: PPOConfig, state: TrainerState, control: TrainerControl, phase: str, done: int, total: int,
        tokens: int, **kwargs: Any,
    ) -> None:  # fmt: skip
        """While prompts are answered and answers looked at, in evaluations too; called at every decoded token.

        `phase` is "generating", "scoring", "frozen_layers" (where `cache_frozen_layers` finds some), "logprobs"
        or "reference"; `done` of `total` responses have left it, and `tokens` tokens have gone through the model in it.
        """

    def on_rewards_computed(
        self, args: PPOConfig, state: TrainerState, control: TrainerControl, scores: Tensor, gathered_scores: Tensor,
        token_rewards: Tensor, **kwargs: Any,
    ) -> None:  # fmt: skip
        """After scoring: `scores` `(N,)`, reward units, may be changed in place; `gathered_scores` of all processes.

        `gathered_scores` are the scores as the callback before left them. A callback that only some processes have gets
        them as the last one left them that all processes have.

        NaN marks a response that no reward function scored. A score is what a response earns in all; the part of it
        in `token_rewards`, `(N, R)`, is paid at single tokens, and may be changed in place too.
        """

    def on_rollout_end(
        self, args: PPOConfig, state: TrainerState, control: TrainerControl, rollout: Rollout, samples: Experience,
        metrics: dict[str, float], **kwargs: Any,
    ) -> None:  # fmt: skip
        """When advantages are known; `metrics` (of all processes) will be logged and may be added to."""


def hears_scores(callback: PPOCallback) -> bool:
    """Tell whether a callback overrides `on_rewards_computed`."""
    return getattr(callback.on_rewards_computed, "__func__", None) is not PPOCallback.on_rewards_computed


def is_logging_rollout(args: PPOConfig, state: TrainerState, times: int) -> bool:
    """Whether the rollout at this step is the first, or one of `times` that are spread evenly over training."""
    rollouts, index = -(-state.max_steps // args.steps_per_rollout), state.global_step // args.steps_per_rollout
    before, due = ((i * times) // max(1, rollouts) for i in (index - 1, index))
    return index == 0 or due > before

"""Normalization of scores by running statistics."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from ..algo.statistics import ema
from ..config import is_number
from .base import PPOCallback


class RewardNormalizationCallback(PPOCallback, ExportableState):
    """Center and scale scores by exponential moving averages of their mean and variance, then clip them.

    Args:
        decay: weight of the old average per rollout, at least 0 and below 1.
        clip: bound on the normalized score, in standard deviations; None disables clipping.
    """

    def __init__(self, decay: float = 0.9, clip: float | None = 5.0) -> None:
        if not (is_number(decay) and 0 <= decay < 1):
            raise ValueError(f"RewardNormalizationCallback: decay={decay!r} must be at least 0 and below 1.")
        if clip is not None and not (is_number(clip) and clip > 0):
            raise ValueError(f"RewardNormalizationCallback: clip={clip!r} must be a number above 0, or None.")
        self.decay, self.clip = decay, clip
        self.mean: float | None = None
        self.var: float | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Reset the averages when training starts; a resumed run continues with those in its checkpoint."""
        if state.global_step == 0:
            self.mean = self.var = None

    def on_rewards_computed(
        self, args: Any, state: Any, control: Any, scores: Tensor, gathered_scores: Tensor, token_rewards: Tensor,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Update the averages with this rollout, then normalize its scores and scale its token rewards."""
        valid = gathered_scores[~gathered_scores.isnan()]
        if len(valid) == 0:
            return
        mean, var = valid.mean().item(), valid.var(unbiased=False).item()
        if self.mean is not None and self.var is not None:
            mean, var = ema(self.mean, mean, self.decay), ema(self.var, var, self.decay)
        self.mean, self.var = mean, var
        scores.sub_(mean).div_(math.sqrt(var) + 1e-6)
        token_rewards.div_(math.sqrt(var) + 1e-6)
        if self.clip is not None:
            scores.clamp_(-self.clip, self.clip)

    def state(self) -> dict:
        """Return arguments and attributes for `trainer_state.json`."""
        return {
            "args": {"decay": self.decay, "clip": self.clip},
            "attributes": {"mean": self.mean, "var": self.var},
        }

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
    """Centres and scales scores by exponential moving averages of their mean and variance, then clips them.

    Args:
        decay: how much of the old average stays per rollout.
        clip: bound on the normalized score, in standard deviations; None turns it off.
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
        """Start over when training does."""
        if state.global_step == 0:
            self.mean = self.var = None

    def on_rewards_computed(
        self, args: Any, state: Any, control: Any, scores: Tensor, gathered_scores: Tensor, token_rewards: Tensor,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Update the averages with this rollout, then normalize it, the rewards of single tokens by the same scale."""
        known = gathered_scores[~gathered_scores.isnan()]
        if len(known) == 0:
            return
        mean, var = known.mean().item(), known.var(unbiased=False).item()
        if self.mean is not None and self.var is not None:
            mean, var = ema(self.mean, mean, self.decay), ema(self.var, var, self.decay)
        self.mean, self.var = mean, var
        scores.sub_(mean).div_(math.sqrt(var) + 1e-6)
        token_rewards.div_(math.sqrt(var) + 1e-6)
        if self.clip is not None:
            scores.clamp_(-self.clip, self.clip)

    def state(self) -> dict:
        """For `trainer_state.json`."""
        return {
            "args": {"decay": self.decay, "clip": self.clip},
            "attributes": {"mean": self.mean, "var": self.var},
        }

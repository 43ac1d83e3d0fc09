"""The objective that a configuration selects, and the divisor of the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import algo
from ..config import PPOConfig


def count_tokens(inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor | int:
    """Return the loss divisor: response tokens of the minibatch, or of these rows if `num_items_in_batch` is None."""
    return num_items_in_batch if num_items_in_batch is not None else inputs["action_mask"].sum().clamp(min=1)


def policy_loss(args: PPOConfig, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Return the objective that `args` selects, per token, and the mask of clipped tokens; each `(B, R)`."""
    if args.objective == "clip":
        return algo.clipped_policy_loss(
            logprobs, old_logprobs, advantages,
            cliprange=args.cliprange, cliprange_high=args.cliprange_high, dual_clip=args.dual_clip,
        )  # fmt: skip
    if args.objective == "masked":
        high = args.cliprange if args.cliprange_high is None else args.cliprange_high
        return algo.masked_policy_loss(
            logprobs, old_logprobs, advantages, cliprange=args.cliprange, cliprange_high=high
        )
    if args.objective == "kl_penalty":
        loss = algo.kl_penalty_policy_loss(logprobs, old_logprobs, advantages, beta=args.old_policy_kl_coef)
    else:
        loss = algo.unclipped_policy_loss(logprobs, old_logprobs, advantages)
    return loss, torch.zeros_like(loss, dtype=torch.bool)

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


def positive_example_weights(scores: Tensor, mask: Tensor, weight: float, reduce: algo.Reduce) -> Tensor:
    """Return what the negative log-likelihood of each response weighs in the loss of its minibatch, `(B, 1)` float32.

    VAPO (2504.05118, eq. 10) adds `weight` times the mean over the tokens of correct responses. The loss divides by the
    tokens of all responses, so a token of a correct response weighs `weight * tokens / tokens of correct responses`.
    Both counts are those of the minibatch over all ranks: with those of a micro-batch, the term would grow with the
    number of micro-batches.

    Args:
        scores: total reward of each response of the minibatch, `(B,)`, reward units; correct is above 0.
        mask: True for action tokens, `(B, R)` bool.
        weight: VAPO's mu.
        reduce: sums over ranks.
    """
    positive = (scores > 0)[:, None]
    tokens, positive_tokens = reduce(torch.stack([mask.sum(), (mask & positive).sum()]))
    return weight * positive * tokens / positive_tokens.clamp(min=1)


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

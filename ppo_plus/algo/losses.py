"""Losses of the actor, the critic and the reward model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kl import kl_estimate


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute PPO's clipped surrogate, negated so that it is minimized (Schulman et al. 2017, eq. 7).

    `-min(r A, clip(r, 1 - cliprange, 1 + cliprange_high) A)` with `r = exp(logprobs - old_logprobs)`.

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy, with gradient, `(B, R)`, nats.
        old_logprobs: log-probabilities of the same tokens under the old policy, `(B, R)`, nats.
        advantages: advantages of the same tokens, `(B, R)`.
        cliprange: clip range of the ratio below 1.
        cliprange_high: clip range above 1; `cliprange` when None ("clip-higher", DAPO, 2503.14476).
        dual_clip: c above 1 bounds the loss of a negative advantage to `-c A`, however large the ratio
            (Ye et al. 2020, 1912.09729, eq. 5); unbounded when None.

    Returns:
        The loss, `(B, R)`, unit of the advantages, and a bool `(B, R)`: True where a bound replaced the
        ratio (a tie does not count), so that the token has no gradient.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1, not {dual_clip}")
    high = cliprange if cliprange_high is None else cliprange_high
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -ratio * advantages
    bounded = -ratio.clamp(1 - cliprange, 1 + high) * advantages
    clipped = bounded > unclipped
    loss = torch.where(clipped, bounded, unclipped)
    if dual_clip is not None:
        ceiling = -dual_clip * advantages
        too_large = (advantages < 0) & (loss > ceiling)
        loss, clipped = torch.where(too_large, ceiling, loss), clipped | too_large
    return loss, clipped


def unclipped_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Compute the importance-sampled policy gradient loss `-r A` without a bound (Schulman et al. 2017, eq. 6).

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy, with gradient, `(B, R)`, nats.
        old_logprobs: log-probabilities of the same tokens under the old policy, `(B, R)`, nats.
        advantages: advantages of the same tokens, `(B, R)`.

    Returns:
        The loss, `(B, R)`, unit of the advantages.
    """
    return -torch.exp(logprobs - old_logprobs) * advantages


def masked_policy_loss(
    logprobs: Tensor, sampled_logprobs: Tensor, advantages: Tensor, *, cliprange: float, cliprange_high: float
) -> tuple[Tensor, Tensor]:
    """Compute the loss with direct double-sided importance sampling (SAO, 2607.07508, eq. 3).

    `-r A` with `r = exp(logprobs - sampled_logprobs)` where `1 - cliprange < r < 1 + cliprange_high`, else 0: a token
    outside is masked, whatever the sign of its advantage, and not clipped. The ratio is to the distribution that the
    tokens were sampled from, so it corrects the numerics of decoding as well, and no log-probabilities of an old policy
    are needed. SAO's bounds are 0.3 and 5.0 for mathematics, 0.8 and 3.0 for code. This is second-hand: it was read in
    the documentation of EasyDeL's SAO trainer and in the pull requests for Unsloth (9309) and TorchTrade (261). EasyDeL
    detaches the ratio before a score-function loss, which has the same gradient.

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy, with gradient, `(B, R)`, nats.
        sampled_logprobs: log-probabilities of the same tokens as decoding computed them, `(B, R)`, nats.
        advantages: advantages of the same tokens, `(B, R)`.
        cliprange: distance of the lower bound from 1.
        cliprange_high: distance of the upper bound from 1.

    Returns:
        The loss, `(B, R)`, unit of the advantages, and a bool `(B, R)`: True where a token is masked.
    """
    log_ratio = logprobs - sampled_logprobs
    ratio = log_ratio.detach().exp()
    masked = (ratio <= 1 - cliprange) | (ratio >= 1 + cliprange_high)
    # Masked before the exponential, whose infinite gradient would be NaN times 0.
    return torch.where(masked, 0.0, -log_ratio.masked_fill(masked, 0.0).exp() * advantages), masked


def kl_penalty_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, beta: float) -> Tensor:
    """Compute the PPO1 loss `-r A + beta KL(old || policy)` (Schulman et al. 2017, eq. 8).

    The old policy sampled the tokens, so they only allow an estimate of `KL(old || policy)`, whose expectation
    runs over the old policy. Its k3 estimate, `(r - 1) - log r`, is never negative, and its gradient
    `(r - 1) grad log pi` equals that of the KL in expectation; it is 0 where policy and old agree.

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy, with gradient, `(B, R)`, nats.
        old_logprobs: log-probabilities of the same tokens under the old policy, `(B, R)`, nats.
        advantages: advantages of the same tokens, `(B, R)`.
        beta: coefficient of the KL penalty, in the unit of the advantages per nat.

    Returns:
        The loss, `(B, R)`, unit of the advantages.
    """
    penalty = kl_estimate(old_logprobs, logprobs, "k3")
    return unclipped_policy_loss(logprobs, old_logprobs, advantages) + beta * penalty


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange: float | None = 0.2
) -> tuple[Tensor, Tensor]:
    """Compute half the squared error of the critic, or the clipped error if larger (2403.17031, appendix).

    `0.5 max((V - G)^2, (clip(V, V_old - cliprange, V_old + cliprange) - G)^2)`.

    Args:
        values: values from the critic, with gradient, `(B, R)`, reward units.
        old_values: values from the critic at sampling time, `(B, R)`, reward units.
        returns: the target G, `(B, R)`, reward units.
        cliprange: clip range around the old value, reward units; None means a plain squared error.

    Returns:
        The loss, `(B, R)`, squared reward units, and a bool `(B, R)`: True where the clipped error is the
        larger one, so that the token has no gradient.
    """
    error = (values - returns).square()
    if cliprange is None:
        return 0.5 * error, torch.zeros_like(error, dtype=torch.bool)
    # Clamped in place rather than as old + clamp(values - old), whose rounding would count as clipping.
    bounded_error = (values.clamp(old_values - cliprange, old_values + cliprange) - returns).square()
    clipped = bounded_error > error
    return 0.5 * torch.where(clipped, bounded_error, error), clipped


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | float | None = None, center_coefficient: float = 0.0
) -> Tensor:
    """Compute the Bradley-Terry loss `-log sigmoid(chosen - rejected)` of a reward model (Ouyang et al. 2022, eq. 1).

    Args:
        chosen: scores of the preferred responses, `(B,)`, reward units.
        rejected: scores of the other responses to the same prompts, `(B,)`, reward units.
        margin: margin by which the chosen response is better, `(B,)` or one number, reward units (Touvron et
            al. 2023, Llama 2, eq. 2).
        center_coefficient: weight of `(chosen + rejected)^2`, which pins the otherwise undetermined mean score
            to 0 (Eisenstein et al. 2023, 2312.09244, eq. 2).

    Returns:
        The loss per pair, `(B,)`, nats; `log 2` for equal scores.
    """
    gap = chosen - rejected
    if margin is not None:
        gap = gap - margin
    return -F.logsigmoid(gap) + center_coefficient * (chosen + rejected).square()

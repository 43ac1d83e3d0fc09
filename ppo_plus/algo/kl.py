"""KL divergence between policies, its estimators, and controllers of the KL coefficient."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_KL_ERROR = 0.2  # bound on the relative error in the proportional controller of the KL coefficient


def exact_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """Compute `KL(P || Q) = sum_v p_v (log p_v - log q_v)` exactly, over the whole vocabulary.

    The order of the arguments is the direction:
        `exact_kl(policy, reference)`: the quantity that `kl_estimate` estimates, the KL of the RLHF reward.
        `exact_kl(original, current)`: the penalty `KL(orig || current)`, where the frozen model weighs the
        terms. It is a different quantity: large where the current model gives low probability to tokens that
        are likely under the original.

    Args:
        logits_p: logits of P, over which the expectation runs, `(B, R, V)`, divided by the temperature.
        logits_q: logits of Q, `(B, R, V)`, divided by the temperature.

    Returns:
        The divergence per position, `(B, R)` float32, nats, at least 0 up to rounding.
    """
    logprobs_p, logprobs_q = F.log_softmax(logits_p.float(), dim=-1), F.log_softmax(logits_q.float(), dim=-1)
    probs = logprobs_p.exp()
    # A token that P never emits adds nothing, also where Q excludes it too (-inf minus -inf).
    return (probs * (logprobs_p - logprobs_q).masked_fill(probs == 0, 0.0)).sum(-1)


_KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_ratio: -log_ratio,
    "k2": lambda log_ratio: log_ratio.square() / 2,
    "k3": lambda log_ratio: torch.expm1(log_ratio) - log_ratio,
    "abs": lambda log_ratio: log_ratio.abs(),
}


KL_ESTIMATORS = tuple(_KL_ESTIMATORS)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Estimate `KL(policy || reference)` per token from tokens that the policy sampled.

    Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html). With the log ratio
    `log r = ref_logprobs - logprobs`, which is negative where the token is more likely under the policy:
        `k1 = -log r = logprobs - ref_logprobs`: unbiased; the estimate of a single token may be negative.
        `k2 = (log r)^2 / 2`: never negative, biased, low variance.
        `k3 = (r - 1) - log r`: never negative and unbiased.
        `abs = |log r|`: never negative; not an estimate of the KL but an upper bound on the size of k1.
    These estimate the value, for use in the reward. As a loss on `logprobs`, k1 has no effect: its gradient
    is 0 in expectation.

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy that sampled them, `(B, R)`, nats.
        ref_logprobs: log-probabilities of the same tokens under the reference, `(B, R)`, nats.
        estimator: one of `KL_ESTIMATORS`.

    Returns:
        The estimate per token, `(B, R)`, nats.
    """
    if estimator not in _KL_ESTIMATORS:
        raise ValueError(f"unknown KL estimator {estimator!r}; choose one of {', '.join(KL_ESTIMATORS)}")
    return _KL_ESTIMATORS[estimator](ref_logprobs - logprobs)


def proportional_kl_coef(
    kl_coef: float, kl: float, *, target: float, horizon: int, episodes: int, max_error: float = MAX_KL_ERROR
) -> float:
    """Update the KL coefficient with a proportional controller in log space (Ziegler et al. 2019, section 2.2).

    `kl_coef (1 + clip(kl / target - 1, -max_error, max_error) episodes / horizon)`.

    Args:
        kl_coef: the coefficient used for these episodes, reward units per nat.
        kl: the measured KL, nats per sequence.
        target: the target KL, nats per sequence, above 0.
        horizon: episodes over which the coefficient changes by about `max_error` at most.
        episodes: episodes since the last call, over all processes.
        max_error: bound on the relative error.

    Returns:
        The coefficient for the next episodes.
    """
    error = min(max(kl / target - 1, -max_error), max_error)
    return kl_coef * (1 + error * episodes / horizon)


def log_kl_error(kl: float, target: float, max_error: float = 1.0) -> float:
    """Compute `log(kl / target)`, bounded by `max_error` on both sides; the lower bound for a KL of 0 or below."""
    return min(max(math.log(kl / target), -max_error), max_error) if kl > 0 else -max_error


def pi_kl_coef(kl_coef: float, error: float, previous_error: float, *, proportional: float, integral: float) -> float:
    """Update the KL coefficient with a proportional-integral controller in log space.

    `kl_coef exp(integral error + proportional (error - previous_error))`, the velocity form: the second term sums to
    `proportional error`. Ziegler's controller integrates alone; a coefficient that has fallen while the KL was still
    rising then carries it past the target. Stooke et al. 2020 (2007.03964, PID Lagrangian methods) add the proportional
    term to the multiplier of a constraint, which damps that. They control the multiplier itself; here it is its
    logarithm, as in Ziegler's, so it stays positive and the gains do not depend on the scale of the reward.

    Args:
        kl_coef: the coefficient used for the last rollout, reward units per nat.
        error: `log_kl_error` of the last rollout.
        previous_error: that of the rollout before; `error` for the first.
        proportional: gain, above or equal to 0.
        integral: gain per rollout, above 0.

    Returns:
        The coefficient for the next rollout.
    """
    return kl_coef * math.exp(integral * error + proportional * (error - previous_error))


def band_kl_coef(kl_coef: float, kl: float, *, low: float, high: float, factor: float = 2.0) -> float:
    """Update the KL coefficient to keep the KL in a band (after Schulman et al. 2017, section 4).

    Args:
        kl_coef: the current coefficient, reward units per nat.
        kl: the measured KL, in the unit of `low` and `high`.
        low: lower end of the band; the coefficient is divided by `factor` below it.
        high: upper end of the band; the coefficient is multiplied by `factor` above it.
        factor: factor of one update, above 1.

    Returns:
        The new coefficient; unchanged inside the band, both ends included.
    """
    if kl < low:
        return kl_coef / factor
    return kl_coef * factor if kl > high else kl_coef

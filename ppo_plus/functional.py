"""The mathematics of PPO for language models, per token: what would be true on a whiteboard.

Notation:
    B: sequences in the batch. R: response tokens, right-padded. V: vocabulary size.
    mask: 1 (or True) for response tokens up to and including EOS, else 0, `(B, R)`.
    logprobs: natural log of the probability of the token that was sampled, nats.
    policy, old, reference: the model being trained, the same model when it sampled, the frozen model.

Losses are returned per token and never reduced: the trainer masks, sums and divides once, by the token
count of the whole minibatch, so that the gradient does not depend on how the minibatch is split.
What stands outside `mask` never reaches a result of a function that takes one, not even NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes; every process calls it equally often, also one with an empty mask."""

Average = TypeVar("Average", float, Tensor)

MAX_KL_ERROR = 0.2  # bound on the relative error in the proportional controller of the KL coefficient


# --- statistics over real tokens ---


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` in at least float32, 0 outside `mask`."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    # Filling rather than multiplying: 0 * inf is NaN, and padding may hold anything.
    return values.masked_fill(~mask.bool(), 0.0)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over the positions where `mask` is 1; 0, not NaN, where there is none.

    Args:
        values: any quantity, `(B, R)`.
        mask: 1 for the positions that count, same shape as `values`.
        dim: the dimension to average over; all of them when None.

    Returns:
        The mean, float32, in the unit of `values`: a scalar, or `values` without `dim`.
    """
    total, count = _masked(values, mask), mask.bool()
    if dim is None:
        return total.sum() / count.sum().clamp(min=1)
    return total.sum(dim) / count.sum(dim).clamp(min=1)


def masked_moments(values: Tensor, mask: Tensor, *, reduce: Reduce | None = None) -> tuple[Tensor, Tensor]:
    """Mean and variance over all masked positions of all processes (two-pass, corrected: Chan et al. 1983).

    Args:
        values: any quantity, `(B, R)`; B and R may differ between processes.
        mask: 1 for the positions that count, same shape as `values`.
        reduce: sums a tensor over all processes; None means that there is one process.

    Returns:
        The mean and the biased variance (divided by the count, so one position gives 0 and never NaN),
        float32 scalars, equal on all processes; both 0 where no position counts.
    """
    reduce = reduce or (lambda tensor: tensor)
    kept = _masked(values, mask)
    total, count = reduce(torch.stack([kept.sum(), mask.bool().sum().to(kept.dtype)]))
    count = count.clamp(min=1)
    mean = total / count

    centred = _masked(kept - mean, mask)
    residual, squares = reduce(torch.stack([centred.sum(), centred.square().sum()])) / count
    # What rounding left in the mean: without this, equal values get a variance a hair above 0, and
    # whoever divides by it amplifies noise.
    return mean + residual, (squares - residual.square()).clamp(min=0)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Biased variance over the positions where `mask` is 1, of this process.

    Args:
        values: any quantity, `(B, R)`.
        mask: 1 for the positions that count, same shape as `values`.

    Returns:
        The variance, a float32 scalar, in the squared unit of `values`; 0 for one position or none.
    """
    return masked_moments(values, mask)[1]


def whiten(
    values: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    reduce: Reduce | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """Scale masked values to variance 1 and, with `shift_mean`, to mean 0 (Huang et al. 2024, 2403.17031).

    Args:
        values: advantages or rewards, `(B, R)`.
        mask: 1 for the positions that count, same shape as `values`.
        shift_mean: True gives mean 0 (advantages). False scales the spread around the mean and keeps the
            mean itself (rewards, whose level tells good from bad).
        reduce: sums a tensor over all processes; the statistics are then those of all of them.
        eps: added to the variance.

    Returns:
        The whitened values, `(B, R)` float32, unit: standard deviations; 0 outside `mask`. One single
        valid position is finite: 0 when shifted, itself when not.
    """
    mean, var = masked_moments(values, mask, reduce=reduce)
    whitened = (_masked(values, mask) - mean) * torch.rsqrt(var + eps)
    return _masked(whitened if shift_mean else whitened + mean, mask)


# --- distributions over the vocabulary ---


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of the token that follows, under the distribution that sampling drew from.

    Args:
        logits: scores of the next token, `(B, R, V)`, any floating dtype.
        targets: the tokens that were sampled, `(B, R)` int64.
        temperature: the sampling temperature, which divides the logits; above 0.

    Returns:
        Log-probabilities, `(B, R)` float32, nats.
    """
    return logprobs_and_entropy(logits, targets, temperature, with_entropy=False)[0]


def logprobs_and_entropy(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, with_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`token_logprobs` and `entropy` from one softmax; `None` for the entropy where it is not asked for."""
    logprobs = scaled_log_softmax(logits, temperature)
    chosen = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen, entropy_of_logprobs(logprobs) if with_entropy else None


def scaled_log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the whole vocabulary, `(..., V)` float32, nats."""
    scaled = logits.float()
    if temperature != 1:
        # In place where a copy was made just now: these are the largest tensors there are.
        scaled = scaled / temperature if scaled is logits else scaled.div_(temperature)
    return F.log_softmax(scaled, dim=-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of the next-token distribution, `H = -sum_v p_v log p_v` (`S` in Schulman et al. 2017, eq. 9).

    Args:
        logits: scores of the next token, `(B, R, V)`, any floating dtype; `-inf` means impossible.
        temperature: the sampling temperature, which divides the logits; above 0.

    Returns:
        Entropy per position, `(B, R)` float32, nats, between 0 and `log V`.
    """
    return entropy_of_logprobs(scaled_log_softmax(logits, temperature))


def entropy_of_logprobs(logprobs: Tensor) -> Tensor:
    """`entropy` where the log-probabilities `(..., V)` are known already."""
    # The limit of p log p at p = 0 is 0; computed, it is 0 * -inf.
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


def full_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """`KL(P || Q) = sum_v p_v (log p_v - log q_v)` over the whole vocabulary, not estimated from a sample.

    The order of the arguments is the direction:
        `full_kl(policy, reference)`: what `kl_divergence` estimates, the KL of the RLHF reward.
        `full_kl(original, current)`: the penalty `KL(orig || current)`, where the frozen model weighs the
        terms. It is another quantity: large where the current model no longer says what the original did.

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


_ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_ratio: -log_ratio,
    "k2": lambda log_ratio: log_ratio.square() / 2,
    "k3": lambda log_ratio: torch.expm1(log_ratio) - log_ratio,
    "abs": lambda log_ratio: log_ratio.abs(),
}
KL_ESTIMATORS = tuple(_ESTIMATES)


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Per-token estimate of `KL(policy || reference)` from tokens that the policy sampled.

    Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html). With the log ratio
    `log r = ref_logprobs - logprobs`, which is negative where the policy likes the token more:
        `k1 = -log r = logprobs - ref_logprobs`: unbiased; a single token's may be negative.
        `k2 = (log r)^2 / 2`: never negative, biased, low variance.
        `k3 = (r - 1) - log r`: never negative and unbiased.
        `abs = |log r|`: never negative; not an estimate of the KL but an upper bound on the size of k1.
    They estimate the value, for the reward. As a loss on `logprobs` k1 does nothing: its gradient there is
    0 in expectation.

    Args:
        logprobs: of the sampled tokens under the policy that sampled them, `(B, R)`, nats.
        ref_logprobs: of the same tokens under the reference, `(B, R)`, nats.
        estimator: one of `KL_ESTIMATORS`.

    Returns:
        The estimate per token, `(B, R)`, nats.
    """
    if estimator not in _ESTIMATES:
        raise ValueError(f"unknown KL estimator {estimator!r}; choose one of {', '.join(KL_ESTIMATORS)}")
    return _ESTIMATES[estimator](ref_logprobs - logprobs)


# --- from scores to advantages ---


def shape_rewards(
    scores: Tensor,
    kl: Tensor,
    mask: Tensor,
    kl_coef: float,
    token_rewards: Tensor | None = None,
) -> Tensor:
    """Reward per token: KL penalty everywhere, score at the last real token (Ziegler et al. 2019, eq. 2).

    Args:
        scores: one score per response, `(B,)`, reward units.
        kl: KL of policy against reference per token, `(B, R)`, nats.
        mask: 1 for response tokens up to and including EOS, else 0, `(B, R)`.
        kl_coef: price of one nat, reward units per nat.
        token_rewards: rewards for single tokens, `(B, R)`, reward units, added as they are.

    Returns:
        Rewards, `(B, R)` float32, reward units; 0 outside `mask`, and all 0 for a row whose mask is empty.
    """
    real = mask.bool()
    rewards = -kl_coef * kl
    if token_rewards is not None:
        rewards = rewards + token_rewards
    last = real & (real.flip(1).cumsum(1).flip(1) == 1)
    return _masked(rewards, real) + _masked(scores.unsqueeze(1).expand_as(kl), last)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over response tokens (Schulman et al. 2016, eq. 16).

    `delta_t = r_t + gamma V(s_{t+1}) - V(s_t)` and `A_t = delta_t + gamma lam A_{t+1}`, backwards from the
    last real token, after which both V and A are 0.

    Args:
        rewards: reward for emitting token t, `(B, R)` float32, reward units.
        values: `V(s_t)` before token t is emitted, `(B, R)`, reward units.
        mask: 1 for response tokens up to and including EOS, else 0, `(B, R)`; ones, then zeros.
        gamma: discount per token, 0 to 1.
        lam: 0 trusts the values (one-step TD), 1 trusts the rewards (Monte Carlo).

    Returns:
        advantages and returns, both `(B, R)`, zero outside `mask`; advantages are not whitened. Returns
        are `advantages + values`, the target of the critic.
    """
    rewards, values = _masked(rewards, mask), _masked(values, mask)
    advantage = next_value = torch.zeros_like(values[:, 0])
    backwards = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
        backwards.append(advantage)
    advantages = torch.stack(backwards[::-1], dim=1)
    return advantages, advantages + values


# --- losses ---


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, negated to be minimised (Schulman et al. 2017, eq. 7).

    `-min(r A, clip(r, 1 - cliprange, 1 + cliprange_high) A)` with `r = exp(logprobs - old_logprobs)`.

    Args:
        logprobs: of the sampled tokens under the policy, with gradient, `(B, R)`, nats.
        old_logprobs: of the same tokens when they were sampled, `(B, R)`, nats.
        advantages: of the same tokens, `(B, R)`.
        cliprange: how far below 1 the ratio may usefully go.
        cliprange_high: how far above 1; `cliprange` when None ("clip-higher", DAPO, 2503.14476).
        dual_clip: c above 1 bounds the loss of a negative advantage to `-c A`, however large the ratio
            (Ye et al. 2020, 1912.09729, eq. 5); unbounded when None.

    Returns:
        The loss, `(B, R)`, unit of the advantages, and a bool `(B, R)`: True where a bound took the place
        of the ratio (a tie does not count), so that the token has no gradient.
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
    """Importance-sampled policy gradient `-r A`, of unlimited step (Schulman et al. 2017, eq. 6).

    Args:
        logprobs: of the sampled tokens under the policy, with gradient, `(B, R)`, nats.
        old_logprobs: of the same tokens when they were sampled, `(B, R)`, nats.
        advantages: of the same tokens, `(B, R)`.

    Returns:
        The loss, `(B, R)`, unit of the advantages.
    """
    return -torch.exp(logprobs - old_logprobs) * advantages


def truncated_importance_weights(logprobs: Tensor, sampled_logprobs: Tensor, *, cap: float) -> Tensor:
    """`min(pi_old(a_t | s_t) / mu(a_t | s_t), cap)`, where mu is what decoding sampled from.

    mu and pi_old are the same policy by other kernels (a cache, quantized products, another precision), so the weight
    is 1 up to numerics. Truncated as in Espeholt et al. 2018 (IMPALA, eq. 1), per token. A gap below 1e-3 nats is
    rounding and weighs exactly 1, so in fp32 nothing depends on how many rows were decoded side by side.

    Args:
        logprobs: of the forward pass that the loss uses, `(B, R)`, nats.
        sampled_logprobs: as decoding computed them, `(B, R)`, nats.
        cap: the largest weight.

    Returns:
        weights, `(B, R)` float32.
    """
    gap = logprobs - sampled_logprobs
    return gap.masked_fill(gap.abs() < 1e-3, 0.0).exp().clamp(max=cap)


def kl_penalty_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, beta: float) -> Tensor:
    """PPO1: `-r A + beta KL(old || policy)` (Schulman et al. 2017, eq. 8).

    The tokens were sampled by the old policy, so the KL that can be estimated from them is the one that
    the old policy weighs. Its k3 estimate, `(r - 1) - log r`, is never negative, and its gradient
    `(r - 1) grad log pi` is in expectation that of the KL; the gradient is 0 where policy and old agree.

    Args:
        logprobs: of the sampled tokens under the policy, with gradient, `(B, R)`, nats.
        old_logprobs: of the same tokens when they were sampled, `(B, R)`, nats.
        advantages: of the same tokens, `(B, R)`.
        beta: price of one nat, in the unit of the advantages.

    Returns:
        The loss, `(B, R)`, unit of the advantages.
    """
    penalty = kl_divergence(old_logprobs, logprobs, "k3")
    return unclipped_policy_loss(logprobs, old_logprobs, advantages) + beta * penalty


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange: float | None = 0.2
) -> tuple[Tensor, Tensor]:
    """Half the squared error of the critic, pessimistic about leaving its old value (2403.17031, appendix).

    `0.5 max((V - G)^2, (clip(V, V_old - cliprange, V_old + cliprange) - G)^2)`.

    Args:
        values: of the critic, with gradient, `(B, R)`, reward units.
        old_values: of the critic when the tokens were sampled, `(B, R)`, reward units.
        returns: the target G, `(B, R)`, reward units.
        cliprange: how far a value may usefully move, reward units; None means a plain squared error.

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
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | float | None = None, centre: float = 0.0
) -> Tensor:
    """Bradley-Terry loss of a reward model, `-log sigmoid(chosen - rejected)` (Ouyang et al. 2022, eq. 1).

    Args:
        chosen: scores of the preferred responses, `(B,)`, reward units.
        rejected: scores of the other responses to the same prompts, `(B,)`, reward units.
        margin: by how much the chosen response is better, `(B,)` or one number, reward units (Touvron et
            al. 2023, Llama 2, eq. 2).
        centre: weight of `(chosen + rejected)^2`, which pins the otherwise free level of the scores to 0
            (Eisenstein et al. 2023, 2312.09244, eq. 2).

    Returns:
        The loss per pair, `(B,)`, nats; `log 2` for equal scores.
    """
    gap = chosen - rejected
    if margin is not None:
        gap = gap - margin
    return -F.logsigmoid(gap) + centre * (chosen + rejected).square()


# --- diagnostics and controllers ---


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, *, reduce: Reduce | None = None) -> Tensor:
    """Share of the variance of the returns that the critic predicts, `1 - Var[G - V] / Var[G]`.

    Args:
        values: of the critic, `(B, R)`, reward units.
        returns: what it should have said, `(B, R)`, reward units.
        mask: 1 for response tokens up to and including EOS, else 0, `(B, R)`.
        reduce: sums a tensor over all processes.

    Returns:
        A float32 scalar without unit: 1 is perfect, 0 no better than a constant, below 0 worse; 0 where
        the returns do not vary.
    """
    _, total = masked_moments(returns, mask, reduce=reduce)
    _, unexplained = masked_moments(returns - values, mask, reduce=reduce)
    return torch.where(total > 0, 1 - unexplained / total, torch.zeros_like(total))


def proportional_kl_coef(
    kl_coef: float, kl: float, *, target: float, horizon: int, episodes: int, max_error: float = MAX_KL_ERROR
) -> float:
    """Proportional controller of the KL coefficient in log space (Ziegler et al. 2019, section 2.2).

    `kl_coef (1 + clip(kl / target - 1, -max_error, max_error) episodes / horizon)`.

    Args:
        kl_coef: the coefficient that held for these episodes, reward units per nat.
        kl: the KL that was measured, nats per sequence.
        target: the KL that is wanted, nats per sequence, above 0.
        horizon: episodes over which the coefficient changes by about `max_error` at most.
        episodes: episodes since the last call, over all processes.
        max_error: bound on the relative error.

    Returns:
        The coefficient for the next episodes.
    """
    error = min(max(kl / target - 1, -max_error), max_error)
    return kl_coef * (1 + error * episodes / horizon)


def band_kl_coef(kl_coef: float, kl: float, *, low: float, high: float, factor: float = 2.0) -> float:
    """Keep the KL in a band: a lower price below, a higher one above (after Schulman et al. 2017, section 4).

    Args:
        kl_coef: the coefficient that held so far, reward units per nat.
        kl: the KL that was measured, in the unit of `low` and `high`.
        low: below it the policy hardly moves: the coefficient is divided by `factor`.
        high: above it the policy moves too far: the coefficient is multiplied by `factor`.
        factor: above 1.

    Returns:
        The coefficient from now on; unchanged inside the band, its ends included.
    """
    if kl < low:
        return kl_coef / factor
    return kl_coef * factor if kl > high else kl_coef


def ema(old: Average, new: Average, decay: float) -> Average:
    """Exponential moving average, `decay old + (1 - decay) new`.

    Args:
        old: the average so far.
        new: the value that was just measured, in the same unit.
        decay: share of `old` that remains, 0 to 1.

    Returns:
        The new average.
    """
    return decay * old + (1 - decay) * new

"""Reward shaping, generalized advantage estimation, and importance sampling weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .statistics import Reduce, _masked, masked_moments


def shape_rewards(
    scores: Tensor,
    kl: Tensor,
    mask: Tensor,
    kl_coef: float,
    token_rewards: Tensor | None = None,
) -> Tensor:
    """Compute per-token rewards: KL penalty everywhere, score at the last action (Ziegler et al. 2019, eq. 2).

    Args:
        scores: one score per response, `(B,)`, reward units.
        kl: KL of policy against reference per token, `(B, R)`, nats.
        mask: 1 for the tokens that are actions, else 0, `(B, R)`; may have holes.
        kl_coef: coefficient of the KL penalty, reward units per nat.
        token_rewards: rewards for single tokens, `(B, R)`, reward units, added without scaling.

    Returns:
        Rewards, `(B, R)` float32, reward units; 0 outside `mask`, and all 0 for a row whose mask is empty.
    """
    real = mask.bool()
    rewards = -kl_coef * kl
    if token_rewards is not None:
        rewards = rewards + token_rewards
    last = real & (real.flip(1).cumsum(1).flip(1) == 1)
    return _masked(rewards, real) + _masked(scores.unsqueeze(1).expand_as(kl), last)


def move_to_actions(token_rewards: Tensor, mask: Tensor) -> Tensor:
    """Pay rewards of observations at the last action before them, or at the first action of the row.

    The answer of a tool is the consequence of the call before it, and GAE sees rewards of actions alone.

    Args:
        token_rewards: `(B, R)`, reward units.
        mask: 1 for the tokens that are actions, else 0, `(B, R)`; may have holes.

    Returns:
        Rewards, `(B, R)`, reward units, with the same sum per row; 0 outside `mask`, and all 0 where it is empty.
    """
    real = mask.bool()
    positions = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    before = positions.masked_fill(~real, -1).cummax(1).values
    target = torch.where(before < 0, real.long().argmax(1, keepdim=True), before)
    return torch.zeros_like(token_rewards).scatter_add_(1, target, token_rewards).masked_fill(~real, 0.0)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute generalized advantage estimates over action tokens (Schulman et al. 2016, eq. 16).

    `delta_t = r_t + gamma V(s_{t+1}) - V(s_t)` and `A_t = delta_t + gamma lam A_{t+1}`, backward from the
    last action, after which both V and A are 0. t counts actions alone: at the last token of a turn, t + 1 is the first
    token of the next turn, so the observation between them (a tool's result) neither discounts nor needs a value.

    Args:
        rewards: reward for emitting token t, `(B, R)` float32, reward units.
        values: `V(s_t)` before token t is emitted, `(B, R)`, reward units.
        mask: 1 for the tokens that are actions, else 0, `(B, R)`; may have holes.
        gamma: discount per token, 0 to 1.
        lam: 0 trusts the values (one-step TD), 1 trusts the rewards (Monte Carlo); one for all responses, or `(B,)`.

    Returns:
        advantages and returns, both `(B, R)`, zero outside `mask`; advantages are not whitened. Returns
        are `advantages + values`, the target of the critic.
    """
    rewards, values = _masked(rewards, mask), _masked(values, mask)
    advantage = next_value = torch.zeros_like(values[:, 0])
    advantages_reversed = []
    for t in reversed(range(values.shape[1])):
        is_action = mask[:, t].bool()
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(is_action, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(is_action, values[:, t], next_value)
        advantages_reversed.append(advantage)
    advantages = _masked(torch.stack(advantages_reversed[::-1], dim=1), mask)
    return advantages, advantages + values


def length_adaptive_lam(mask: Tensor, alpha: float) -> Tensor:
    """Compute the GAE lambda of each response from its length, `1 - 1 / (alpha l)`, at least 0.

    With it the weights of the TD errors, `lam ** k`, sum to about `alpha l`, so a long response's first tokens still
    receive the reward at its end: at 0.95 the weight of 200 tokens on is 4e-5. From VAPO (2504.05118), with alpha 0.05
    for responses of thousands of tokens; SAO (2607.07508) uses 1.5. The formula is second-hand: it was read in tests
    of NeMo-RL, in prime-rl and in the documentation of EasyDeL's SAO trainer. The papers leave open what a length below
    `1 / alpha` means; here lambda is then 0.

    Args:
        mask: 1 for the tokens that are actions, `(B, R)`; l is their number.
        alpha: above 0; how much of a response the weights cover.

    Returns:
        lambda, `(B,)` float32, 0 to below 1; 0 for a response without actions.
    """
    lengths = mask.bool().sum(1).clamp(min=1)
    return (1 - 1 / (alpha * lengths)).clamp(min=0)


def gate_critic(
    advantages: Tensor, mc_returns: Tensor, mask: Tensor, explained_variance: Tensor, *, reduce: Reduce | None = None
) -> Tensor:
    """Replace advantages by `G - mean(G)` if the critic predicts returns no better than their mean (EVPO, 2604.19485).

    With Monte Carlo returns G the variance of `G - V` is above that of `G - mean(G)` exactly if the explained variance
    of V is below 0, so the gate never has the larger of the two. This is second-hand: its abstract and summaries were
    read. They leave open whether statistics are over responses or tokens: here they are over tokens, as in whitening.

    Args:
        advantages: advantages with the critic's values, `(B, R)`, reward units.
        mc_returns: discounted rewards from each token on, G, `(B, R)`, reward units.
        mask: 1 for the tokens that are actions, `(B, R)`.
        explained_variance: of the values for `mc_returns`, over all processes, a scalar.
        reduce: sums a tensor over all processes.

    Returns:
        Advantages, `(B, R)` float32, reward units; 0 outside `mask`.
    """
    if explained_variance > 0:
        return advantages
    mean, _ = masked_moments(mc_returns, mask, reduce=reduce)
    return _masked(mc_returns - mean, mask)


def leave_one_out_mean(returns: Tensor, num_generations: int, valid: Tensor) -> Tensor:
    """Compute for each response the mean return of the other responses to its prompt, a baseline that it cannot bias.

    `G_i - b_i` is `k / (k - 1) (G_i - mean(G))` in a group of k. From "Buy 4 REINFORCE Samples, Get a Baseline for
    Free!" (Kool et al. 2019) and RLOO (Ahmadian et al. 2024, 2402.14740, section 3.3).

    Args:
        returns: discounted rewards of each response, `(N,)`, reward units; k consecutive ones have the same prompt.
        num_generations: k.
        valid: False for responses that are excluded from learning, `(N,)` bool.

    Returns:
        baselines, `(N,)` float32, reward units; 0 if all other responses are excluded.
    """
    groups, counts = (_masked(returns, valid).view(-1, num_generations), valid.float().view(-1, num_generations))
    others = counts.sum(1, keepdim=True) - counts
    return ((groups.sum(1, keepdim=True) - groups) / others.clamp(min=1)).flatten()


def truncated_importance_weights(logprobs: Tensor, sampled_logprobs: Tensor, *, cap: float) -> Tensor:
    """Compute `min(pi_old(a_t | s_t) / mu(a_t | s_t), cap)`, where mu is the distribution that decoding sampled from.

    mu and pi_old are the same policy computed by different kernels (KV cache, quantized matmuls, another precision), so
    the weight is 1 up to numerics. Truncated as in Espeholt et al. 2018 (IMPALA, eq. 1), per token. A gap below 1e-3
    nats is rounding and weighs exactly 1, so in fp32 the result does not depend on the generation batch size.

    Args:
        logprobs: log-probabilities from the forward pass that the loss uses, `(B, R)`, nats.
        sampled_logprobs: log-probabilities computed during decoding, `(B, R)`, nats.
        cap: upper bound on the weight.

    Returns:
        weights, `(B, R)` float32.
    """
    gap = logprobs - sampled_logprobs
    return gap.masked_fill(gap.abs() < 1e-3, 0.0).exp().clamp(max=cap)

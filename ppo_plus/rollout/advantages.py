"""Compute rewards per token, advantages and returns, which turn scored responses into a rollout."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import algo
from ..algo.prefix_reward_baseline import RewardBaseline
from ..config import PPOConfig
from .buffer import Rollout
from .experience import Experience


def build_rollout(
    samples: Experience, scores: Tensor, kl_coef: float, args: PPOConfig, reduce: algo.Reduce,
    baseline: RewardBaseline | None = None,
) -> Rollout:  # fmt: skip
    """Compute rewards per token, advantages and returns.

    Args:
        samples: scored responses.
        scores: total reward of each response, `(N,)`, reward units; NaN excludes a response from learning.
        kl_coef: reward units per nat.
        args: discount, penalties, whitening.
        reduce: sums over ranks.
        baseline: added to the values if there are prefix scores, and updated by this rollout.
    """
    mask = samples.action_mask & ~scores.isnan()[:, None]
    scores = scores.nan_to_num()
    if args.missing_eos_penalty is not None:
        scores = scores - args.missing_eos_penalty * (~samples.stopped)
    rewards = _shape_rewards(samples, scores, kl_coef, mask, args, reduce)
    values, value_baselines = samples.values, torch.zeros_like(samples.values)
    mc_returns, _ = algo.gae(rewards, torch.zeros_like(rewards), mask, gamma=args.gamma, lam=1.0)
    if baseline is not None and samples.prefix_scores is not None:
        value_baselines = baseline.fit_predict(samples.prefix_scores, mc_returns, mask, reduce)
    if args.advantage_baseline == "rloo":
        first = mask.long().argmax(1, keepdim=True)  # a response may begin with an observation
        firsts = mc_returns.gather(1, first)[:, 0]
        value_baselines = algo.leave_one_out_mean(firsts, args.num_generations, mask.any(1))[:, None] * mask
    values = values + value_baselines
    advantages, returns = estimate_advantages(rewards, values, mask, args)
    explained = algo.explained_variance(values, mc_returns, mask, reduce=reduce)
    if args.critic_gate:
        advantages = algo.gate_critic(advantages, mc_returns, mask, explained, reduce=reduce)
    advantages = algo.whiten(advantages, mask, reduce=reduce)
    # The ratio of the masked objective is to the sampler, so it needs no weights.
    if (cap := args.importance_sampling_cap) is not None and args.objective != "masked":
        # A positive factor of the advantage scales the whole loss of its token.
        weights = algo.truncated_importance_weights(samples.logprobs, samples.sampled_logprobs, cap=cap)
        advantages = torch.where(mask, advantages * weights, 0.0)
    return Rollout(
        samples.input_ids, samples.attention_mask, mask, samples.logprobs, samples.ref_logprobs, values,
        value_baselines, advantages, returns, scores, ((samples.logprobs - samples.ref_logprobs) * mask).sum(1),
        samples.frozen_hidden_states, explained, samples.observation_mask,
    )  # fmt: skip


def estimate_advantages(rewards: Tensor, values: Tensor, mask: Tensor, args: PPOConfig) -> tuple[Tensor, Tensor]:
    """Return advantages and value targets, each `(N, R)`, from the same values by GAE with two lambdas.

    Decoupled as in VC-PPO (2503.01491): targets with lambda 1 (Monte Carlo) do not depend on the values that they
    correct, while advantages keep a lower lambda, which lowers their variance.
    """
    alpha = args.length_adaptive_alpha
    lam = args.lam if alpha is None else algo.length_adaptive_lam(mask, alpha)
    advantages, returns = algo.gae(rewards, values, mask, gamma=args.gamma, lam=lam)
    if args.lam_value is not None:
        _, returns = algo.gae(rewards, values, mask, gamma=args.gamma, lam=args.lam_value)
    return advantages, returns


def _shape_rewards(
    samples: Experience, scores: Tensor, kl_coef: float, mask: Tensor, args: PPOConfig, reduce: algo.Reduce
) -> Tensor:
    """Return rewards per token, `(N, R)`: token-level rewards at their tokens, the rest of the score at the last."""
    kl = algo.kl_estimate(samples.logprobs, samples.ref_logprobs, args.kl_estimator) * mask
    kl_coef = kl_coef if args.kl_penalty_in == "reward" else 0.0
    token_rewards = samples.token_rewards * mask
    rewards = algo.shape_rewards(scores - token_rewards.sum(1), kl, mask, kl_coef, token_rewards)
    return algo.whiten(rewards, mask, shift_mean=False, reduce=reduce) if args.whiten_rewards else rewards

"""Scored responses before they become a rollout, and their metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import algo
from ..rewards import Completions


@dataclass(frozen=True)
class Experience:
    """Scored responses, before they become a rollout. Tensors are on the CPU; shapes as in `Rollout`.

    Attributes:
        input_ids: `(N, P + R)` int64.
        attention_mask: `(N, P + R)` int64.
        action_mask: `(N, R)` bool.
        stopped: whether the response ended in a stop token, `(N,)` bool.
        logprobs: `(N, R)` float32, nats, from the same forward pass that the loss uses; with objective="masked",
            `sampled_logprobs`.
        sampled_logprobs: `(N, R)` float32, nats, as decoding computed them.
        ref_logprobs: `(N, R)` float32, nats.
        values: predictions of the critic, without the baseline, `(N, R)` float32, reward units.
        entropy: `(N, R)` float32, nats; None with objective="masked".
        rewards: `(N, F)` float32 by reward function; NaN for None.
        scores: their weighted sum, `(N,)` float32; NaN where no function gave one.
        token_rewards: the part of `scores` that belongs to single tokens, `(N, R)` float32.
        completions: the texts.
        seconds: by phase.
        extra: columns that reward functions logged.
        frozen_hidden_states: as in `Rollout`; None in evaluation.
        prefix_scores: reward-model score of the prefix before each token, `(N, R)` float32; None in evaluation, and
            without `prefix_reward_baseline`.
        failed: names of reward functions that were left out because they failed.
        observation_mask: as in `Rollout`.
        tool_counts: tool calls and failed tool calls, `(N, 2)` int64; None without tools.
    """

    input_ids: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    stopped: Tensor
    logprobs: Tensor
    sampled_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropy: Tensor | None
    rewards: Tensor
    scores: Tensor
    token_rewards: Tensor
    completions: Completions
    seconds: dict[str, float]
    extra: dict[str, list] = field(default_factory=dict)
    frozen_hidden_states: Tensor | None = None
    prefix_scores: Tensor | None = None
    failed: tuple[str, ...] = ()
    observation_mask: Tensor | None = None
    tool_counts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.action_mask)

    def num_tokens(self) -> Tensor:
        """Return the number of tokens of prompts and of what was sampled, as TRL counts them, int64 scalar."""
        observed = 0 if self.observation_mask is None else self.observation_mask.sum()
        return self.attention_mask.sum() - observed

    def metrics(self, reward_names: Sequence[str], reduce: algo.Reduce) -> dict[str, float]:
        """Return means over all ranks, with one reward name per column of `rewards`; NaN for the mean of no score."""
        log_ratio = (self.logprobs - self.ref_logprobs) * self.action_mask
        reward, reward_var = moments(self.scores, reduce)
        metrics = {
            "reward": reward,
            "reward_std": reward_var**0.5,
            "kl": moments(log_ratio.sum(1), reduce)[0],
            "completions/mean_length": moments(self.action_mask.sum(1).float(), reduce)[0],
            "completions/clipped_ratio": moments((~self.stopped).float(), reduce)[0],
        }
        if self.tool_counts is not None:
            rows, calls, failures = reduce(torch.tensor([len(self), *self.tool_counts.sum(0).tolist()])).tolist()
            metrics |= {"tools/call_frequency": calls / rows, "tools/failure_frequency": failures / max(calls, 1)}
        # Without entropies, the policy's forward pass was spared on this rank; all ranks must call `reduce` alike.
        entropy, mask = self.entropy, self.action_mask & (self.entropy is not None)
        entropy_mean = moments(torch.zeros(mask.shape) if entropy is None else entropy, reduce, mask)[0]
        gap = moments((self.logprobs - self.sampled_logprobs).abs(), reduce, mask)[0]
        metrics |= {} if math.isnan(entropy_mean) else {"entropy": entropy_mean, "sampling/logp_difference": gap}
        for name, column in zip(reward_names, self.rewards.T, strict=True):
            mean, var = moments(column, reduce)
            metrics |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": var**0.5}
        return metrics


def moments(values: Tensor, reduce: algo.Reduce, mask: Tensor | None = None) -> tuple[float, float]:
    """Return mean and variance over all ranks, of the values in the mask or of those that are not NaN."""
    mask = ~values.isnan() if mask is None else mask
    mean, var = algo.masked_moments(values.nan_to_num(), mask, reduce=reduce)
    nan_if_empty = torch.nan if reduce(mask.sum()) == 0 else 0.0
    return mean.item() + nan_if_empty, var.item() + nan_if_empty

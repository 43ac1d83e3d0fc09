"""Assignment of rows to minibatches and micro-batches, and of prompts to rollouts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .seeding import derive_seed

MAX_PARTITION_ROWS = 256  # rows per call of the partition search, whose time is quadratic in the rows


def minibatch_indices(
    n: int, num_mini_batches: int, *, seed: int, rollout_index: int, ppo_epoch: int, process_index: int = 0,
    num_generations: int = 1,
) -> list[Tensor]:  # fmt: skip
    """Draw the row indices of each minibatch of one PPO epoch, independently per epoch.

    Every `num_mini_batches` consecutive prompts of the rollout are assigned at random, one to each minibatch, with all
    responses to it, so that passes over a minibatch can share the prompt. Each process therefore computes its rows of a
    minibatch without communication, and the number of processes does not change which responses share a minibatch.

    Args:
        n: rows of this process, a multiple of `num_mini_batches * num_generations`.
        num_mini_batches: number of minibatches, M.
        seed: seed of the run.
        rollout_index: index of the rollout.
        ppo_epoch: index of the PPO epoch within the rollout.
        process_index: rank of this process, which holds the rows from `process_index * n` on.
        num_generations: responses to each prompt, which are consecutive rows.

    Returns:
        M tensors of `n / M` row indices within this process, ascending.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "minibatches", rollout_index, ppo_epoch))
    groups = n // (num_mini_batches * num_generations)
    assignment = torch.rand((process_index + 1) * groups, num_mini_batches, generator=generator).argsort(-1)
    local_assignment = assignment[process_index * groups :].flatten().repeat_interleave(num_generations)
    return [(local_assignment == minibatch).nonzero().squeeze(-1) for minibatch in range(num_mini_batches)]


def micro_batch_indices(rows: Tensor, lengths: Tensor, batch_size: int, num_generations: int = 1) -> list[Tensor]:
    """Partition a minibatch into micro-batches with minimal padding, as many as with `batch_size` rows each.

    Rows are sorted by length and partitioned to minimize tokens: many short rows, or few long ones per micro-batch. No
    micro-batch has more tokens, padding included, than `batch_size` rows of the maximum length. The partition does not
    change the gradient: the loss is summed and divided by the tokens of the whole minibatch.

    The responses to a prompt stay together, all of them or, if `batch_size` is a divisor of `num_generations`, that
    many.
    """
    if (unit := min(batch_size, num_generations)) > 1:
        units = rows.view(-1, unit)
        parts = micro_batch_indices(torch.arange(len(units)), lengths[units].amax(1), batch_size // unit)
        return [units[part].flatten() for part in parts]
    ordered = rows[lengths[rows].argsort(stable=True)]
    max_tokens = batch_size * float(lengths[rows].max())
    # The search is quadratic in the number of rows, so many rows are partitioned in windows.
    windows = ordered.split(batch_size * max(1, MAX_PARTITION_ROWS // batch_size))
    return [
        part for window in windows for part in min_padding_partition(window, lengths[window], batch_size, max_tokens)
    ]


def min_padding_partition(rows: Tensor, lengths: Tensor, batch_size: int, max_tokens: float) -> list[Tensor]:
    """Partition rows sorted by length into micro-batches with the fewest tokens, by dynamic programming.

    `tokens[i, j]` is the number of tokens of rows i to j - 1 as one micro-batch; `best[j]` is the minimal total of
    rows 0 to j - 1.
    """
    n = len(rows)
    ends = torch.arange(n + 1)
    counts = ends[None, :] - ends[:, None]
    tokens = counts * torch.cat([lengths.new_zeros(1), lengths]).double()
    tokens.masked_fill_((counts < 1) | (tokens > max_tokens), torch.inf)
    best, starts = tokens[0], []
    for _ in range(-(-n // batch_size) - 1):
        best, start = (best[:, None] + tokens).min(0)
        starts.append(start)
    parts, end = [], n
    for start in reversed(starts):
        parts.append(rows[int(start[end]) : end])
        end = int(start[end])
    return [rows[:end], *reversed(parts)]


class PromptSampler:
    """Batch sampler that yields all prompts of a rollout for its first micro-batch and no prompts for the others.

    It has one item per micro-batch of training, so `Trainer` computes epochs, schedules and skipped batches as usual.
    The order is a pure function of (seed, epoch).

    Args:
        num_prompts: size of the dataset, D. The last `D mod N` prompts of each epoch are dropped.
        prompts_per_rollout: prompts per process; N is this number over all processes.
        micro_batches_per_rollout: PPO epochs x minibatches x micro-batches.
        seed: seed of the permutation.
        shuffle: whether to permute the prompts.
        process_index: rank of this process, which selects its shard of each rollout.
        num_processes: number of processes that share a rollout.
    """

    def __init__(
        self,
        num_prompts: int,
        prompts_per_rollout: int,
        micro_batches_per_rollout: int,
        *,
        seed: int,
        shuffle: bool = True,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.num_prompts, self.prompts_per_rollout = num_prompts, prompts_per_rollout
        self.micro_batches_per_rollout = micro_batches_per_rollout
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0
        self.process_index, self.num_processes = process_index, num_processes

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the permutation; `Trainer` calls this at the start of each epoch, also when it resumes."""
        self.epoch = epoch

    def __len__(self) -> int:
        rollouts = self.num_prompts // (self.prompts_per_rollout * self.num_processes)
        return rollouts * self.micro_batches_per_rollout

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.arange(self.num_prompts)
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "prompts", self.epoch))
            order = torch.randperm(self.num_prompts, generator=generator)
        n = self.prompts_per_rollout
        for start in range(0, len(self) // self.micro_batches_per_rollout):
            first = (start * self.num_processes + self.process_index) * n
            yield order[first : first + n].tolist()
            yield from ([] for _ in range(self.micro_batches_per_rollout - 1))

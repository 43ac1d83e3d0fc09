"""Which rows form a minibatch or a micro-batch, and which prompts a rollout gets."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .seeding import derive_seed

MAX_PARTITION_ROWS = 256


def minibatch_indices(
    n: int, num_mini_batches: int, *, seed: int, rollout_index: int, ppo_epoch: int, process_index: int = 0
) -> list[Tensor]:
    """Rows of each minibatch of one PPO epoch, drawn anew for each epoch.

    Every `num_mini_batches` consecutive rows of the rollout are dealt out at random, one to each minibatch. So a
    process finds its own rows of a minibatch without knowing the others', and how many processes share a rollout
    does not change which responses are learned from together.

    Args:
        n: rows of this process, a multiple of `num_mini_batches`.
        num_mini_batches: M.
        seed: of the run.
        rollout_index: which rollout.
        ppo_epoch: which pass over it.
        process_index: this process holds the rows from `process_index * n` on.

    Returns:
        M tensors of `n / M` row indices within this process, ascending.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "minibatches", rollout_index, ppo_epoch))
    groups = n // num_mini_batches
    dealt = torch.rand((process_index + 1) * groups, num_mini_batches, generator=generator).argsort(-1)
    mine = dealt[process_index * groups :].flatten()
    return [(mine == minibatch).nonzero().squeeze(-1) for minibatch in range(num_mini_batches)]


def micro_batch_indices(rows: Tensor, lengths: Tensor, batch_size: int) -> list[Tensor]:
    """Cut one minibatch into as many micro-batches as `batch_size` rows each would be, with the least padding.

    Rows are sorted by length and cut where it costs fewest tokens: many short rows, or few long ones. None of them
    has more tokens, padding included, than `batch_size` rows of the longest. Neither order nor cut changes the
    gradient: the loss is summed and divided by the tokens of the whole minibatch.
    """
    ordered = rows[lengths[rows].argsort(stable=True)]
    most = batch_size * float(lengths[rows].max())
    # The search takes time with the square of the rows, so many rows are cut a window at a time.
    windows = ordered.split(batch_size * max(1, MAX_PARTITION_ROWS // batch_size))
    return [part for window in windows for part in min_padding_partition(window, lengths[window], batch_size, most)]


def min_padding_partition(rows: Tensor, lengths: Tensor, batch_size: int, most: float) -> list[Tensor]:
    """The cut of rows in ascending order of length that has the fewest tokens, by dynamic programming.

    `tokens[i, j]` is what rows i to j - 1 take as one micro-batch; `best[j]` the least that rows 0 to j - 1 take.
    """
    n = len(rows)
    ends = torch.arange(n + 1)
    counts = ends[None, :] - ends[:, None]
    tokens = counts * torch.cat([lengths.new_zeros(1), lengths]).double()
    tokens.masked_fill_((counts < 1) | (tokens > most), torch.inf)
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
    """Batch sampler that hands all prompts of a rollout to its first micro-batch and nothing to the others.

    It is as long as training is (one item per micro-batch), so `Trainer`'s arithmetic of epochs, schedules and
    skipped batches holds unchanged. The order is a pure function of (seed, epoch).

    Args:
        num_prompts: D, the size of the dataset. The `D mod N` prompts left over in an epoch sit it out.
        rollout_batch_size: N per process.
        micro_batches_per_rollout: PPO epochs x minibatches x micro-batches.
        seed: seed of the permutation.
        shuffle: whether to permute at all.
        process_index: which share of each rollout this process takes.
        num_processes: how many share a rollout.
    """

    def __init__(
        self,
        num_prompts: int,
        rollout_batch_size: int,
        micro_batches_per_rollout: int,
        *,
        seed: int,
        shuffle: bool = True,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.num_prompts, self.rollout_batch_size = num_prompts, rollout_batch_size
        self.micro_batches_per_rollout = micro_batches_per_rollout
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0
        self.process_index, self.num_processes = process_index, num_processes

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; `Trainer` calls this at every epoch, also when it resumes."""
        self.epoch = epoch

    def __len__(self) -> int:
        rollouts = self.num_prompts // (self.rollout_batch_size * self.num_processes)
        return rollouts * self.micro_batches_per_rollout

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.arange(self.num_prompts)
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "prompts", self.epoch))
            order = torch.randperm(self.num_prompts, generator=generator)
        n = self.rollout_batch_size
        for start in range(0, len(self) // self.micro_batches_per_rollout):
            first = (start * self.num_processes + self.process_index) * n
            yield order[first : first + n].tolist()
            yield from ([] for _ in range(self.micro_batches_per_rollout - 1))

"""Prompts of each rollout: a map-style dataset, reshuffled each epoch, or a stream in its own order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from ..config import PPOConfig
from .batching import PromptSampler
from .prompts import Row


class PromptLoader(DataLoader):
    """DataLoader of dataset rows without collation; the sampler selects the rows of each micro-batch."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the batch sampler, which Trainer does not do itself."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class PromptStream:
    """Map-style view of a stream: item k holds the prompts of rollout k, read forward.

    Rollout k always gets the same prompts of the stream, so a resumed run skips the prompts of earlier rollouts and
    continues from there. (`IterableDataset.state_dict` would be faster, but it does not save the shuffle buffer, so
    the run would not be reproduced bit for bit.) An exhausted stream is restarted as its next epoch; as with a dataset,
    the last prompts of an epoch that do not fill a rollout are dropped.

    Args:
        dataset: tokenized prompts, consumed in order; `IterableDataset.shuffle` reshuffles each epoch.
        prompts_per_rollout: prompts per process.
        process_index: rank of this process, which selects its shard of each rollout.
        num_processes: number of processes that share a rollout.
    """

    def __init__(
        self, dataset: IterableDataset, prompts_per_rollout: int, *, process_index: int = 0, num_processes: int = 1
    ) -> None:
        self.dataset, self.per_rollout = dataset, prompts_per_rollout * num_processes
        self.shard = slice(process_index * prompts_per_rollout, (process_index + 1) * prompts_per_rollout)
        self._next, self._rollouts = 0, self._read()

    def __getitem__(self, rollout: int) -> list[Row]:
        """Return this process's prompts of one rollout."""
        if rollout < self._next:
            self._next, self._rollouts = 0, self._read()
        rows = next(islice(self._rollouts, rollout - self._next, None))
        self._next = rollout + 1
        return rows[self.shard]

    def _read(self) -> Iterator[list[Row]]:
        for epoch in count():
            self.dataset.set_epoch(epoch)
            rows, empty = iter(self.dataset), True
            while len(group := list(islice(rows, self.per_rollout))) == self.per_rollout:
                empty = False
                yield group
            if empty:
                raise ValueError(
                    f"train_dataset has fewer than the {self.per_rollout} prompts of one rollout in epoch {epoch} of "
                    "the stream. Add prompts, or lower num_mini_batches, gradient_accumulation_steps or "
                    "per_device_train_batch_size."
                )


def prompt_loader(dataset: Dataset | IterableDataset, args: PPOConfig, accelerator: Accelerator) -> PromptLoader:
    """Create the loader of rollout prompts, with one item per micro-batch of training.

    Args:
        dataset: tokenized prompts. A stream counts as one epoch, whose length `max_steps` or `total_episodes` sets.
        args: sizes and seed.
        accelerator: provides rank and number of processes.
    """
    seed, micro_batches = args.prompt_seed, args.steps_per_rollout * args.gradient_accumulation_steps
    rank_kwargs = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    if isinstance(dataset, IterableDataset):
        stream = PromptStream(dataset, args.prompts_per_rollout, **rank_kwargs)
        rollouts = -(-args.requested_max_steps // args.steps_per_rollout)
        sampler = PromptSampler(rollouts, 1, micro_batches, seed=seed, shuffle=False)
        return PromptLoader(stream, batch_sampler=sampler, collate_fn=_unwrap_single)  # type: ignore[arg-type]
    sampler = PromptSampler(
        len(dataset), args.prompts_per_rollout, micro_batches, seed=seed, shuffle=args.shuffle_dataset, **rank_kwargs
    )
    return PromptLoader(dataset, batch_sampler=sampler, collate_fn=list)


def _unwrap_single(items: list[list[Row]]) -> list[Row]:
    """Return the rows of the rollout in a batch of at most one rollout."""
    return items[0] if items else []

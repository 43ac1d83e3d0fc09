"""Where the prompts of a rollout come from: a dataset by index, in a new order each epoch, or a stream as it comes."""

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
    """Rows of the dataset as they are; the sampler says which micro-batch gets them."""

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the sampler, which Trainer cannot reach by itself."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class PromptStream:
    """The rollouts of a stream, by number: what a map-style dataset is for a `DataLoader`, read forwards.

    Rollout k gets the prompts that stand at its place in the stream, so a resumed run reads on where the step says,
    by reading past what came before. (`IterableDataset.state_dict` would be faster, but it loses the shuffle buffer,
    and with it the same bits.) A stream that ends begins again as its next epoch; as with a dataset, prompts that
    are left over and fill no rollout sit it out.

    Args:
        dataset: tokenized prompts. Its order is taken as it is; `IterableDataset.shuffle` shuffles anew each epoch.
        rollout_batch_size: N per process.
        process_index: which share of each rollout this process takes.
        num_processes: how many share a rollout.
    """

    def __init__(
        self, dataset: IterableDataset, rollout_batch_size: int, *, process_index: int = 0, num_processes: int = 1
    ) -> None:
        self.dataset, self.per_rollout = dataset, rollout_batch_size * num_processes
        self.share = slice(process_index * rollout_batch_size, (process_index + 1) * rollout_batch_size)
        self._next, self._rollouts = 0, self._read()

    def __getitem__(self, rollout: int) -> list[Row]:
        """The prompts of one rollout, N of them."""
        if rollout < self._next:
            self._next, self._rollouts = 0, self._read()
        rows = next(islice(self._rollouts, rollout - self._next, None))
        self._next = rollout + 1
        return rows[self.share]

    def _read(self) -> Iterator[list[Row]]:
        for epoch in count():
            self.dataset.set_epoch(epoch)
            rows, empty = iter(self.dataset), True
            while len(group := list(islice(rows, self.per_rollout))) == self.per_rollout:
                empty = False
                yield group
            if empty:
                raise ValueError(
                    f"train_dataset ended before it gave the {self.per_rollout} prompts of one rollout, in epoch "
                    f"{epoch} of the stream. Add prompts, or take fewer per rollout."
                )


def prompt_loader(dataset: Dataset | IterableDataset, args: PPOConfig, accelerator: Accelerator) -> PromptLoader:
    """Prompts for each rollout; as long as training has micro-batches, so Trainer's arithmetic holds.

    Args:
        dataset: tokenized prompts. A stream is one long epoch: all of training, by `max_steps` or `total_episodes`.
        args: sizes and seed.
        accelerator: knows this process's share.
    """
    seed, micro_batches = args.prompt_seed, args.steps_per_rollout * args.gradient_accumulation_steps
    place = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    if isinstance(dataset, IterableDataset):
        stream = PromptStream(dataset, args.rollout_batch_size, **place)
        rollouts = -(-args.requested_max_steps // args.steps_per_rollout)
        sampler = PromptSampler(rollouts, 1, micro_batches, seed=seed, shuffle=False)
        return PromptLoader(stream, batch_sampler=sampler, collate_fn=_unwrap_single)  # type: ignore[arg-type]
    sampler = PromptSampler(
        len(dataset), args.rollout_batch_size, micro_batches, seed=seed, shuffle=args.shuffle_dataset, **place
    )
    return PromptLoader(dataset, batch_sampler=sampler, collate_fn=list)


def _unwrap_single(items: list[list[Row]]) -> list[Row]:
    """The rows of the one rollout that a micro-batch asked for, or none."""
    return items[0] if items else []

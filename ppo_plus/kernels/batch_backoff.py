"""Batch sizes that shrink where memory does not suffice, and grow back; the result is the same.

The same up to the re-association of sums: what a row becomes does not depend on the rows beside it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from ..utils.interrupt import raise_if_interrupted

Result = TypeVar("Result")

# Errors that have no class of their own: of the driver, cuBLAS, the CPU's allocator and Apple's.
OOM_MESSAGES = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "MPS backend out of memory",
)
PATIENCE = 2  # passes over all rows that must fit before twice as many are tried
MOST_PATIENCE = 64 * PATIENCE


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error reports a lack of memory.

    accelerate's `should_reduce_batch_size` finds neither the driver's error nor cuBLAS's.
    """
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OOM_MESSAGES)


class BatchSize:
    """Rows that are processed at once: halved when memory runs out, doubled again after some passes that fit.

    Memory may have been short for a moment only (another process, one long batch). A size that turns out too large
    again is tried half as often from then on.

    Args:
        most: rows to begin with, and never exceeded.
        patience: passes that must fit before the size is doubled.

    Attributes:
        rows: the current size.
    """

    def __init__(self, most: int, patience: int = PATIENCE) -> None:
        self.rows = self._most = most
        self._first_patience = self._patience = patience
        self._fitted = 0  # passes since the size changed
        self._grown = False  # since the last lack of memory
        self._warned_of = most

    def run(self, order: Tensor, process: Callable[[Tensor], None]) -> None:
        """Process rows, as many at once as fit.

        Args:
            order: rows in the order in which to take them, `(N,)` int64.
            process: called with some rows; it must leave nothing behind where it runs out of memory.
        """
        start = 0

        def process_rest(size: int) -> None:
            nonlocal start
            while start < len(order):
                raise_if_interrupted()
                process(order[start : start + size])
                start += size

        self.retry(len(order), process_rest)

    def retry(self, count: int, attempt: Callable[[int], Result]) -> Result:
        """Return what an attempt returns, with the largest size at which it fits.

        Args:
            count: rows that there are.
            attempt: called with the size; again with a smaller one where it runs out of memory.
        """
        shrunk = False
        while True:
            try:
                result = attempt(self.rows)
            except RuntimeError as error:
                if self.rows == 1 or not is_out_of_memory(error):
                    raise
            else:
                if not shrunk:
                    self._count_fit()
                return result
            # Outside `except` the traceback is gone, and with it the tensors that its frames refer to.
            shrunk = True
            self._shrink(count)

    def _shrink(self, count: int) -> None:
        self.rows = min(self.rows, count) // 2 or 1
        if self._grown:
            self._patience = min(2 * self._patience, max(MOST_PATIENCE, self._first_patience))
        self._fitted, self._grown = 0, False
        if self.rows < self._warned_of:
            self._warned_of = self.rows
            warnings.warn(f"Out of memory: going on with {self.rows} rows at a time instead of more.", stacklevel=4)
        if torch.accelerator.is_available():
            torch.get_device_module().empty_cache()

    def _count_fit(self) -> None:
        self._fitted += 1
        if self._fitted < self._patience:
            return
        self._fitted = 0
        if self.rows < self._most:
            self.rows, self._grown = min(2 * self.rows, self._most), True
        else:
            self._patience, self._grown = self._first_patience, False


@contextlib.contextmanager
def annotate_oom() -> Iterator[None]:
    """Say what to change where several processes learn together, and one that split its work would lose the others."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            error.add_note(
                "Learning on several processes cannot go on with fewer rows: lower per_device_train_batch_size and "
                "raise gradient_accumulation_steps by the same factor, which changes nothing else."
            )
        raise

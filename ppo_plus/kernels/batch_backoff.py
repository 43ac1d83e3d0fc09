"""Batch sizes that shrink after an out-of-memory error and grow back.

No row depends on the other rows of its batch, so results are equal up to the order of sums.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

from ..utils.interrupt import raise_if_interrupted

Result = TypeVar("Result")

# Errors without a class of their own: from the driver, cuBLAS, the CPU's allocator and Apple's.
OOM_MESSAGES = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "MPS backend out of memory",
)
PATIENCE = 2  # passes over all rows that must fit before the batch size is doubled
MAX_PATIENCE = 64 * PATIENCE


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error reports a lack of memory.

    accelerate's `should_reduce_batch_size` recognizes neither the driver's error nor cuBLAS's.
    """
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OOM_MESSAGES)


_sizes_are_fixed = ContextVar("_sizes_are_fixed", default=False)


@contextlib.contextmanager
def fixed_batch_sizes() -> Iterator[None]:
    """Context manager: keep all batch sizes, because other ranks wait for the rest of a pass."""
    token = _sizes_are_fixed.set(True)
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            error.add_note(
                "Ranks that gather weights layer by layer cannot reduce their batch sizes: lower generation_batch_size "
                "or local_rollout_forward_batch_size."
            )
        raise
    finally:
        _sizes_are_fixed.reset(token)


class BatchSize:
    """A batch size that is halved when memory runs out and doubled again after some passes that fit.

    Memory may be short only for a moment (another process, one long batch). A size that fails again after it was
    doubled is tried half as often from then on.

    Args:
        max_rows: the first and largest size.
        patience: passes that must fit before the size is doubled.

    Attributes:
        rows: the current size.
    """

    def __init__(self, max_rows: int, patience: int = PATIENCE) -> None:
        self.rows = self._max_rows = max_rows
        self._first_patience = self._patience = patience
        self._fitted = 0  # passes since the size changed
        self._grown = False  # since the last out-of-memory error
        self._warned_rows = max_rows

    def run(self, order: Tensor, process: Callable[[Tensor], None]) -> None:
        """Process rows in batches that fit in memory.

        Args:
            order: row indices in processing order, `(N,)` int64.
            process: called with a part of them; it must have no effect if it runs out of memory.
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
        """Return the result of an attempt at the largest size that fits.

        Args:
            count: number of all rows.
            attempt: called with the size, and again with a smaller one after an out-of-memory error.
        """
        shrunk = False
        while True:
            try:
                result = attempt(self.rows)
            except RuntimeError as error:
                if self.rows == 1 or _sizes_are_fixed.get() or not is_out_of_memory(error):
                    raise
            else:
                if not shrunk:
                    self._count_fit()
                return result
            # Outside `except`, the traceback and the tensors that its frames reference have been freed.
            shrunk = True
            self._shrink(count)

    def _shrink(self, count: int) -> None:
        self.rows = min(self.rows, count) // 2 or 1
        if self._grown:
            self._patience = min(2 * self._patience, max(MAX_PATIENCE, self._first_patience))
        self._fitted, self._grown = 0, False
        if self.rows < self._warned_rows:
            self._warned_rows = self.rows
            warnings.warn(f"Out of memory: the batch size is reduced to {self.rows} rows.", stacklevel=4)
        if torch.accelerator.is_available():
            torch.get_device_module().empty_cache()

    def _count_fit(self) -> None:
        self._fitted += 1
        if self._fitted < self._patience:
            return
        self._fitted = 0
        if self.rows < self._max_rows:
            self.rows, self._grown = min(2 * self.rows, self._max_rows), True
        else:
            self._patience, self._grown = self._first_patience, False


@contextlib.contextmanager
def annotate_oom() -> Iterator[None]:
    """Add the fix to an out-of-memory error on several processes, which cannot shrink their batches independently."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            error.add_note(
                "On several processes the batch size cannot be reduced during training: lower "
                "per_device_train_batch_size and raise gradient_accumulation_steps by the same factor, which changes "
                "nothing else."
            )
        raise

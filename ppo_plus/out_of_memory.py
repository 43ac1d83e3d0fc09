"""What does not fit into memory at once is done over fewer rows at a time, with the same result.

The same up to the re-association of sums: what a row becomes does not depend on the rows beside it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

# What is not taken from torch's own allocator fails under other names.
UNNAMED = (
    "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory",
    "MPS backend out of memory",
)  # fmt: skip


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory did not suffice: torch's allocator, the driver, or cuBLAS."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in UNNAMED)


def in_chunks(order: Tensor, size: int, run: Callable[[Tensor], None]) -> int:
    """Run over chunks of rows; where memory does not suffice, over smaller ones.

    Args:
        order: rows in the order in which to take them, `(N,)` int64.
        size: rows to begin with.
        run: called with some rows; it must leave nothing behind where it runs out of memory.

    Returns:
        the size that fitted, to begin with next time.
    """
    start = 0
    while start < len(order):
        try:
            run(order[start : start + size])
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        else:
            start += size
            continue
        # Out here the error is gone, and with it the frames that held on to what had been computed.
        size = min(size, len(order)) // 2 or 1
        warnings.warn(f"Out of memory: going on with {size} rows at a time instead of more.", stacklevel=2)
        if torch.accelerator.is_available():
            torch.get_device_module().empty_cache()
    return size


@contextlib.contextmanager
def added_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Add the gradients of the block to those there are, or nothing at all if it fails.

    A backward pass that dies half way has reached some parameters and not others. So it starts from none, and the
    former gradients, put aside rather than copied, are added when it is through: the sum that autograd would form.
    """
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    except BaseException:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
        raise
    for parameter, gradient in zip(parameters, before, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)


@contextlib.contextmanager
def named_memory_error() -> Iterator[None]:
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

"""Bytes of live storages by part, and their peak.

torch's `MemTracker` (`torch.distributed._tools`) is no replacement: its categories lack logits, and a branch on a
tensor without data fails under it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTracker(TorchDispatchMode):
    """Bytes of live tensor storages, by what they hold, and as they stood when their sum was largest.

    It books storages that are made while it is active, of real tensors and of those without data. Where a program
    asks a tensor without data for a truth, the answer is yes: of all rows of a batch, that none has ended yet.

    Args:
        vocabulary: storages whose last dimension is this are booked under "logits".
    """

    def __init__(self, vocabulary: int | None = None) -> None:
        super().__init__()
        self.vocabulary, self.part = vocabulary, "activations"
        self.held: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.earlier: list[Counter[str]] = []
        self._booked: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not has_data(args[0]):
            return True
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._book(tensor)
        if sum(self.held.values()) > sum(self.peak.values()):
            self.peak = self.held.copy()
        return result

    def _book(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._booked:
            return
        logits = self.part == "activations" and tensor.ndim > 0 and tensor.shape[-1] == self.vocabulary
        entry = ("logits" if logits else self.part, storage.nbytes())
        self._booked[storage._cdata] = entry
        self.held[entry[0]] += entry[1]
        weakref.finalize(storage, self._strike, storage._cdata)

    def _strike(self, key: int) -> None:
        part, size = self._booked.pop(key)
        self.held[part] -= size

    @contextlib.contextmanager
    def booking(self, part: str) -> Iterator[None]:
        """Inside, what is made is booked under this part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Book tensors that were made before, of which a view would else count as new."""
        for tensor in tensors:
            self._book(tensor)

    def restart(self) -> None:
        """Let the peak begin again at what is held now."""
        self.peak, self.earlier = self.held.copy(), []

    def mark(self) -> None:
        """Begin a stretch with a peak of its own; the peak so far is the last of `earlier`."""
        self.earlier.append(self.peak)
        self.peak = self.held.copy()


def has_data(tensor: Tensor) -> bool:
    """Whether a tensor has numbers in it, and not only a shape."""
    return not isinstance(tensor, FakeTensor) and tensor.device.type != "meta"

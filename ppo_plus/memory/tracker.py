"""Track the bytes of live storages by category, and their peak.

torch's `MemTracker` (`torch.distributed._tools`) is no replacement: its categories lack logits, and a branch on a
fake tensor fails under it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..utils.contexts import set_attributes


class MemoryTracker(TorchDispatchMode):
    """Bytes of live tensor storages by category, now and at the peak of their sum.

    It tracks storages that are created while it is active, of real and of fake tensors. `bool()` of a fake tensor is
    True ("no row has finished yet").

    Args:
        vocabulary: tensors with this last dimension are in the category "logits".
    """

    def __init__(self, vocabulary: int | None = None) -> None:
        super().__init__()
        self.vocabulary, self._category = vocabulary, "activations"
        self.current: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.previous_peaks: list[Counter[str]] = []
        self._tracked: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not has_data(args[0]):
            return True
        result = func(*args, **(kwargs or {}))
        self.track(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        if sum(self.current.values()) > sum(self.peak.values()):
            self.peak = self.current.copy()
        return result

    def track(self, tensors: Iterable[Tensor]) -> None:
        """Track the storages of tensors; of older tensors too, because a view of them would count as new."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._tracked:
                is_logits = self._category == "activations" and tensor.ndim > 0 and tensor.shape[-1] == self.vocabulary
                category, size = "logits" if is_logits else self._category, storage.nbytes()
                self._tracked[storage._cdata] = category, size
                self.current[category] += size
                weakref.finalize(storage, self._release, storage._cdata)

    def _release(self, key: int) -> None:
        category, size = self._tracked.pop(key)
        self.current[category] -= size

    def category(self, name: str) -> AbstractContextManager:
        """Context manager: storages that are created inside are in this category."""
        return set_attributes(self, _category=name)

    def reset_peak(self) -> None:
        """Set the peak to the current bytes, and forget the peaks of earlier segments."""
        self.peak, self.previous_peaks = self.current.copy(), []

    def start_segment(self) -> None:
        """Append the peak to `previous_peaks`, and start a new one."""
        self.previous_peaks.append(self.peak)
        self.peak = self.current.copy()


def has_data(tensor: Tensor) -> bool:
    """Return whether a tensor has data, and not only a shape."""
    return not isinstance(tensor, FakeTensor) and tensor.device.type != "meta"

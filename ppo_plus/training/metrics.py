"""Means that wait on the device until they are logged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..utils.devices import sum_dtype


class Meter:
    """Running weighted means by name.

    Sums stay tensors on the device, so a training step never waits for the host; reading them synchronizes once
    per log. Two numbers per name make the mean exact over micro-batches and processes of unequal size.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Add `count` observations whose sum is `total`."""
        device = next((x.device for x in (total, count) if isinstance(x, Tensor)), torch.device("cpu"))
        dtype = sum_dtype(device)
        pair = torch.stack([torch.as_tensor(x, dtype=dtype, device=device).detach() for x in (total, count)])
        self._sums[name] = self._sums[name].to(pair) + pair if name in self._sums else pair

    def flush(
        self, reduce: Callable[[Tensor], Tensor] = lambda x: x, union: Callable[[list[str]], list[str]] = sorted
    ) -> dict[str, float]:
        """The means since the last flush.

        Args:
            reduce: sums over processes, for means over all of them.
            union: the names of all processes, in one order; what one has observed, another may not have.
        """
        names = union(list(self._sums))
        if not names:
            return {}
        device = max(
            (pair.device for pair in self._sums.values()), key=lambda d: d.type != "cpu", default=torch.device("cpu")
        )
        nothing = torch.zeros(2, dtype=sum_dtype(device), device=device)
        sums = reduce(torch.stack([self._sums.get(name, nothing).to(nothing) for name in names])).tolist()
        self._sums.clear()
        return {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count}

    @contextlib.contextmanager
    def rollback_on_error(self) -> Iterator[None]:
        """Forget what was added inside the block if the block fails: it will be tried again."""
        before = dict(self._sums)
        try:
            yield
        except BaseException:
            self._sums = before
            raise

    def state_dict(self) -> dict[str, list[float]]:
        """What has not been logged yet, for a checkpoint."""
        return {name: pair.tolist() for name, pair in self._sums.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Go on from a checkpoint."""
        self._sums = {name: torch.tensor(p, dtype=torch.float64) for name, p in state.items()}

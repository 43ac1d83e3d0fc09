"""Means that wait on the device until they are logged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


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
        pair = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device).detach() for x in (total, count)])
        self._sums[name] = self._sums[name].to(device) + pair if name in self._sums else pair

    def flush(self, reduce: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, float]:
        """The means since the last flush, over all processes if `reduce` sums over them."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        device = max((self._sums[n].device for n in names), key=lambda d: d.type != "cpu")
        sums = reduce(torch.stack([self._sums[n].to(device) for n in names])).tolist()
        self._sums.clear()
        return {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count}

    @contextlib.contextmanager
    def unless_error(self) -> Iterator[None]:
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

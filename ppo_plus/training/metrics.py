"""Metrics that accumulate on the device until they are logged, also those that reward functions log."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState

from ..algo import Reduce
from ..utils.devices import sum_dtype

RESERVED_METRICS = (
    "reward", "reward_std", "kl", "entropy", "num_tokens", "loss", "grad_norm", "learning_rate", "win_rate",
)  # fmt: skip
RESERVED_PREFIXES = ("rewards/", "completions/", "ppo/", "clip_ratio/", "critic/", "sampling/", "time/")


class Meter:
    """Running weighted means by name.

    Sums stay on the device, so a training step needs no host sync; a log needs one. The mean is exact over
    micro-batches and ranks of unequal size, because sum and count are kept for each name.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Add `count` observations whose sum is `total`."""
        device = next((x.device for x in (total, count) if isinstance(x, Tensor)), torch.device("cpu"))
        dtype = sum_dtype(device)
        pair = torch.stack([torch.as_tensor(x, dtype=dtype, device=device).detach() for x in (total, count)])
        self._sums[name] = self._sums[name].to(pair) + pair if name in self._sums else pair

    @torch.no_grad()
    def add_token_means(self, mask: Tensor, per_token: dict[str, Tensor]) -> None:
        """Add the values of the tokens in a mask, by name."""
        for name, values in per_token.items():
            self.add(name, (values * mask).sum(), mask.sum())

    def flush(
        self, reduce: Reduce = lambda x: x, all_gather_names: Callable[[list[str]], list[str]] = sorted
    ) -> dict[str, float]:
        """Return the means since the last flush, and reset them; `reduce` sums over ranks.

        A rank may lack a name that another has, so `all_gather_names` returns those of all ranks in one order.
        """
        names = all_gather_names(list(self._sums))
        if not names:
            return {}
        devices = [pair.device for pair in self._sums.values()]
        device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
        zeros = torch.zeros(2, dtype=sum_dtype(device), device=device)
        sums = reduce(torch.stack([self._sums.get(name, zeros).to(zeros) for name in names])).tolist()
        self._sums.clear()
        return {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count}

    @contextlib.contextmanager
    def rollback_on_error(self) -> Iterator[None]:
        """Restore the sums if the block raises, because the caller repeats it."""
        sums_before = dict(self._sums)
        try:
            yield
        except BaseException:
            self._sums = sums_before
            raise

    def state_dict(self) -> dict[str, list[float]]:
        """Return the sums and counts since the last flush, for a checkpoint."""
        return {name: pair.tolist() for name, pair in self._sums.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Load sums and counts from a checkpoint."""
        self._sums = {name: torch.tensor(pair, dtype=torch.float64) for name, pair in state.items()}


def reward_context(state: TrainerState, meter: Meter) -> dict[str, Any]:
    """Return the context of reward functions: the state of Trainer, and `log_metric`, which adds to the meter."""

    def log_metric(name: str, value: Any) -> None:
        if name in RESERVED_METRICS or name.startswith(RESERVED_PREFIXES):
            raise ValueError(f"log_metric({name!r}, ...): that is a metric of PPOTrainer's own. Choose another name.")
        meter.add(name, float(value))

    return {"trainer_state": state, "log_metric": log_metric}

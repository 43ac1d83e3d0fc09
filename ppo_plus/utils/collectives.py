"""Collective operations over the ranks of an `Accelerator`; all ranks call each of them at the same point."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from .devices import sum_dtype

T = TypeVar("T")


class Collectives:
    """Sums, maxima and name lists over all ranks; a single rank communicates nothing."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @property
    def is_alone(self) -> bool:
        """Whether there is one rank only."""
        return self.accelerator.num_processes == 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return bool(self.accelerator.is_main_process)

    def broadcast(self, value: T) -> T:
        """Return rank 0's object."""
        return value if self.is_alone else cast(T, broadcast_object_list([value])[0])

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over ranks; the result is on the tensor's own device."""
        if self.is_alone:
            return tensor
        device = self.accelerator.device
        dtype = sum_dtype(device) if tensor.dtype == torch.float64 else tensor.dtype
        return cast(Tensor, self.accelerator.reduce(tensor.to(device, dtype), "sum")).to(tensor)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return bool(self.sum(torch.tensor(float(flag))))

    def max(self, number: int) -> int:
        """Return the highest number of all ranks."""
        return int(self.all_gather(torch.tensor([number])).max())

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of all ranks, in rank order, on the CPU."""
        return cast(Tensor, self.accelerator.gather(tensor.to(self.accelerator.device))).cpu()

    def all_gather_names(self, names: list[str]) -> list[str]:
        """Return the names that any rank has, sorted."""
        return sorted({*names} if self.is_alone else {*gather_object(names)})

    def count_shared(self, names: list[str]) -> Counter[str]:
        """Count how often each name is on every rank."""
        if self.is_alone:
            return Counter(names)
        return functools.reduce(operator.and_, map(Counter, gather_object([names])))

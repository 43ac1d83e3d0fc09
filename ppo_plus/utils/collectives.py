"""Collective operations over the ranks of an `Accelerator`; all ranks call each of them at the same point."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, distributed

from .devices import sum_dtype

T = TypeVar("T")
LOST_CONNECTION = ("gloo", "Application timeout caused pair closure")
REPORT_SECONDS = 4.0  # within which every rank that is left reports that a collective operation has failed


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

    def all_gather_objects(self, each: T) -> list[T]:
        """Return the objects of all ranks, in rank order."""
        return [each] if self.is_alone else cast(list, gather_object([each]))

    def all_gather_names(self, names: list[str]) -> list[str]:
        """Return the names that any rank has, sorted."""
        return sorted({*names} if self.is_alone else {*gather_object(names)})

    def count_shared(self, names: list[str]) -> Counter[str]:
        """Count how often each name is on every rank."""
        if self.is_alone:
            return Counter(names)
        return functools.reduce(operator.and_, map(Counter, gather_object([names])))

    @contextlib.contextmanager
    def name_lost_ranks(self, advice: Callable[[], str]) -> Iterator[None]:
        """Context manager: add to the error of a collective operation which ranks are lost, and advice."""
        node = os.environ.get("GROUP_RANK", "0")  # torchrun's
        places = self.all_gather_objects(f"node {node}, host {socket.gethostname()}")
        try:
            yield
        except RuntimeError as error:
            if not self.is_alone and _is_lost_connection(error):
                lost = self._lost_ranks()
                names = ", ".join(f"rank {rank} ({places[rank]})" for rank in lost) or "another rank"
                error.add_note(
                    f"Rank {self.accelerator.process_index} has lost {names}: that process has ended, or its node "
                    f"cannot be reached; its own log may tell why. {advice()}"
                )
            raise

    def _lost_ranks(self) -> list[int]:
        """Return the ranks that do not report; rank 0 if its node cannot be reached, where the store is."""
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        lost = [0] if rank else []

        def report() -> None:
            with contextlib.suppress(RuntimeError):
                store = distributed.distributed_c10d._get_default_store()
                store.set(f"ppo_plus/reported/{rank}", "")
                time.sleep(REPORT_SECONDS)
                lost[:] = [other for other in range(size) if not store.check([f"ppo_plus/reported/{other}"])]

        # In a thread, because a store on a lost node may never answer.
        thread = threading.Thread(target=report, daemon=True)
        thread.start()
        thread.join(2 * REPORT_SECONDS)
        return lost


def _is_lost_connection(error: RuntimeError) -> bool:
    # gloo raises a plain RuntimeError.
    return isinstance(error, distributed.DistError) or any(words in str(error) for words in LOST_CONNECTION)

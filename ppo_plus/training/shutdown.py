"""Graceful shutdown: a signal ends training where it can resume."""

from __future__ import annotations

import atexit
import contextlib
import signal
import sys
import threading
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..utils.collectives import Collectives
from ..utils.interrupt import Interrupt

# A service manager on Windows ends a process by SIGBREAK, which other systems do not have.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name))


def _destroy_process_group() -> None:
    # Threads of a process group that is not destroyed may abort the interpreter at exit, and change its exit status.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class GracefulShutdownCallback(TrainerCallback):
    """On SIGTERM or SIGINT, finishes the optimizer step, writes a checkpoint, and ends as the signal would have.

    A second signal ends the process immediately. A step is finished rather than a micro-batch, because a run resumes
    to the same bits only between steps. A rollout, an evaluation and a reward function in it are abandoned
    (`utils/interrupt.py`): a resumed run repeats them. Handlers are installed inside the `with` block.

    All ranks stop after the same step, whichever of them received the signal. A rank that learned of the signal from
    another rank does not count it as its own first signal, because launchers signal ranks one after another.
    """

    def __init__(self, collectives: Collectives | None = None) -> None:
        self.collectives = None if collectives is None or collectives.is_alone else collectives
        self.interrupt = Interrupt()
        self.agreed_signal: int | None = None
        self.start_step = 0
        self._previous_handlers: dict[int, Any] = {}

    @property
    def local_signal(self) -> int | None:
        """The signal that this process received."""
        return self.interrupt.received

    @property
    def interrupted(self) -> bool:
        """Whether a signal ends the run."""
        # Ranks act together, so one that alone has received a signal continues until all know of it.
        return (self.local_signal if self.collectives is None else self.agreed_signal) is not None

    def allow(self) -> AbstractContextManager:
        """Let a signal end the block; several ranks finish it, since the others would wait forever in a collective."""
        return self.interrupt.allow() if self.collectives is None else contextlib.nullcontext()

    def __enter__(self) -> GracefulShutdownCallback:
        self.interrupt.received = self.agreed_signal = None
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
            self._previous_handlers = {s: signal.signal(s, self._receive) for s in SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        self._restore_handlers()
        number = self.local_signal or self.agreed_signal
        self.interrupt.received = self.agreed_signal = None
        if number is not None:
            atexit.register(_destroy_process_group)
            signal.raise_signal(number)  # with the conventional exit status

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Store the step of the resumed checkpoint, which needs no other checkpoint."""
        self.start_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, if any rank received a signal."""
        self.sync_across_ranks()
        if self.agreed_signal is not None:
            control.should_save = control.should_training_stop = True

    def sync_across_ranks(self) -> None:
        """Exchange signals with the other ranks; a barrier."""
        number = self.local_signal or 0
        self.agreed_signal = (number if self.collectives is None else self.collectives.max(number)) or None

    def _receive(self, number: int, frame: Any) -> None:
        if self.local_signal is not None:
            self._restore_handlers()
            signal.raise_signal(number)
        message = f"{signal.Signals(number).name}: finishing this step and saving; send it again to stop immediately."
        with contextlib.suppress(RuntimeError):  # stderr was being written to, which is not reentrant
            print(message, file=sys.stderr, flush=True)
        self.interrupt.receive(number)

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

"""Signals and deferred wishes of callbacks: end or act at a step where a run can be resumed."""

from __future__ import annotations

import atexit
import contextlib
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..utils.interrupt import Interrupt

# A service manager on Windows ends a process by SIGBREAK, which other systems do not have.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name))


def _destroy_process_group() -> None:
    # Threads of a process group that nobody leaves may abort the interpreter at its end, and that is its exit status.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class GracefulShutdownCallback(TrainerCallback):
    """SIGTERM or SIGINT once: finish the optimizer step, write a checkpoint, and end as the signal would have.

    A second one ends the process at once. A step is finished rather than a micro-batch, because only between steps
    is the state one that a run can resume from to the same bits. A rollout or an evaluation is not waited for, nor is
    a reward function in it (`utils/interrupt.py`): a resumed run makes the same once more. Signals are listened to
    inside the `with` block.

    Processes that train together stop together, after the same step, whichever of them the signal reached. One that
    only heard of it has not received it: a launcher that sends it to one after the other sends it once to each.

    Args:
        highest: of a number on each process the highest, called on all of them at the same step.
    """

    def __init__(self, reduce_max: Callable[[int], int] = int) -> None:
        self.reduce_max = reduce_max
        self.interrupt = Interrupt()
        self.agreed_signal: int | None = None
        self.start_step = 0
        self._previous_handlers: dict[int, Any] = {}

    @property
    def received(self) -> int | None:
        """The signal that came to this process."""
        return self.interrupt.received

    def __enter__(self) -> GracefulShutdownCallback:
        self.interrupt.received = self.agreed_signal = None
        if threading.current_thread() is threading.main_thread():  # only there can one listen to signals
            self._previous_handlers = {s: signal.signal(s, self._receive) for s in SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        self._restore_handlers()
        number = self.received or self.agreed_signal
        self.interrupt.received = self.agreed_signal = None
        if number is not None:
            atexit.register(_destroy_process_group)
            signal.raise_signal(number)  # what was put off happens now, with the conventional exit status

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the step that is resumed from: of it there is a checkpoint."""
        self.start_step = state.global_step

    @property
    def came(self) -> bool:
        """Whether a signal ends the run."""
        return self.received is not None or self.agreed_signal is not None

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, if a signal came to any process."""
        self.agree()
        if self.agreed_signal is not None:
            control.should_save = control.should_training_stop = True

    def agree(self) -> None:
        """Tell the other processes of a signal, and hear of theirs; all wait for all."""
        self.agreed_signal = self.reduce_max(self.received or 0) or None

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None:
            self._restore_handlers()
            signal.raise_signal(number)
        name = signal.Signals(number).name
        with contextlib.suppress(RuntimeError):  # it came while stderr was written to, which cannot be entered twice
            print(
                f"{name}: finishing this step and saving; send it again to stop at once.", file=sys.stderr, flush=True
            )
        self.interrupt.receive(number)

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}


class DeferredControlCallback(TrainerCallback):
    """Keeps what callbacks wished for during a rollout (`control.should_save` and the like) until the step after it.

    A rollout comes before its first step begins, and there Trainer forgets what was wished for.
    """

    NAMES = ("should_save", "should_evaluate", "should_log")

    def __init__(self) -> None:
        self._pending: set[str] = set()

    def note(self, control: TrainerControl) -> None:
        """Remember what is wished for now."""
        self._pending |= {name for name in self.NAMES if getattr(control, name)}

    def on_step_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Wish for it again."""
        for name in self._pending:
            setattr(control, name, True)
        self._pending.clear()

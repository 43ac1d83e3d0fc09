"""Control flags that callbacks set (`control.should_save`, ...): on one rank alone, in a rollout or within a step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl

from ..utils.collectives import Collectives

FLAGS = ("should_save", "should_evaluate", "should_log", "should_training_stop", "should_epoch_stop")
STOPS = FLAGS[-2:]


class ControlCallback(TrainerCallback):
    """Lets flags take effect on all ranks, after the optimizer step; it has to be the last callback.

    Logging, evaluating, saving and the next step are collective: a rank that does it alone would wait forever. A
    callback may be on one rank alone, and a time limit is exceeded on one rank first.

    Flags that are set in a rollout or between micro-batches wait for the end of the step: Trainer resets the first
    three at the first micro-batch, and would stop after it with the gradients of a part of the minibatch.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._pending: set[str] = set()

    def capture(self, control: TrainerControl) -> None:
        """Store the flags that are set, and reset those that would stop training within the step."""
        self._pending |= {name for name in FLAGS if getattr(control, name)}
        for name in STOPS:
            setattr(control, name, False)

    def on_substep_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Store flags that were set between two micro-batches."""
        self.capture(control)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Set the stored flags again, and exchange flags."""
        for name in self._pending:
            setattr(control, name, True)
        self._pending.clear()
        self._exchange(control)

    def on_log(self, args: Any, state: Any, control: TrainerControl, logs: dict[str, float], **kwargs: Any) -> None:
        """Exchange flags, if this is the log of a step, which all ranks write."""
        if "loss" in logs:
            self._exchange(control)

    def on_evaluate(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Exchange flags."""
        self._exchange(control)

    on_save = on_epoch_end = on_evaluate

    def _exchange(self, control: TrainerControl) -> None:
        """Set the flags that are set on any rank."""
        flags = torch.tensor([float(getattr(control, name)) for name in FLAGS])
        for name, count in zip(FLAGS, self._collectives.sum(flags).tolist(), strict=True):
            setattr(control, name, count > 0)


class ControlMixin(Trainer):
    """Makes the flags of callbacks those of all ranks, in `PPOTrainer` and `RewardTrainer`."""

    @cached_property
    def collectives(self) -> Collectives:
        """The collective operations over this run's ranks."""
        return Collectives(self.accelerator)

    @cached_property
    def _control_callback(self) -> ControlCallback:
        return ControlCallback(self.collectives)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Return Trainer's batches of one optimizer step."""
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._defer_control()
        return batches

    def _defer_control(self) -> None:
        """Defer flags to the end of this step, also those of callbacks that were added last."""
        handler, last = self.callback_handler, self._control_callback
        handler.callbacks = [*(callback for callback in handler.callbacks if callback is not last), last]
        last.capture(self.control)

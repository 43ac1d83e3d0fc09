"""Trainer's progress bar with the current PPO phase as prefix: `generating 12/64, 210 tokens/s`.

On a terminal there is one bar. If the output is not a terminal (logs, pipes), one line is written per finished phase
instead, also of a reward model. A notebook keeps Trainer's table.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import datasets
import transformers
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ..config import PPOConfig
from .base import PPOCallback


class PPOProgressCallback(ProgressCallback, PPOCallback):
    """Show the current phase, its progress and its tokens per second.

    Generating and scoring count responses, learning counts optimizer steps. The callback reads only the clock and
    host-side numbers, so it causes no host sync.
    """

    def on_train_begin(self, args: PPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Open the bar; without a terminal the bar is disabled and only lines are written."""
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=None)
        self.current_step = 0
        self._tokens_per_step = 0.0  # unknown until a rollout ends, for example when training resumes inside a rollout
        self._begin("")

    def on_rollout_progress(
        self, args: PPOConfig, state: TrainerState, control: TrainerControl, phase: str, done: int, total: int,
        tokens: int, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Update the bar with the progress of a rollout phase."""
        if self.training_bar is not None:
            self._show(state, phase, done, total, tokens)

    def on_rollout_end(
        self, args: PPOConfig, state: TrainerState, control: TrainerControl, rollout: Any, samples: Any,
        metrics: dict[str, float], **kwargs: Any,
    ) -> None:  # fmt: skip
        """Store the mean number of response tokens per optimizer step."""
        self._tokens_per_step = float(rollout.action_mask.sum()) / args.num_mini_batches

    def on_step_begin(self, args: PPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin the learning phase, after a rollout or an evaluation."""
        if self.training_bar is not None and self._phase != "learning":
            self._begin("learning")
            self._first_step = state.global_step
            self._show(state, "learning", state.global_step % args.steps_per_rollout, args.steps_per_rollout)

    def on_step_end(self, args: PPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar by one optimizer step."""
        if self.training_bar is not None:
            done = (state.global_step - 1) % args.steps_per_rollout + 1
            tokens = self._tokens_per_step * (state.global_step - self._first_step)
            self._show(state, "learning", done, args.steps_per_rollout, tokens)
        super().on_step_end(args, state, control, **kwargs)

    def _begin(self, phase: str) -> None:
        self._phase, self._phase_start, self._last_refresh = phase, time.perf_counter(), 0.0

    def _show(self, state: TrainerState, phase: str, done: int, total: int, tokens: float = 0) -> None:
        if phase != self._phase:
            self._begin(phase)
        bar, now = self.training_bar, time.perf_counter()
        seconds, ended = now - self._phase_start, done == total
        text = f"{phase} {done}/{total}" + (f", {tokens / seconds:.0f} tokens/s" if tokens else "")
        if bar.disable:
            if ended:
                bar.write(f"step {state.global_step}/{state.max_steps}: {text}, {seconds:.1f} s")
        elif ended or now - self._last_refresh >= bar.mininterval:
            bar.set_description_str(text)
            self._last_refresh = now


class RewardProgressCallback(ProgressCallback):
    """Trainer's bars of training and evaluation; without a terminal one line at the end of each."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar of training."""
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=None)
        self.current_step, self._train_start = state.global_step, time.perf_counter()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Open the bar of an evaluation at its first batch, and advance it."""
        if state.is_world_process_zero and has_length(eval_dataloader) and self.prediction_bar is None:
            leave = self.training_bar is None
            self.prediction_bar = tqdm(total=len(eval_dataloader), leave=leave, dynamic_ncols=True, disable=None)
            self._prediction_start = time.perf_counter()
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the bar of the evaluation."""
        if (bar := self.prediction_bar) is not None:
            self._write_end(bar, f"evaluating {bar.total}/{bar.total}", self._prediction_start)
        super().on_evaluate(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar of training."""
        if (bar := self.training_bar) is not None:
            self._write_end(bar, f"training {state.global_step}/{state.max_steps}", self._train_start)
        super().on_train_end(args, state, control, **kwargs)

    @staticmethod
    def _write_end(bar: Any, text: str, start: float) -> None:
        if bar.disable:
            bar.write(f"{text}, {time.perf_counter() - start:.1f} s")


def install_progress_bar(trainer: Trainer, callback_class: type[ProgressCallback]) -> None:
    """Replace Trainer's `ProgressCallback`, if installed, with one that a log can be read without."""
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [callback_class() if type(c) is ProgressCallback else c for c in callbacks]


def disable_bars_in_logs() -> None:
    """Switch off the bars of transformers, huggingface_hub and datasets if stderr is not a terminal."""
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()  # huggingface_hub's too
        datasets.disable_progress_bars()

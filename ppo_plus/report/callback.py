"""Callback that writes and updates the report page of a run."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerState

from ..callbacks.base import PPOCallback, RolloutSettings, is_logging_rollout
from ..config import PPOConfig
from ..data.prompts import Row
from ..rollout.vllm_client import EngineError
from ..utils.interrupt import Interrupted
from .curves import MAX_POINTS, curves
from .page import REPORT, read_run, write_page
from .samples import completions_snapshot, token_view

if TYPE_CHECKING:
    from ..rollout.buffer import Rollout
    from ..rollout.experience import Experience

NUM_SNAPSHOTS = 10  # times that the fixed prompts are answered, spread over training, in addition to its end
MAX_ROLLOUTS = 4  # number of most recent rollouts whose tokens are shown
MAX_WRITE_FRACTION = 0.02  # share of time that may be spent on writing pages between evaluations and checkpoints

SETTINGS = (
    "total_episodes", "rollout_batch_size", "num_ppo_epochs", "num_mini_batches", "num_generations", "response_length",
    "temperature",
    "learning_rate", "value_head_learning_rate", "kl_coef", "kl_estimator", "kl_penalty_in", "objective", "cliprange",
    "gamma", "lam", "critic", "seed",
)  # fmt: skip


class RunReportCallback(PPOCallback):
    """Write `report.html` to the output folder: curves, answers to fixed prompts, tokens of rollouts.

    The page is written at each evaluation, at each checkpoint and at the end; at a log only if writing has taken at
    most 2% of the time. Rank 0 generates the answers and writes the page; the other ranks wait. If the page cannot
    be written, training continues with one warning, and writing is tried again.

    Args:
        answer: generates answers to prompts without changing training state; called on all ranks, it returns None on
            all but rank 0.
        prompts: the fixed prompts, a few rows of a tokenized dataset.
        interrupted: returns whether a signal is ending the run, in which case the last answers are skipped.
    """

    def __init__(
        self,
        answer: Callable[[list[Row]], Experience | None],
        prompts: list[Row],
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.answer, self.prompts, self.interrupted = answer, prompts, interrupted
        self.run: dict[str, Any] | None = None
        self._last_write, self._write_seconds = -math.inf, 0.0
        self._write_failed = False
        self._step_seconds: list[float] = []
        self._tokens = 0
        self._step_start = 0.0
        self._seconds: dict[str, float] = {}

    def on_train_begin(self, args: PPOConfig, state: TrainerState, control: Any, model: Any, **kwargs: Any) -> None:
        """Start a report, or continue the existing one from its state at the resumed step."""
        if not state.is_world_process_zero:
            return
        page = Path(str(args.output_dir)) / REPORT
        self.run = {"answers": [], "rollouts": [], "speed": []}
        if state.global_step > 0 and page.is_file():
            try:
                previous = read_run(page)
                # Entries of this step and later steps will be collected again.
                self.run = {kind: [e for e in previous[kind] if e["step"] < state.global_step] for kind in self.run}
            except (OSError, ValueError, KeyError, TypeError) as error:
                warnings.warn(f"The report starts empty at step {state.global_step}: {error}", stacklevel=2)
        self.run["name"] = Path(str(args.output_dir)).resolve().name
        base = model.language_model
        settings = {
            "model": Path(base.config._name_or_path).name or type(base).__name__,
            **{name: getattr(args, name) for name in SETTINGS},
        }
        self.run["settings"] = {name: value for name, value in settings.items() if value is not None}
        self._tokens, self._step_seconds, self._write_failed = 0, [], False

    def on_rollout_begin(
        self, args: PPOConfig, state: TrainerState, control: Any, settings: RolloutSettings, **kwargs: Any
    ) -> None:
        """Answer the fixed prompts before `NUM_SNAPSHOTS` rollouts; a signal may interrupt it."""
        if is_logging_rollout(args, state, NUM_SNAPSHOTS):
            with contextlib.suppress(EngineError):  # the rollout fails next, on all ranks
                self._answer(state)

    def on_rollout_end(
        self, args: PPOConfig, state: TrainerState, control: Any, rollout: Rollout, samples: Experience,
        metrics: dict[str, float], processing_class: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Store the tokens of the rollout."""
        if self.run is None:
            return
        step = state.global_step
        view = token_view(rollout, samples, processing_class, args, kl_coef=metrics["ppo/kl_coef"], step=step)
        self.run["rollouts"] = [*self.run["rollouts"], view][-MAX_ROLLOUTS:]
        self._tokens, self._seconds, self._step_seconds = int(rollout.action_mask.sum()), samples.seconds, []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Record the start time of the optimizer step."""
        self._step_start = time.perf_counter()

    def on_step_end(self, args: PPOConfig, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Store the speed of each phase after the last optimizer step of a rollout."""
        self._step_seconds.append(time.perf_counter() - self._step_start)
        if self.run is None or len(self._step_seconds) != args.steps_per_rollout or not self._tokens:
            return
        seconds = {**self._seconds, "learn": sum(self._step_seconds) / args.num_ppo_epochs}
        speed = {phase: self._tokens / max(s, 1e-9) for phase, s in seconds.items()}
        self.run["speed"].append({"step": state.global_step - 1, **{f"speed/{p}": s for p, s in speed.items()}})
        if len(self.run["speed"]) > 2 * MAX_POINTS:
            del self.run["speed"][::2]

    def on_log(self, args: PPOConfig, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the page if enough time has passed since the last write."""
        if time.perf_counter() - self._last_write > self._write_seconds / MAX_WRITE_FRACTION:
            self._write(args, state)

    def on_evaluate(self, args: PPOConfig, state: TrainerState, control: Any, *a: Any, **kwargs: Any) -> None:
        """Write the page after an evaluation."""
        self._write(args, state)

    def on_save(self, args: PPOConfig, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the page after a checkpoint."""
        self._write(args, state)

    def on_train_end(self, args: PPOConfig, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Answer the fixed prompts a last time and write the page."""
        if not self.interrupted():
            with contextlib.suppress(Interrupted, EngineError):  # training is complete: only these answers are skipped
                self._answer(state)
        self._write(args, state)

    def _answer(self, state: TrainerState) -> None:
        samples = self.answer(self.prompts)
        if self.run is not None and samples is not None:
            self.run["answers"].append(completions_snapshot(samples, state.global_step))

    def _write(self, args: PPOConfig, state: TrainerState) -> None:
        if self.run is None:  # not rank 0, or evaluation without training
            return
        started = time.perf_counter()
        history = curves([*state.log_history, *self.run["speed"]])
        run = {**self.run, "step": state.global_step, "max_steps": state.max_steps, "curves": history}
        page = Path(str(args.output_dir)) / REPORT
        try:
            write_page(page, [run])
            self._write_failed = False
        except OSError as error:
            if not self._write_failed:
                warnings.warn(
                    f"The run report {page} could not be written ({error}). Training continues and writes the complete "
                    "report at the next log, evaluation or checkpoint; free disk space or check the permissions.",
                    stacklevel=2,
                )
            self._write_failed = True
        self._last_write = time.perf_counter()
        self._write_seconds = self._last_write - started

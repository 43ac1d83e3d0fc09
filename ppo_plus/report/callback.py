"""The callback that keeps the page of a run up to date."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import TrainerState

from ..callbacks.base import PPOCallback, RolloutSettings, is_logging_rollout
from ..config import PPOConfig
from ..utils.interrupt import Interrupted
from .curves import POINTS, curves
from .page import REPORT, read_run, write_page
from .samples import answers, token_view

if TYPE_CHECKING:
    from ..rollout.buffer import Rollout
    from ..rollout.collector import Experience

NUM_SNAPSHOTS = 10  # at which the fixed prompts are answered, spread over training, besides its end
ROLLOUTS = 4  # the last ones, whose tokens are shown
WRITING = 0.02  # share of the time that may be spent writing pages between evaluations and checkpoints

SETTINGS = (
    "total_episodes", "rollout_batch_size", "num_ppo_epochs", "num_mini_batches", "response_length", "temperature",
    "learning_rate", "value_head_learning_rate", "kl_coef", "kl_estimator", "kl_penalty_in", "objective", "cliprange",
    "gamma", "lam", "critic", "seed",
)  # fmt: skip


class RunReportCallback(PPOCallback):
    """Keeps `report.html` in the output folder up to date: curves, answers to fixed prompts, tokens of rollouts.

    The page is written at each evaluation, checkpoint and at the end; at a log only if pages have taken no more than
    2% of the time. Process 0 writes it and answers the prompts, so on several processes the others wait for that. A
    page that cannot be written does not end the run: that is said once, and tried again.

    Args:
        answer: answers prompts, `PPOTrainer._generate_on_main_process`; training must not notice.
        prompts: the fixed prompts, a few rows of a tokenized dataset.
        interrupted: whether a signal ends the run, which then does not wait for the last answers.
    """

    def __init__(
        self,
        answer: Callable[[Dataset], Experience],
        prompts: Dataset,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.answer, self.prompts, self.interrupted = answer, prompts, interrupted
        self.run: dict[str, Any] | None = None
        self._written, self._took = -math.inf, 0.0
        self._failing = False
        self._learning: list[float] = []
        self._tokens = 0
        self._began = 0.0
        self._seconds: dict[str, float] = {}

    def on_train_begin(self, args: PPOConfig, state: TrainerState, control: Any, model: Any, **kwargs: Any) -> None:
        """Start a report, or go on with the one that is there, as it was at the step that is resumed."""
        if not state.is_world_process_zero:
            return
        page = Path(str(args.output_dir)) / REPORT
        self.run = {"answers": [], "rollouts": [], "speed": []}
        if state.global_step > 0 and page.is_file():
            try:
                before = read_run(page)
                # What was collected at this very step or later will be collected again.
                self.run = {kind: [e for e in before[kind] if e["step"] < state.global_step] for kind in self.run}
            except (OSError, ValueError, KeyError, TypeError) as error:
                warnings.warn(f"The report starts anew at step {state.global_step}: {error}", stacklevel=2)
        self.run["name"] = Path(str(args.output_dir)).resolve().name
        base = model.language_model
        settings = {
            "model": Path(base.config._name_or_path).name or type(base).__name__,
            **{name: getattr(args, name) for name in SETTINGS},
        }
        self.run["settings"] = {name: value for name, value in settings.items() if value is not None}
        self._tokens, self._learning, self._failing = 0, [], False

    def on_rollout_begin(
        self, args: PPOConfig, state: TrainerState, control: Any, settings: RolloutSettings, **kwargs: Any
    ) -> None:
        """Answer the fixed prompts at a few moments of training; a signal ends it, with no rollout half done."""
        if self.run is not None and is_logging_rollout(args, state, NUM_SNAPSHOTS):
            self.run["answers"].append(answers(self.answer(self.prompts), state.global_step))

    def on_rollout_end(
        self, args: PPOConfig, state: TrainerState, control: Any, rollout: Rollout, samples: Experience,
        metrics: dict[str, float], processing_class: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Keep the tokens of the rollout."""
        if self.run is None:
            return
        step = state.global_step
        view = token_view(rollout, samples, processing_class, args, kl_coef=metrics["ppo/kl_coef"], step=step)
        self.run["rollouts"] = [*self.run["rollouts"], view][-ROLLOUTS:]
        self._tokens, self._seconds, self._learning = int(rollout.action_mask.sum()), samples.seconds, []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Time the learning."""
        self._began = time.perf_counter()

    def on_step_end(self, args: PPOConfig, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """When a rollout has been learned from, note how fast each phase was."""
        self._learning.append(time.perf_counter() - self._began)
        if self.run is None or len(self._learning) != args.steps_per_rollout or not self._tokens:
            return
        seconds = {**self._seconds, "learn": sum(self._learning) / args.num_ppo_epochs}
        speed = {phase: self._tokens / max(s, 1e-9) for phase, s in seconds.items()}
        self.run["speed"].append({"step": state.global_step - 1, **{f"speed/{p}": s for p, s in speed.items()}})
        if len(self.run["speed"]) > 2 * POINTS:
            del self.run["speed"][::2]

    def on_log(self, args: PPOConfig, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the page, unless that was done only just now."""
        if time.perf_counter() - self._written > self._took / WRITING:
            self._write(args, state)

    def on_evaluate(self, args: PPOConfig, state: TrainerState, control: Any, *a: Any, **kwargs: Any) -> None:
        """Write the page."""
        self._write(args, state)

    def on_save(self, args: PPOConfig, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the page."""
        self._write(args, state)

    def on_train_end(self, args: PPOConfig, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Answer the fixed prompts for the last time and write the page."""
        if self.run is not None and not self.interrupted():
            with contextlib.suppress(Interrupted):  # the run is over: nothing is left to give up but these answers
                self.run["answers"].append(answers(self.answer(self.prompts), state.global_step))
        self._write(args, state)

    def _write(self, args: PPOConfig, state: TrainerState) -> None:
        if self.run is None:  # not process 0, or evaluation without training
            return
        started = time.perf_counter()
        history = curves([*state.log_history, *self.run["speed"]])
        run = {**self.run, "step": state.global_step, "max_steps": state.max_steps, "curves": history}
        page = Path(str(args.output_dir)) / REPORT
        try:
            write_page(page, [run])
            self._failing = False
        except OSError as error:
            if not self._failing:
                warnings.warn(
                    f"The run report {page} could not be written ({error}): the curves, answers and tokens since the "
                    "last page are in none. Training goes on and tries again; the next page has everything in it.",
                    stacklevel=2,
                )
            self._failing = True
        self._written = time.perf_counter()
        self._took = self._written - started

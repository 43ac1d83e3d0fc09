"""How training ends and begins again: checkpoints that are whole or not there, and signals that are heard in between.

What a checkpoint holds is in `checkpoint.py`; here is when `Trainer` writes and reads it.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import warnings
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..config import PPOConfig
from ..models.actor_critic import ActorCritic
from ..models.adapters import lora_scalings
from ..rollout.collector import RolloutCollector
from ..utils.devices import generator_state, set_generator_state
from ..utils.interrupt import Interrupted
from .checkpoint import (
    MUTABLE_BETWEEN_ROLLOUTS,
    PPOState,
    check_checkpoint,
    find_last_valid_checkpoint,
    integrity_error,
    load_progress,
    rotate,
    save_progress,
    stale_checkpoints,
    weights_digest,
    write_atomically,
    write_manifest,
)
from .hub import HubMixin, save_training_args_json
from .shutdown import GracefulShutdownCallback


class ResumeMixin(HubMixin, Trainer):
    """Checkpoints of `PPOTrainer`, from which a run goes on to the same bits."""

    args: PPOConfig
    model: ActorCritic
    processing_class: PreTrainedTokenizerBase
    collector: RolloutCollector
    _interrupt: GracefulShutdownCallback
    _progress: PPOState

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trainer's `train`; `resume_from_checkpoint=True` means the newest checkpoint that is whole.

        A damaged newer one is named and skipped. If there is none at all, training starts at the beginning, so that
        a script that is restarted by a supervisor needs no case of its own for the first start; nor for the last:
        a run that had ended ends at once.
        """
        if isinstance(resume_from_checkpoint, Path):
            resume_from_checkpoint = str(resume_from_checkpoint)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = find_last_valid_checkpoint(cast(str, self.args.output_dir))
            if resume_from_checkpoint is None:
                warnings.warn(f"No whole checkpoint in {self.args.output_dir}: training starts anew.", stacklevel=2)
        elif isinstance(resume_from_checkpoint, str):
            check_checkpoint(resume_from_checkpoint)
        if not resume_from_checkpoint:
            self._progress = PPOState(kl_coef=self.args.kl_coef, baseline=self._progress.baseline)
        self._warn_stale_checkpoints(resume_from_checkpoint or None)
        with self._interrupt:
            try:
                output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            except Interrupted:
                return self._finish_interrupted(trial)
            self._interrupt.agree()  # none leaves before the others have saved
            # It came after the last step. On several processes all know of it, or none: they save together.
            if self._interrupt.agreed_signal is not None and not self.args.load_best_model_at_end:
                self._save_last_step(trial)
            return output

    def _warn_stale_checkpoints(self, resumed: str | None) -> None:
        state = None if resumed is None else TrainerState.load_from_json(str(Path(resumed) / TRAINER_STATE_NAME))
        begins = 0 if state is None else state.global_step
        others = stale_checkpoints(cast(str, self.args.output_dir), begins)
        if others and self.is_world_process_zero():
            warnings.warn(
                f"{self.args.output_dir} has checkpoints of another run beyond step {begins}, where this one begins, "
                f"up to {others[-1].name}. They are left as they are, and resume_from_checkpoint=True would take them "
                "for this run's: choose another output_dir, or delete them.",
                stacklevel=3,
            )

    def _finish_interrupted(self, trial: Any) -> TrainOutput:
        self._save_last_step(trial)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, math.nan, {})

    def _save_last_step(self, trial: Any) -> None:
        step = self.state.global_step
        saved = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if step > self._interrupt.start_step and self._any_rank(integrity_error(saved) is not None):
            self._save_checkpoint(self.model_wrapped, trial)

    def _allow_interrupt(self) -> AbstractContextManager:
        """Let a signal end the block; on several processes it is finished, since the others would wait forever."""
        alone = self.accelerator.num_processes == 1
        return self._interrupt.interrupt.allow() if alone else contextlib.nullcontext()

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        due, self._progress.evaluation_pending = (
            self._progress.evaluation_pending,
            True,
        )  # until it is made, or a signal comes
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        self._progress.evaluation_pending = due and skip_scheduler  # that of eval_on_start is another one
        return metrics

    def _run_pending_evaluation(self) -> None:
        """Evaluate as Trainer would have after the last step before a checkpoint, had no signal come."""
        metrics = self._evaluate(None, None)
        saved = Path(self._get_output_dir(trial=None)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self._determine_best_metric(metrics, None) and saved.is_dir():
            self.state.best_model_checkpoint = str(saved)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        directory = cast(str, output_dir or self.args.output_dir)
        self.accelerator.unwrap_model(self.model).save_pretrained(directory)
        self.processing_class.save_pretrained(directory)
        save_training_args_json(self.args, directory)

    def _save_rng_state(self, output_dir: str) -> None:
        # Trainer calls this where it saves the rest of what a resumed run needs.
        super()._save_rng_state(output_dir)
        inside = self.state.global_step % self.args.steps_per_rollout != 0
        self._progress.generator = generator_state()
        save_progress(output_dir, self.accelerator.process_index, self._progress, self._fingerprint(), inside)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's, and the generator of an accelerator that Trainer leaves out."""
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self._progress.generator is not None:
            set_generator_state(self._progress.generator)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A callback that the resumed checkpoint did not know has no entry for Trainer to fill.
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                cast(dict, self.state.stateful_callbacks).setdefault(type(callback).__name__, {})
        run_dir = self._get_output_dir(trial=trial)
        directory = Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(directory, ignore_errors=True)  # left over from a run that was killed while it wrote
        self.accelerator.wait_for_everyone()
        best = self.state.best_model_checkpoint
        # Trainer would push it, and delete the one before, while this one has no manifest yet.
        limit, push = self.args.save_total_limit, self.args.push_to_hub
        self.args.save_total_limit, self.args.push_to_hub = None, False
        write, finish = partial(super()._save_checkpoint, model, trial), partial(write_manifest, directory)
        try:
            written = write_atomically(
                directory,
                [write, finish if self.args.should_save else lambda: None],  # as many everywhere: they are counted
                self.args.on_save_error,
                self._any_rank,
            )
        finally:
            self.args.save_total_limit, self.args.push_to_hub = limit, push
        if not written:
            self.state.best_model_checkpoint = best
            return
        if push:
            self._push_from_checkpoint(str(directory))  # on every process: they wait for each other in it
        if self.args.should_save:
            rotate(directory, self.state.global_step, limit, self.state.best_model_checkpoint)

    def _all_reduce_max(self, number: int) -> int:
        return int(self.accelerator.gather(torch.tensor([number], device=self.args.device)).max())

    def _any_rank(self, failed: bool) -> bool:
        return bool(self.collector.reduce(torch.tensor(float(failed))))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        progress = load_progress(resume_from_checkpoint, self.accelerator.process_index, self._fingerprint())
        self.model.load_weights(resume_from_checkpoint)
        self._progress = progress

    def _load_callback_state(self) -> None:
        """Trainer's; each callback keeps its place, for scores go through them in their order."""
        handler = self.callback_handler
        before = list(handler.callbacks)
        super()._load_callback_state()
        restored = [callback for callback in handler.callbacks if callback not in before]
        for place, callback in enumerate(before):
            if callback not in handler.callbacks:
                found = next(other for other in restored if type(other) is type(callback))
                restored.remove(found)
                before[place] = found
                _warn_restored_arguments(callback, found)
        handler.callbacks = before

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # With save_strategy="best" this alone decides what is saved, and a signal asks for a checkpoint.
        return super()._determine_best_metric(metrics, trial) or self._interrupt.agreed_signal is not None

    def _load_best_model(self) -> None:
        self.model.load_weights(self.state.best_model_checkpoint)

    def _fingerprint(self) -> dict[str, Any]:
        """What must be equal for a checkpoint's steps to mean the same in this run."""
        sizes = ("num_ppo_epochs", "num_mini_batches", "rollout_batch_size", "response_length")
        names = (*sizes, "critic", "seed", "data_seed", *MUTABLE_BETWEEN_ROLLOUTS)
        return {
            **{name: getattr(self.args, name) for name in names},
            "num_processes": self.accelerator.num_processes,
            "num_prompts": len(self.train_dataset) if isinstance(self.train_dataset, Dataset) else None,
            "adapter_scaling": lora_scalings(self.model.policy),
            "base_weights": weights_digest(self.model.frozen_models),
        }


def _warn_restored_arguments(given: Any, restored: Any) -> None:
    here, there = given.state()["args"], restored.state()["args"]
    if here != there:
        warnings.warn(
            f"{type(given).__name__} goes on with the options of the checkpoint, {there}, and not with {here}. To "
            "change them, set restore_callback_states_from_checkpoint=False: then it starts anew.",
            stacklevel=2,
        )

"""Write and read the checkpoints of a `PPOTrainer` when `Trainer` does; `checkpoint.py` defines their content."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..data.padding import pad_id
from ..models.adapters import lora_scalings
from ..rollout.vllm_client import EngineError
from ..utils.contexts import set_attributes
from ..utils.devices import generator_state, set_generator_state
from ..utils.interrupt import Interrupted
from .checkpoint import (
    MUTABLE_BETWEEN_ROLLOUTS,
    PPOState,
    Rank,
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

if TYPE_CHECKING:
    from ..trainer import PPOTrainer


class Checkpointer:
    """Writes, finds and loads checkpoints, from which a run continues to the same bits."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self._trainer = trainer
        self._rank = Rank(trainer.accelerator.process_index, trainer.accelerator.num_processes)
        self._base_digest = weights_digest(trainer.model.frozen_models)  # now, because it reads whole weights

    def start(self, resume_from_checkpoint: str | Path | bool | None) -> str | None:
        """Return the checkpoint to resume from; reset the state of PPO if there is none."""
        trainer, checkpoint, error = self._trainer, None, None
        try:
            checkpoint = self._find(resume_from_checkpoint)
        except ValueError as failure:  # raised once the other ranks know of it, since they would wait
            error = failure
        self._check_same_checkpoint("an error" if error else Path(checkpoint).name if checkpoint else "none", error)
        if checkpoint is None:
            trainer._progress = PPOState(kl_coef=trainer.args.kl_coef, baseline=trainer._progress.baseline)
        self._warn_stale_checkpoints(checkpoint)
        return checkpoint

    def _find(self, resume_from_checkpoint: str | Path | bool | None) -> str | None:
        output_dir = cast(str, self._trainer.args.output_dir)
        if resume_from_checkpoint is True:
            checkpoint = find_last_valid_checkpoint(output_dir)
            if checkpoint is None:
                warnings.warn(f"No valid checkpoint in {output_dir}: training starts from the beginning.", stacklevel=4)
            return checkpoint
        if isinstance(resume_from_checkpoint, str | Path):
            check_checkpoint(str(resume_from_checkpoint))
            return str(resume_from_checkpoint)
        return None

    def _check_same_checkpoint(self, name: str, error: ValueError | None) -> None:
        """Refuse ranks that would resume from different checkpoints, of which some would wait for others."""
        names = self._trainer.collectives.all_gather_objects(name)
        if error is not None:
            raise error
        if len({*names}) > 1:
            raise ValueError(
                f"The processes would resume from different checkpoints: {', '.join(names)}, by rank. All nodes must "
                "see the same output_dir; if each has a disk of its own, train with save_on_each_node=True from the "
                "start, and delete newer checkpoints that only some nodes have."
            )

    def run(self, train: Callable[[], TrainOutput], trial: Any) -> TrainOutput:
        """Train until the end, a signal, or a failure of the engine; after these two, save the last step."""
        trainer, shutdown = self._trainer, self._trainer._shutdown
        with shutdown, trainer.collectives.name_lost_ranks(self._advice):
            try:
                output = train()
            except Interrupted:
                self._save_last_step(trial)
                trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
                return TrainOutput(trainer.state.global_step, math.nan, {})
            except EngineError as error:
                self._save_last_step(trial)
                raise EngineError(
                    f"{error} Training stopped at step {trainer.state.global_step}. Restart the server, and continue "
                    "with train(resume_from_checkpoint=True)."
                ) from error
            shutdown.sync_across_ranks()  # no rank leaves before all have saved
            # The signal came after the last step; all ranks agree on it, so they save together.
            if shutdown.agreed_signal is not None and not trainer.args.load_best_model_at_end:
                self._save_last_step(trial)
            return output

    def _advice(self) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            last = find_last_valid_checkpoint(cast(str, self._trainer.args.output_dir))
        state = "there is no valid checkpoint yet" if last is None else f"the last valid checkpoint is {last}"
        return f"Start all processes again with resume_from_checkpoint=True; {state}."

    def save(self, write: Callable[[], None], trial: Any) -> None:
        """Write a checkpoint atomically with Trainer's `_save_checkpoint`, then push it and delete old ones."""
        trainer, args, state = self._trainer, self._trainer.args, self._trainer.state
        # Trainer has no entry to fill for a callback that the resumed checkpoint does not contain.
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                cast(dict, state.stateful_callbacks).setdefault(type(callback).__name__, {})
        directory = self.directory(trial)
        if args.should_save:
            shutil.rmtree(directory, ignore_errors=True)  # left by a run that was killed while it wrote
        trainer.accelerator.wait_for_everyone()
        best = state.best_model_checkpoint
        # Trainer would push this checkpoint, and delete the one before, before the manifest is written.
        with set_attributes(args, save_total_limit=None, push_to_hub=False):
            # Every rank has as many steps.
            finish = partial(write_manifest, directory) if args.should_save else lambda: None
            written = write_atomically(directory, [write, finish], args.on_save_error, trainer.collectives.any)
        if not written:
            state.best_model_checkpoint = best
            return
        if args.push_to_hub:
            trainer._push_from_checkpoint(str(directory))  # on every rank: it has a barrier
        if args.should_save:
            rotate(directory, state.global_step, args.save_total_limit, state.best_model_checkpoint)

    def save_state(self, output_dir: str) -> None:
        """Write the state of PPO into a checkpoint."""
        trainer, progress = self._trainer, self._trainer._progress
        inside_rollout = trainer.state.global_step % trainer.args.steps_per_rollout != 0
        progress.generator = generator_state()
        save_progress(output_dir, self._rank, progress, self._fingerprint(), inside_rollout)

    def load(self, directory: str) -> None:
        """Load the state of PPO and the weights from a checkpoint."""
        trainer = self._trainer
        progress = load_progress(directory, self._rank, self._fingerprint(), pad_id(trainer.processing_class))
        trainer.model.load_weights(directory)
        trainer._progress = progress

    def restore_generator(self, checkpoint: str | None) -> None:
        """Restore the state of a device generator that Trainer does not save."""
        state = self._trainer._progress.generator
        if checkpoint is not None and state is not None:
            set_generator_state(state)

    def restore_callbacks(self, load: Callable[[], None]) -> None:
        """Restore the order of callbacks, in which they change rewards; Trainer's `load` appends restored ones."""
        handler = self._trainer.callback_handler
        callbacks = list(handler.callbacks)
        load()
        restored = [callback for callback in handler.callbacks if callback not in callbacks]
        for index, callback in enumerate(callbacks):
            if callback not in handler.callbacks:
                callbacks[index] = next(other for other in restored if type(other) is type(callback))
                restored.remove(callbacks[index])
                _warn_restored_arguments(callback, callbacks[index])
        handler.callbacks = callbacks

    def directory(self, trial: Any = None) -> Path:
        """Return the folder of this step's checkpoint."""
        trainer = self._trainer
        return Path(trainer._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"

    def _save_last_step(self, trial: Any) -> None:
        trainer = self._trainer
        unsaved = integrity_error(self.directory(trial)) is not None
        if trainer.state.global_step > trainer._shutdown.start_step and trainer.collectives.any(unsaved):
            trainer._save_checkpoint(trainer.model_wrapped, trial)

    def _warn_stale_checkpoints(self, checkpoint: str | None) -> None:
        output_dir = cast(str, self._trainer.args.output_dir)
        file = None if checkpoint is None else str(Path(checkpoint) / TRAINER_STATE_NAME)
        start_step = 0 if file is None else TrainerState.load_from_json(file).global_step
        stale = stale_checkpoints(output_dir, start_step)
        if stale and self._trainer.is_world_process_zero():
            warnings.warn(
                f"{output_dir} has checkpoints of another run beyond step {start_step}, where this one begins, up to "
                f"{stale[-1].name}. They are not deleted, and resume_from_checkpoint=True would resume from them: "
                "choose another output_dir, or delete them.",
                stacklevel=4,
            )

    def _fingerprint(self) -> dict[str, Any]:
        """Return the values that must be equal in a checkpoint and in the run that resumes from it."""
        trainer = self._trainer
        sizes = ("num_ppo_epochs", "num_mini_batches", "num_generations", "response_length")
        names = (*sizes, "critic", "num_critic_updates", "seed", "data_seed", *MUTABLE_BETWEEN_ROLLOUTS)
        return {
            **{name: getattr(trainer.args, name) for name in names},
            "responses_per_rollout": trainer.args.rollout_batch_size * self._rank.count,
            "num_prompts": len(trainer.train_dataset) if isinstance(trainer.train_dataset, Dataset) else None,
            "adapter_scaling": lora_scalings(trainer.model.policy),
            "base_weights": self._base_digest,
        }


def _warn_restored_arguments(current: Any, restored: Any) -> None:
    current_args, saved_args = current.state()["args"], restored.state()["args"]
    if current_args != saved_args:
        warnings.warn(
            f"{type(current).__name__} uses the options of the checkpoint, {saved_args}, and not {current_args}. To "
            "change them, set restore_callback_states_from_checkpoint=False, which also resets its state.",
            stacklevel=2,
        )

"""Gradients of an optimizer step: accumulated over fewer rows where memory is short, skipped where not finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..data.seeding import isolated_rng
from ..kernels.batch_backoff import PATIENCE, BatchSize
from ..rollout.buffer import Rollout
from ..utils.contexts import set_attributes
from .checkpoint import find_last_valid_checkpoint
from .metrics import Meter

if TYPE_CHECKING:
    from ..trainer import PPOTrainer


class GradientAccumulator:
    """Accumulates the gradients of a step, over fewer rows per pass if a micro-batch does not fit into memory.

    The loss divides by the tokens of the minibatch, so the parts add up to the same gradient. A backward pass that ran
    out of memory has added gradients to some parameters only. A copy of the gradients before it would double their
    memory, so they are dropped and the micro-batches of the step run again. The size is not saved in checkpoints,
    because a resumed run may have more memory. `micro_step` is Trainer's `training_step`.
    """

    def __init__(self, trainer: PPOTrainer, micro_step: Callable[..., Tensor]) -> None:
        self._trainer, self._micro_step = trainer, micro_step
        micro_batches = trainer.args.steps_per_rollout * trainer.args.gradient_accumulation_steps
        self.max_rows_per_pass = BatchSize(trainer.args.rollout_batch_size, PATIENCE * micro_batches)
        self._accumulated: list[dict[str, Any]] = []  # micro-batches of this step whose gradients are accumulated

    def start_step(self) -> None:
        """Drop the micro-batches of the previous step."""
        self._accumulated.clear()

    def add(self, model: nn.Module, inputs: dict[str, Any], tokens: Tensor | int) -> Tensor:
        """Add the gradients of a micro-batch, whose loss divides by the minibatch's tokens; return the loss."""
        sizes: list[int] = []

        def attempt(size: int) -> Tensor:
            if sizes:
                self._restart(model, tokens, size)
            sizes.append(size)
            with self._trainer._progress.meter.rollback_on_error():
                return self._run(model, inputs, tokens, size)

        loss = self.max_rows_per_pass.retry(len(inputs["action_mask"]), attempt)
        self._accumulated.append(inputs)
        return loss

    def _run(self, model: nn.Module, inputs: dict[str, Any], tokens: Tensor | int, size: int) -> Tensor:
        parts = torch.arange(len(inputs["action_mask"])).split(size)
        micro_batches = [inputs] if len(parts) == 1 else (index_batch(inputs, rows) for rows in parts)
        return torch.stack([self._micro_step(model, part, tokens) for part in micro_batches]).sum()

    def _restart(self, model: nn.Module, tokens: Tensor | int, size: int) -> None:
        """Repeat the micro-batches before the one that ran out of memory, without counting their metrics again."""
        model.zero_grad(set_to_none=True)
        with set_attributes(self._trainer._progress, meter=Meter()):
            for inputs in self._accumulated:
                self._run(model, inputs, tokens, size)


class NonfiniteGradientGuard:
    """Skips optimizer steps whose gradients are not finite, and ends a run after too many in a row."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self._trainer = trainer

    def check(self, model: nn.Module, *norms: Any) -> None:
        """Drop all gradients if a norm is not finite; an optimizer skips parameters without gradients."""
        if all(math.isfinite(float(norm)) for norm in norms):
            self._trainer._progress.skipped = 0
            return
        model.zero_grad(set_to_none=True)
        self._trainer._progress.meter.add("ppo/skipped_steps", 1.0)
        scaler = self._trainer.accelerator.scaler
        if scaler is None or scaler.get_scale() <= 1:  # fp16: most likely the loss scale is too high, and is halved
            self._count_skipped_step()

    def _count_skipped_step(self) -> None:
        trainer, progress = self._trainer, self._trainer._progress
        progress.skipped += 1
        rollout, rows = cast(Rollout, progress.rollout), trainer._rollouts.minibatch_rows.tolist()
        rows = [row for row in rows if not self._has_finite_gradient(rollout, row)] or rows
        texts = trainer.processing_class.batch_decode(rollout.input_ids[rows[:2]], skip_special_tokens=True)
        step = trainer.state.global_step
        message = f"Step {step} has gradients that are not finite and is skipped; its responses: {texts!r}"
        if progress.skipped >= trainer.args.max_skipped_steps:
            last = find_last_valid_checkpoint(cast(str, trainer.args.output_dir))
            raise RuntimeError(
                f"{message}. That makes {progress.skipped} steps in a row (max_skipped_steps): lower the learning rate "
                f"or check the rewards. The last valid checkpoint is {last}."
            )
        warnings.warn(message, stacklevel=2)

    def _has_finite_gradient(self, rollout: Rollout, row: int) -> bool:
        """Compute the gradient of one row without changing gradients, metrics or generators."""
        trainer = self._trainer
        inputs = trainer._prepare_inputs(rollout.micro_batch(torch.tensor([row])))
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        unmetered = set_attributes(trainer._progress, meter=Meter())
        with isolated_rng(0), trainer.compute_loss_context_manager(), unmetered:
            gradients = torch.autograd.grad(trainer.compute_loss(trainer.model, inputs), parameters, allow_unused=True)
        return all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)


def index_batch(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Return these rows of a micro-batch."""
    return {
        name: values[rows] if isinstance(values, Tensor) else [values[row] for row in rows.tolist()]
        for name, values in inputs.items()
    }

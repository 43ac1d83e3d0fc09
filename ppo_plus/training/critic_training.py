"""Training of the critic alone: pretraining, further updates per actor update, and weights of an earlier run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..config import PPOConfig, copy_arguments
from ..data.seeding import derive_seed, isolated_rng
from ..integrations.trl_legacy import check_same_baseline
from ..models.adapters import CRITIC_ADAPTER
from ..models.saving import VALUE_MODEL, load_critic
from ..models.value_head import VALUE_HEAD_FILE
from ..models.weight_checks import first_not_finite
from ..rollout.buffer import Rollout
from ..utils.contexts import set_attributes
from ..utils.files import read_json_object
from .hub import ARGUMENTS_FILE
from .metrics import Meter

if TYPE_CHECKING:
    from ..trainer import PPOTrainer


class CriticTraining:
    """Decides when the critic is trained alone, and makes its further updates.

    Value pretraining (VC-PPO, 2503.01491; SAO, 2607.07508) is the warm-up of the critic with Monte Carlo targets: its
    rollouts come from the start policy, which no step changes. They are new samples of one distribution, so the
    explained variance of a rollout that the critic has not been trained on shows when pretraining is done.
    """

    def __init__(self, trainer: PPOTrainer) -> None:
        self._trainer, self._updates_alone = trainer, False
        if (folder := trainer.args.critic_checkpoint) is not None:
            check_same_baseline(trainer.model, Path(folder))
            load_critic(trainer.model, Path(folder))
            if parameter := first_not_finite(trainer.model):
                raise ValueError(
                    f"critic_checkpoint={str(folder)!r}: {parameter} has NaN or infinite numbers. Its training "
                    "diverged, or the file is damaged: use another checkpoint."
                )

    @property
    def is_pretraining(self) -> bool:
        """Whether the actor's training has not begun."""
        args, trainer = self._trainer.args, self._trainer
        return trainer.state.global_step < args.critic_warmup_steps and not trainer._progress.actor_started

    @property
    def is_alone(self) -> bool:
        """Whether a pass trains the critic only."""
        return self._updates_alone or self.is_pretraining

    def rollout_arguments(self) -> PPOConfig:
        """Return the arguments of a rollout, with Monte Carlo targets in pretraining up to an explained variance."""
        args = self._trainer.args
        if args.critic_warmup_explained_variance is None or not self.is_pretraining:
            return args
        args = copy_arguments(args)
        args.lam_value = 1.0
        return args

    def begin_rollout(self, rollout: Rollout) -> None:
        """End pretraining if the critic explains enough of a rollout that it has not been trained on."""
        bound = self._trainer.args.critic_warmup_explained_variance
        if bound is not None and cast(Tensor, rollout.explained_variance).item() > bound:
            self._trainer._progress.actor_started = True

    def update_alone(self, micro_batches: list[dict[str, Any]], tokens: Tensor) -> None:
        """Make the critic's further updates on a minibatch, before the step that trains actor and critic.

        Several critic updates per actor update (SAO, 2607.07508, section 3.2: two). Only the critic's own weights get
        gradients, and the optimizer skips parameters without: the actor's moments, the schedule and the count of steps
        do not change. Dropout is seeded by the step, because a resumed run restores its generator after this. The
        paper leaves open which data the further updates see: here it is the minibatch of the step. Second-hand: it was
        read in issue 7100 of verl, pull request 19 of NeMo's labs-molt, and the documentation of EasyDeL's SAO trainer.
        """
        trainer = self._trainer
        for index in range(trainer.args.num_critic_updates - 1):
            step, rank = trainer.state.global_step, trainer.accelerator.process_index
            with isolated_rng(derive_seed(trainer.args.seed, "critic update", step, index, rank)), self._alone():
                for inputs in micro_batches:
                    trainer.training_step(trainer.model_wrapped, inputs, tokens)
                self._step()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Train the critic only, without metrics, inside the block; no gradient is left after it."""
        trainer = self._trainer
        try:
            with set_attributes(trainer._progress, meter=Meter()), set_attributes(self, _updates_alone=True):
                yield
        finally:
            trainer._accumulator.start_step()
            trainer.model.zero_grad(set_to_none=True)

    def _step(self) -> None:
        trainer, (_, critic) = self._trainer, self._trainer._trainable_parameters
        trainer.accelerator.gradient_state._set_sync_gradients(True)  # else accelerate would ignore the step
        trainer.accelerator.unscale_gradients()
        norm = nn.utils.clip_grad_norm_(critic, trainer.args.max_grad_norm or float("inf"))
        # A scaler skips a step that is not finite itself, and expects the call; the step that follows is counted, see
        # NonfiniteGradientGuard.
        if trainer.accelerator.scaler is not None or torch.isfinite(norm):
            trainer.optimizer.step()


def check_critic_training(args: PPOConfig, critic: str) -> None:
    """Refuse further updates of a critic without a backbone, and a `critic_checkpoint` without this kind of critic."""
    if args.num_critic_updates > 1 and critic not in ("adapter", "separate"):
        raise ValueError(
            f"num_critic_updates={args.num_critic_updates} needs a critic whose weights are its own, and critic="
            f"{critic!r} reads the actor: set critic='adapter', pass a value_model, or remove it."
        )
    if args.critic_checkpoint is None:
        return
    folder = Path(args.critic_checkpoint)
    needed = {"adapter": CRITIC_ADAPTER, "separate": VALUE_MODEL}.get(critic)
    missing = [name for name in (VALUE_HEAD_FILE, needed) if name is not None and not (folder / name).exists()]
    if missing:
        raise ValueError(
            f"critic_checkpoint={args.critic_checkpoint!r} has no {' and no '.join(missing)}. Pass a checkpoint, or "
            f"the folder of save_model, of a run with critic={critic!r}."
        )
    file = folder / ARGUMENTS_FILE
    baseline = read_json_object(file).get("advantage_baseline", "none") if file.exists() else args.advantage_baseline
    if baseline != args.advantage_baseline:
        raise ValueError(
            f"critic_checkpoint={args.critic_checkpoint!r} is of a run with advantage_baseline={baseline!r}, and this "
            f"one has {args.advantage_baseline!r}: its values would be wrong by the mean return. Set "
            f"advantage_baseline={baseline!r}, or take another critic."
        )

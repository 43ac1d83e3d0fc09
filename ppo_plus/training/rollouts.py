"""The rollout phase of a `PPOTrainer`: from prompts to advantages, with the events of callbacks, and minibatches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .. import algo
from ..callbacks.base import PPOCallback, RolloutSettings, hears_scores
from ..config import PPOConfig
from ..data.batching import micro_batch_indices, minibatch_indices
from ..data.prompts import Row
from ..data.seeding import derive_seed, isolated_rng
from ..rewards import CheapAnswers, usable_scores
from ..rollout.advantages import build_rollout
from ..rollout.buffer import Rollout
from ..rollout.experience import Experience
from ..rollout.phases import PhaseTimer
from ..utils.interrupt import raise_if_interrupted
from .losses import positive_example_weights
from .metrics import Meter, reward_context

if TYPE_CHECKING:
    from ..trainer import PPOTrainer


class RolloutPhase:
    """Collects the rollouts of a trainer, and divides them into minibatches and micro-batches."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self._trainer = trainer
        self._settings = RolloutSettings(kl_coef=trainer.args.kl_coef)
        self._cheap_answers: CheapAnswers | None = None  # of the first rollout
        self.minibatch_rows: Tensor  # row indices of the current minibatch, ascending

    def are_finished(self) -> bool:
        """Return whether a resumed run has ended, after a pending evaluation; Trainer would continue it for a step."""
        trainer = self._trainer
        evaluated = trainer._evaluator.run_pending()
        if trainer.state.global_step >= trainer.state.max_steps or (evaluated and trainer.control.should_training_stop):
            trainer.control.should_training_stop = True
            return True
        return False

    def generate_and_score(self, prompts: list[Row], rollout_index: int) -> Experience:
        """Generate responses, score them, and compute log-probabilities and values with actor, critic and reference."""
        trainer = self._trainer
        if not prompts:
            raise RuntimeError(
                "An epoch was ended inside a rollout (control.should_epoch_stop), and the next one's first prompts "
                "were passed over. End it at a step that is a multiple of num_ppo_epochs * num_mini_batches = "
                f"{trainer.args.steps_per_rollout}, or training as a whole: control.should_training_stop."
            )
        is_due = rollout_index == 0 and trainer.collector.rewards.calls_functions
        is_due = is_due and not trainer.agent.scores_need_rollout  # those answers have no environment
        self._cheap_answers = self._ask_about_cheap_answers(prompts) if is_due else None
        self._settings = RolloutSettings(kl_coef=trainer.args.kl_coef)
        self.call_event("on_rollout_begin", settings=self._settings)
        self._check_kl_coef()
        answers, meter = trainer.args.num_generations, trainer._progress.meter
        rows = [prompt for prompt in prompts for _ in range(answers)]
        first = trainer.accelerator.process_index * len(rows)
        seeding = (range(first, first + len(rows)), ("rollout", rollout_index))
        context = reward_context(trainer.state, meter)
        micro_batch_fn = partial(self.scoring_micro_batches, rollout_index)
        # An interrupted rollout is repeated, so metrics that reward functions logged in it must not count twice.
        with trainer._shutdown.allow(), meter.rollback_on_error():
            samples = trainer.collector.sample_seeded(rows, *seeding, context, micro_batch_fn=micro_batch_fn)
        self._warn_of_cheap_answers(samples.rewards)
        return samples

    def compute_advantages(self, samples: Experience) -> Rollout:
        """Compute advantages and returns from the scores after callbacks, and log the metrics of the rollout."""
        trainer, progress, reduce = self._trainer, self._trainer._progress, self._trainer.collectives.sum
        timer, kl_coef = PhaseTimer(), self._settings.kl_coef
        scores = samples.scores.clone()
        self._call_rewards_computed(scores, samples.token_rewards)
        scores = usable_scores(scores, samples.completions.prompts)
        args = trainer._critic_training.rollout_arguments()
        rollout = build_rollout(samples, scores, kl_coef, args, reduce, progress.baseline)
        trainer._critic_training.begin_rollout(rollout)
        trainer.model.reward_line = None if samples.prefix_scores is None else progress.baseline.line()
        metrics: dict[str, Any] = samples.metrics(trainer.collector.rewards.names, reduce)
        timer.record("advantages")
        progress.num_tokens += int(reduce(samples.num_tokens()))
        explained = algo.explained_variance(rollout.values, rollout.returns, rollout.action_mask, reduce=reduce)
        metrics |= {
            **({} if self._cheap_answers is None else self._cheap_answers.metrics()),
            "num_tokens": progress.num_tokens,
            "ppo/kl_coef": kl_coef,
            "critic/explained_variance": explained.item(),
            **critic_metrics(rollout, trainer.args),
            **{f"time/{phase}": seconds for phase, seconds in (samples.seconds | timer.seconds).items()},
        }
        self.call_event("on_rollout_end", rollout=rollout, samples=samples, metrics=metrics)
        for name, value in metrics.items():
            if not math.isnan(value):  # a mean over no scores is NaN
                progress.meter.add(name, value)
        progress.kl_coef = kl_coef
        return rollout

    def micro_batches(self, rollout_index: int, step: int) -> tuple[list[dict[str, Any]], Tensor]:
        """Return the micro-batches of a step of the current rollout, and their response tokens over all ranks."""
        args, rollout = self._trainer.args, self._current(rollout_index)
        ppo_epoch, minibatch = divmod(step, args.num_mini_batches)
        self.minibatch_rows = rows = self._minibatches(len(rollout), rollout_index, ppo_epoch)[minibatch]
        parts = self._micro_batch_rows(rows, rollout.lengths())
        reduce, mask = self._trainer.collectives.sum, rollout.action_mask[rows]
        tokens = reduce(mask.sum()).clamp(min=1)
        micro_batches = [rollout.micro_batch(indices, args.num_generations) for indices in parts]
        if weight := args.positive_example_nll_weight:
            weights = torch.zeros(len(rollout), 1)
            weights[rows] = positive_example_weights(rollout.sequence_scores[rows], mask, weight, reduce)
            for inputs, indices in zip(micro_batches, parts, strict=True):
                inputs["nll_weights"] = weights[indices]
        return micro_batches, tokens

    def scoring_micro_batches(self, rollout_index: int, lengths: Tensor) -> list[Tensor]:
        """Return the row indices of the micro-batches of the first PPO epoch."""
        minibatches = self._minibatches(len(lengths), rollout_index, 0)
        return [part for rows in minibatches for part in self._micro_batch_rows(rows, lengths)]

    def _check_kl_coef(self) -> None:
        """Refuse a coefficient that a callback on some ranks alone has changed."""
        coefs = self._trainer.collectives.all_gather(torch.tensor([self._settings.kl_coef]))
        if not torch.allclose(coefs, coefs[0], rtol=1e-4, atol=0.0, equal_nan=True):
            raise ValueError(
                f"Processes have different KL coefficients, {[float(f'{coef:.4g}') for coef in coefs]}: a callback "
                "changed settings.kl_coef on some of them only. Install it on every process."
            )

    def _ask_about_cheap_answers(self, prompts: list[Row]) -> CheapAnswers:
        """Score answers that take no work, without changing metrics or generators."""
        trainer = self._trainer
        seed = derive_seed(trainer.args.seed, "cheap answers", trainer.accelerator.process_index)
        with trainer._shutdown.allow(), isolated_rng(seed):
            return trainer.collector.ask_about_cheap_answers(prompts, reward_context(trainer.state, Meter()))

    def _warn_of_cheap_answers(self, rewards: Tensor) -> None:
        if self._cheap_answers is None:
            return
        warning = self._cheap_answers.warning(self._trainer.collectives.all_gather(rewards))
        if warning is not None and self._trainer.is_world_process_zero():
            warnings.warn(warning, stacklevel=2)

    def _current(self, rollout_index: int) -> Rollout:
        trainer, rollout = self._trainer, self._trainer._progress.rollout
        if rollout is None:
            raise RuntimeError(
                f"Training resumes at step {trainer.state.global_step}, inside rollout {rollout_index}, but the "
                "checkpoint holds no rollout (was it saved with save_only_model?). Resume from a checkpoint whose "
                f"step is a multiple of {trainer.args.steps_per_rollout}."
            )
        if rollout.frozen_hidden_states is None and trainer.model.num_cached_layers:  # resumed from a checkpoint
            micro_batches = self.scoring_micro_batches(rollout_index, rollout.lengths())
            with trainer._shutdown.allow():
                rollout = trainer._progress.rollout = trainer.collector.recompute_frozen_states(rollout, micro_batches)
        return rollout

    def _minibatches(self, n: int, rollout_index: int, ppo_epoch: int) -> list[Tensor]:
        args, rank = self._trainer.args, self._trainer.accelerator.process_index
        position = {"seed": args.seed, "rollout_index": rollout_index, "ppo_epoch": ppo_epoch, "process_index": rank}
        return minibatch_indices(n, args.num_mini_batches, num_generations=args.num_generations, **position)

    def _micro_batch_rows(self, rows: Tensor, lengths: Tensor) -> list[Tensor]:
        args = self._trainer.args
        return micro_batch_indices(rows, lengths, args.per_device_train_batch_size, args.num_generations)

    def on_progress(self, phase: str, done: int, total: int, tokens: int) -> None:
        """Call `on_rollout_progress`, and end the rollout if a signal allows it."""
        self.call_event("on_rollout_progress", phase=phase, done=done, total=total, tokens=tokens)
        raise_if_interrupted()

    def call_event(self, event: str, callbacks: list[PPOCallback] | None = None, **kwargs: Any) -> None:
        """Call an event of these `PPOCallback`s or of all, as Trainer's callback handler calls its own events."""
        trainer = self._trainer
        kwargs |= {"model": trainer.model, "processing_class": trainer.processing_class}
        for callback in callbacks or self._callbacks():
            getattr(callback, event)(trainer.args, trainer.state, trainer.control, **kwargs)

    def _call_rewards_computed(self, scores: Tensor, token_rewards: Tensor) -> None:
        # Ranks may have different callbacks, and a gather waits for all ranks: there is one before the first callback,
        # and one after each callback that every rank has.
        collectives, event = self._trainer.collectives, "on_rewards_computed"
        callbacks = [callback for callback in self._callbacks() if hears_scores(callback)]
        shared = collectives.count_shared([type(callback).__name__ for callback in callbacks])
        gathered = collectives.all_gather(scores)
        changed = []
        for callback in callbacks:
            kwargs = {"scores": scores, "token_rewards": token_rewards, "gathered_scores": gathered.clone()}
            before = scores.clone(), token_rewards.clone()
            self.call_event(event, [callback], **kwargs)
            name = type(callback).__name__
            if shared[name]:
                shared[name] -= 1
                gathered = collectives.all_gather(scores)
            elif not all(map(_is_unchanged, before, (scores, token_rewards))):
                changed.append(name)
        if changed := collectives.all_gather_names(changed):
            raise ValueError(
                f"{', '.join(changed)} changed the scores of some processes only, so processes would learn from "
                "different rewards: install the callback on every process."
            )

    def _callbacks(self) -> Iterator[PPOCallback]:
        # Looked up each time, because Trainer replaces stateful callbacks when it resumes.
        return (c for c in self._trainer.callback_handler.callbacks if isinstance(c, PPOCallback))


def _is_unchanged(before: Tensor, after: Tensor) -> bool:
    return torch.allclose(before, after, rtol=0.0, atol=0.0, equal_nan=True)


def critic_metrics(rollout: Rollout, args: PPOConfig) -> dict[str, float]:
    """Return how well the values predict Monte Carlo returns, and whether the batch mean replaced them."""
    explained = cast(Tensor, rollout.explained_variance).item()
    gate = {"critic/gated": float(explained <= 0)} if args.critic_gate else {}
    return {"critic/explained_variance_mc": explained, **gate}

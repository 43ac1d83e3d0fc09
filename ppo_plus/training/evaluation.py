"""Evaluation: a rollout without learning, win rates against the reference, and completions as a table."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.trainer_utils import PredictionOutput

from ..data.prompts import Row
from ..data.seeding import isolated_rng
from ..rewards import Completions
from ..rollout.experience import Experience, moments
from .metrics import Meter, reward_context
from .setup import tokenize_and_validate
from .validation import named_datasets

if TYPE_CHECKING:
    from ..trainer import PPOTrainer

SEED_KEY = ("evaluation",)  # the same for all evaluations, so that they differ by the policy alone


class Evaluator:
    """Evaluates a `PPOTrainer`: samples and scores responses as in a rollout, without learning."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self._trainer = trainer
        self.reference_cache: dict[str, Completions] = {}  # the reference's responses by fingerprint of the dataset

    def evaluate(self, eval_dataset: Dataset | dict[str, Dataset] | str | None, prefix: str) -> dict[str, float]:
        """Evaluate, log, and call `on_evaluate`, for each dataset; return the metrics of all."""
        trainer = self._trainer
        dataset = eval_dataset if eval_dataset is not None else trainer.eval_dataset
        if isinstance(dataset, str):  # one of several, as Trainer takes it
            dataset = cast(dict, trainer.eval_dataset)[dataset]
        if dataset is None:
            raise ValueError("evaluate() needs prompts: pass eval_dataset here or to PPOTrainer.")
        several = isinstance(dataset, dict)
        parts = {f"{prefix}_{name}": part for name, part in dataset.items()} if several else {prefix: dataset}
        # All are evaluated before one is logged, so an interrupted evaluation logs nothing that a resumed run repeats.
        # An evaluation that the user calls is not interrupted.
        pending = trainer._progress.evaluation_pending
        with trainer._shutdown.allow() if pending else contextlib.nullcontext():
            evaluated = [self._evaluate_dataset(part, name) for name, part in parts.items()]
        everything: dict[str, float] = {}
        for samples, metrics in evaluated:
            trainer.log(logged := {name: value for name, value in metrics.items() if not math.isnan(value)})
            everything |= metrics | logged  # with the epoch
            trainer.control = trainer.callback_handler.on_evaluate(
                trainer.args, trainer.state, trainer.control, metrics | logged, samples=samples
            )
        return everything

    def predict(self, dataset: Dataset, prefix: str) -> PredictionOutput:
        """Return the completions of all ranks and their metrics, without logging."""
        trainer = self._trainer
        samples, metrics = self._evaluate_dataset(dataset, prefix)
        trainer.callback_handler.on_predict(trainer.args, trainer.state, trainer.control, metrics)
        predictions = gather_completions(samples.completions.completion_ids)
        return PredictionOutput(predictions=predictions, label_ids=None, metrics=metrics)

    def generate(self, dataset: Dataset | None, meter: Meter) -> Experience | None:
        """Sample and score this rank's share of the prompts; without prompts, warn and return None.

        The prompts are `eval_dataset` by default; the meter receives the metrics that reward functions log.
        """
        prompts = dataset if dataset is not None else self._trainer.eval_dataset
        if prompts is None:  # TRL's scripts end in this call, with an `eval_dataset` or without
            warnings.warn("generate_completions() has no prompts to answer: pass them, or eval_dataset.", stacklevel=3)
            return None
        if not isinstance(prompts, Dataset):
            raise ValueError("generate_completions() needs one dataset of prompts: pass it here or as eval_dataset.")
        return self._sample(*self._shard_for_rank(prompts), meter)

    def generate_on_main_process(self, prompts: list[Row]) -> Experience | None:
        """Sample responses to tokenized prompts on rank 0; None on the others, which gather sharded weights too.

        Reward functions score them only if `report_rewards`.
        """
        score = self._trainer.args.report_rewards or not self._trainer.collector.rewards.calls_functions
        with self._trainer._shutdown.allow(), self._trainer.collector.uneven_passes():
            if not self._trainer.is_world_process_zero():
                return None
            return self._sample(prompts, range(len(prompts)), Meter(), score=score, on_all_ranks=False)

    @contextlib.contextmanager
    def pending(self, on_start: bool) -> Iterator[None]:
        """Mark an evaluation as pending until the block ends, so that a resumed run repeats an interrupted one.

        The evaluation of `eval_on_start` leaves another one pending.
        """
        progress = self._trainer._progress
        pending_before, progress.evaluation_pending = progress.evaluation_pending, True
        yield
        progress.evaluation_pending = pending_before and on_start

    def run_pending(self) -> bool:
        """Run the evaluation that was interrupted after the last step, if any; return whether one was pending."""
        trainer = self._trainer
        if not trainer._progress.evaluation_pending:
            return False
        metrics = trainer._evaluate(None, None)
        checkpoint = trainer._checkpointer.directory()
        if trainer._determine_best_metric(metrics, None) and checkpoint.is_dir():
            trainer.state.best_model_checkpoint = str(checkpoint)
        return True

    def _evaluate_dataset(self, dataset: Dataset, prefix: str) -> tuple[Experience, dict[str, float]]:
        trainer, collectives, meter = self._trainer, self._trainer.collectives, Meter()
        samples = cast(Experience, self.generate(dataset, meter))
        metrics = samples.metrics(trainer.collector.rewards.names, collectives.sum)
        metrics |= meter.flush(collectives.sum, collectives.all_gather_names)
        if collectives.any(len(samples.failed) > 0):
            metrics["reward"] = metrics["reward_std"] = math.nan  # the other functions' sum is another quantity
        if trainer.args.eval_win_rate:
            metrics["win_rate"] = self._win_rate(samples, dataset)
        return samples, {f"{prefix}_{name}": value for name, value in metrics.items()}

    @torch.no_grad()
    def _win_rate(self, samples: Experience, dataset: Dataset) -> float:
        """Return the share of prompts, over all ranks, whose response scores above the reference's; a tie is one half.

        Both are sampled with the same uniforms. The reference's responses are scored each time, because a reward
        function may change during training; metrics that it logs for them are dropped.
        """
        collector, fingerprint = self._trainer.collector, dataset._fingerprint
        prompts, rows = self._shard_for_rank(dataset)
        uniforms, seed = collector.derive_uniforms(rows, SEED_KEY)
        context = {"trainer_state": self._trainer.state, "log_metric": _ignore, "log_extra": _ignore}
        with isolated_rng(seed), collector.uneven_passes():
            if fingerprint not in self.reference_cache:
                self.reference_cache[fingerprint] = collector.generate_from_reference(prompts, uniforms)
            with collector.accelerator.autocast():
                reference_scores = collector.rewards(replace(self.reference_cache[fingerprint], context=context)).total
        wins = (samples.scores > reference_scores).float() + 0.5 * (samples.scores == reference_scores)
        wins = wins.masked_fill((samples.scores + reference_scores).isnan(), torch.nan)
        return moments(wins, self._trainer.collectives.sum)[0]

    def _shard_for_rank(self, dataset: Dataset) -> tuple[list[Row], range]:
        """Return the prompts of this rank, and their indices among those of all ranks."""
        trainer, ranks = self._trainer, self._trainer.accelerator.num_processes
        known = (trainer.train_dataset, *named_datasets(trainer.eval_dataset).values())
        if not any(dataset is each for each in known) or "input_ids" not in dataset.column_names:
            dataset = tokenize_and_validate(dataset, "the dataset to evaluate on", trainer)
        if len(dataset) < ranks:  # every rank raises, so none waits for another
            raise ValueError(
                f"An evaluation needs a prompt for each of the {ranks} processes, and there are {len(dataset)}. Add "
                "prompts, or start fewer processes."
            )
        rows = range(trainer.accelerator.process_index, len(dataset), ranks)
        return [dataset[i] for i in rows], rows

    def _sample(self, prompts: list[Row], rows: range, meter: Meter, **options: bool) -> Experience:
        context = reward_context(self._trainer.state, meter)
        return self._trainer.collector.sample_seeded(prompts, rows, SEED_KEY, context, **options)


def _ignore(name: str, value: Any) -> None:
    """Log nothing."""


def gather_completions(ids: list[list[int]]) -> np.ndarray:
    """Return the completions of all ranks in the order of their prompts, `(N, R)` int64, right-padded with -100.

    Each of W ranks has every W-th prompt, from its index on.
    """
    shards = gather_object([ids])
    ordered = [shard[i] for i in range(len(shards[0])) for shard in shards if i < len(shard)]
    table = np.full((len(ordered), max(map(len, ordered))), -100, dtype=np.int64)
    for row, completion in enumerate(ordered):
        table[row, : len(completion)] = completion
    return table

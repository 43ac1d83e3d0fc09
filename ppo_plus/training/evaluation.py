"""Evaluation: a rollout that nothing is learned from, the reference's answers beside it, and answers as a table."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import PredictionOutput

from ..config import PPOConfig
from ..data.prompts import Row, tokenize_datasets, validate_prompts
from ..data.seeding import isolated_rng
from ..models.actor_critic import ActorCritic
from ..rewards import Completions
from ..rollout.collector import Experience, RolloutCollector
from .checkpoint import PPOState
from .metrics import Meter
from .validation import named_datasets


class EvaluationMixin(Trainer):
    """Evaluation and prediction of `PPOTrainer`: prompts are answered as in a rollout, and nothing is learned."""

    args: PPOConfig
    model: ActorCritic
    processing_class: PreTrainedTokenizerBase
    collector: RolloutCollector
    control: Any
    _progress: PPOState
    _win_rate: WinRate
    _allow_interrupt: Any
    _generate_and_score: Any
    _sampling_uniforms: Any

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Answer the evaluation prompts and report reward, KL to the reference and lengths.

        The same seed every time, so two evaluations differ by the policy alone; training does not notice. Where a
        reward function failed (`on_reward_error="skip"`) the reward is NaN: it is no best model's.
        """
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(dataset, str):  # one of several, as Trainer takes it
            dataset = cast(dict, self.eval_dataset)[dataset]
        if dataset is None:
            raise ValueError("evaluate() needs prompts: pass eval_dataset here or to PPOTrainer.")
        parts = {metric_key_prefix: dataset}
        if isinstance(dataset, dict):
            parts = {f"{metric_key_prefix}_{name}": part for name, part in dataset.items()}
        # All are answered before one is reported: a signal in between leaves nothing to be reported twice.
        # An evaluation that the user asks for is made to its end.
        with self._allow_interrupt() if self._progress.evaluation_pending else contextlib.nullcontext():
            evaluated = [self._evaluate_dataset(part, prefix) for prefix, part in parts.items()]
        everything: dict[str, float] = {}
        for samples, metrics in evaluated:
            self.log(logged := {name: value for name, value in metrics.items() if not math.isnan(value)})
            everything |= metrics | logged  # with the epoch
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics | logged, samples=samples
            )
        return everything

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Answer prompts, and report what `evaluate` does without logging it.

        Returns:
            `predictions`: token ids of the answers in the order of the prompts, `(N, R)` int64, filled up with -100;
            `metrics`: as of `evaluate`; `label_ids`: None.
        """
        samples, metrics = self._evaluate_dataset(test_dataset, metric_key_prefix)
        self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        answers = gather_completions(samples.completions.completion_ids)
        return PredictionOutput(predictions=answers, label_ids=None, metrics=metrics)

    def _evaluate_dataset(self, dataset: Dataset, prefix: str) -> tuple[Experience, dict[str, float]]:
        meter = Meter()
        samples = cast(Experience, self.generate_completions(dataset, meter))
        metrics = {**self.collector.metrics(samples), **meter.flush(self.collector.reduce, self.collector.union)}
        if self.collector.reduce(torch.tensor(float(len(samples.failed)))) > 0:
            metrics["reward"] = metrics["reward_std"] = math.nan  # of the others alone it is another quantity
        if self.args.eval_win_rate:
            rows, share = self._shard_for_rank(dataset)
            noise, seed = self._sampling_uniforms(share, ("evaluation",))
            metrics["win_rate"] = self._win_rate(samples, rows, noise, seed, dataset._fingerprint, self.state)
        return samples, {f"{prefix}_{name}": value for name, value in metrics.items()}

    def generate_completions(self, dataset: Dataset | None = None, meter: Meter | None = None) -> Experience | None:
        """Answer prompts and score the answers, without logging; each process answers its share.

        Args:
            dataset: prompts; `eval_dataset` by default.
            meter: takes what reward functions log.

        Returns:
            texts, tokens, scores, log-probabilities and values; the same for the same policy every time. None, with a
            warning, where there are no prompts: TRL's scripts end in this call, with an `eval_dataset` or without.
        """
        prompts = dataset if dataset is not None else self.eval_dataset
        if prompts is None:
            warnings.warn("generate_completions() has no prompts to answer: pass them, or eval_dataset.", stacklevel=2)
            return None
        if not isinstance(prompts, Dataset):
            raise ValueError("generate_completions() needs one dataset of prompts: pass it here or as eval_dataset.")
        position = ("evaluation",)
        return self._generate_and_score(*self._shard_for_rank(prompts), position, meter or Meter())

    def _shard_for_rank(self, prompts: Dataset) -> tuple[list[Row], range]:
        """The prompts that this process answers in an evaluation, and their numbers among those of all processes."""
        own = any(prompts is dataset for dataset in (self.train_dataset, *named_datasets(self.eval_dataset).values()))
        if not own or "input_ids" not in prompts.column_names:
            prompts = self._tokenize_prompts(prompts, "the dataset to evaluate on")
        share = range(self.accelerator.process_index, len(prompts), self.accelerator.num_processes)
        if len(prompts) < self.accelerator.num_processes:  # seen by all processes: none waits for another
            raise ValueError(
                f"An evaluation needs a prompt for each of the {self.accelerator.num_processes} processes, and there "
                f"are {len(prompts)}. Add prompts, or start fewer processes."
            )
        return [prompts[i] for i in share], share

    def _tokenize_prompts(self, dataset: Any, name: str) -> Any:
        dataset = tokenize_datasets({name: dataset}, self.processing_class, **self.args.tokenize_kwargs)[name]
        limits = (self.args.response_length, self.model.context, self.model.num_embeddings)
        return validate_prompts(dataset, *limits, name)

    def _generate_on_main_process(self, prompts: Dataset) -> Experience:
        """Answer tokenized prompts on this process, all of them; the others are not asked.

        The answers are scored by reward models; where there are reward functions, only if `report_rewards` says so.
        """
        score = self.args.report_rewards or not self.collector.rewards.calls_functions
        rows = range(len(prompts))
        with self._allow_interrupt():
            return cast(
                Experience, self._generate_and_score(list(prompts), rows, ("evaluation",), Meter(), score=score)
            )


class WinRate:
    """How often the policy's answer scores above the reference's, to the same prompt with the same noise.

    The reference answers a dataset once. Its answers are scored each time, because a reward function may change as
    training goes.

    Args:
        collector: answers and scores.
    """

    def __init__(self, collector: RolloutCollector) -> None:
        self.collector = collector
        self.answers: dict[str, Completions] = {}

    @torch.no_grad()
    def __call__(
        self,
        samples: Experience,
        rows: Sequence[Row],
        noise: Tensor,
        seed: int,
        dataset: str,
        trainer_state: Any,
    ) -> float:
        """Share of prompts that the policy wins, over all processes; a tie is half a win.

        Args:
            samples: the policy's answers.
            rows: the prompts that they answer.
            noise: that decided the policy's answers, `(N, R)` float64.
            seed: of what reward functions draw.
            dataset: what tells the rows from others.
            trainer_state: handed to reward functions; what they log of the reference is dropped.
        """
        collector = self.collector
        with isolated_rng(seed):
            if dataset not in self.answers:
                self.answers[dataset] = collector.generate_from_reference(rows, noise)
            context = {"trainer_state": trainer_state, "log_metric": _ignore, "log_extra": _ignore}
            with collector.accelerator.autocast():
                theirs = collector.rewards(replace(self.answers[dataset], context=context)).total
        wins = (samples.scores > theirs).float() + 0.5 * (samples.scores == theirs)
        return collector.moments(wins.masked_fill((samples.scores + theirs).isnan(), torch.nan))[0]


def _ignore(name: str, value: Any) -> None:
    """Log nothing."""


def gather_completions(ids: list[list[int]]) -> np.ndarray:
    """Answers of all processes in the order of their prompts, `(N, R)` int64, filled up with -100.

    Args:
        ids: token ids of this process's answers; its prompts are every W-th of all, from its index on.
    """
    shares = gather_object([ids])
    ordered = [share[i] for i in range(len(shares[0])) for share in shares if i < len(share)]
    table = np.full((len(ordered), max(map(len, ordered))), -100, dtype=np.int64)
    for row, answer in enumerate(ordered):
        table[row, : len(answer)] = answer
    return table

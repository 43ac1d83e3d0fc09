"""All rewards of a run: call them, check their scores, and sum them with weights."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from ..algo import pessimistic_mean
from ..utils.interrupt import Interrupted, raise_if_interrupted
from .adapters import AdapterReward
from .completions import Completions, Reward, Score
from .functions import FunctionReward, await_all

MAX_OUTLIER_RATIO = 1e6  # float32 has 7 digits: next to a score this many times larger, other differences are lost
MAX_SCORE = 1e15  # reward units; its squares, summed over a million tokens, are still in float32's range


CHEAP_ANSWERS_NOTE = (
    "These completions were not sampled: they are empty, or repeat the prompt. A policy may generate such completions, "
    "so a reward function must return a number or None for them."
)


@dataclass(frozen=True)
class Scores:
    """Scores of N completions with at most R tokens by all F rewards of a run, in reward units.

    Attributes:
        by_function: `(N, F)` float32; the sum if a function scored tokens, NaN if it returned None.
        per_token: weighted sum of token-level rewards, `(N, R)` float32.
        total: weighted sum over functions and tokens, `(N,)` float32; NaN for rows that no function scored.
        failed: names of functions that failed and were skipped.
    """

    by_function: Tensor
    per_token: Tensor
    total: Tensor
    failed: tuple[str, ...] = ()


class RewardSet:
    """Weighted sum of all rewards of a run.

    Args:
        rewards: at least one reward.
        weights: one weight per reward; None means 1 for each.
        on_error: "raise", or "skip" to treat a failed reward function as if it had returned None.
        pessimism: beta of `pessimistic_mean`, which then replaces the sum, with weights as shares; reward units.
    """

    def __init__(
        self, rewards: Sequence[Reward], weights: Sequence[float] | None, on_error: str = "raise",
        pessimism: float | None = None,
    ) -> None:  # fmt: skip
        check_weights(weights, len(rewards))
        self.pessimism = pessimism
        self.on_error = on_error
        self.rewards = list(rewards)
        self.weights = torch.tensor(list(weights) if weights is not None else [1.0] * len(rewards))

    @property
    def names(self) -> list[str]:
        """Distinct names of the rewards in metrics."""
        return [reward.name for reward in self.rewards]

    @property
    def calls_functions(self) -> bool:
        """Whether any reward is a user function, whose calls may cost money or change state."""
        return any(isinstance(reward, FunctionReward) for reward in self.rewards)

    def leave_unscored(self, batch: Completions) -> Scores:
        """Return NaN scores for all completions without calling any reward."""
        tokens = torch.zeros(len(batch), max(map(len, batch.completion_ids), default=0))
        unscored = torch.full((len(batch), len(self.rewards)), torch.nan)
        return Scores(unscored, tokens, unscored[:, 0].clone())

    def __call__(self, batch: Completions) -> Scores:
        """Score completions: sync functions in order, and async functions concurrently after them."""
        self._failed: list[str] = []
        all_scores = self._call_rewards(self.rewards, batch)
        by_reward = [remove_outliers(r.name, scores, batch) for r, scores in zip(self.rewards, all_scores, strict=True)]
        by_function = torch.tensor([[_sum(s) for s in scores] for scores in by_reward], dtype=torch.float32).T
        per_token = torch.zeros(len(batch), max(map(len, batch.completion_ids), default=0))
        for weight, scores in zip(self.weights, by_reward, strict=True):
            for row, score in enumerate(scores):
                if isinstance(score, list):
                    per_token[row, : len(score)] += weight * torch.tensor(score)
        unscored = by_function.isnan().all(1)
        if unscored.any():
            row = int(unscored.nonzero()[0])
            warnings.warn(
                f"Every reward function returned None for {int(unscored.sum())} of {len(batch)} responses, which are "
                f"excluded from training; the first has prompt {batch.prompts[row]!r}. Return a number for them, or "
                "ignore this warning if they should not be trained on.",
                stacklevel=2,
            )
        if self.pessimism is None:
            total = torch.where(unscored, torch.nan, (by_function * self.weights).nansum(1))
        else:
            if any(isinstance(score, list) for scores in by_reward for score in scores):
                raise ValueError(
                    "reward_pessimism is defined for scores of whole responses, and a reward function returned a list "
                    "with a number per token: return its sum, or remove reward_pessimism."
                )
            total = pessimistic_mean(by_function, self.weights, self.pessimism)
        return Scores(by_function, per_token, total, tuple(self._failed))

    def ask_functions(self, batch: Completions) -> Tensor:
        """Score completions with the reward functions only, outside a rollout; errors are handled by `on_error`.

        Returns:
            `(N, F)` float32 as in `Scores.by_function`, with NaN for reward models.
        """
        self._failed = []
        functions = [reward for reward in self.rewards if isinstance(reward, FunctionReward)]
        try:
            all_scores = self._call_rewards(functions, batch)
        except Exception as error:
            error.add_note(CHEAP_ANSWERS_NOTE)
            raise
        by_name = dict(zip((f.name for f in functions), all_scores, strict=True))
        unscored: list[Score] = [None] * len(batch)
        columns = [[_sum(score) for score in by_name.get(name, unscored)] for name in self.names]
        return torch.tensor(columns, dtype=torch.float32).T

    @property
    def scores_prefixes(self) -> bool:
        """Whether any reward is a reward adapter, which scores prefixes."""
        return any(isinstance(reward, AdapterReward) for reward in self.rewards)

    def prefix_scores(self, sequences: Sequence[list[int]]) -> list[Tensor] | None:
        """Return the weighted sum of the reward adapters' scores of every prefix of each sequence.

        None without a reward adapter: other rewards only score whole responses.
        """
        adapters = [
            (weight, r) for weight, r in zip(self.weights, self.rewards, strict=True) if isinstance(r, AdapterReward)
        ]
        by_adapter = [[weight * scores for scores in r.prefix_scores(sequences)] for weight, r in adapters]
        return [sum(scores[1:], scores[0]) for scores in zip(*by_adapter, strict=True)] if adapters else None

    def _call_rewards(self, rewards: Sequence[Reward], batch: Completions) -> list[Sequence[Score]]:
        functions = [reward for reward in rewards if isinstance(reward, FunctionReward)]
        started = self._start(functions, batch)
        awaitables = [
            (reward, started[reward.name]) for reward in functions if inspect.isawaitable(started[reward.name])
        ]
        if awaitables:
            results = await_all(awaitables, batch)
            started |= {reward.name: result for (reward, _), result in zip(awaitables, results, strict=True)}
        return [self._result(reward, batch, started) for reward in rewards]

    def _start(self, functions: Sequence[FunctionReward], batch: Completions) -> dict[str, Any]:
        started: dict[str, Any] = {}
        try:
            for reward in functions:
                raise_if_interrupted()
                started[reward.name] = reward.start(batch)
        except Interrupted:
            for result in started.values():
                if inspect.iscoroutine(result):  # it will not be awaited
                    result.close()
            raise
        return started

    def _result(self, reward: Reward, batch: Completions, started: dict[str, Any]) -> Sequence[Score]:
        raise_if_interrupted()
        try:
            return reward.result(started[reward.name], batch) if isinstance(reward, FunctionReward) else reward(batch)
        except Exception as error:
            if self.on_error == "raise":
                if not isinstance(reward, FunctionReward):  # a function's error names it already
                    error.add_note(f"Raised by the reward model {reward.name!r}, called with {len(batch)} completions.")
                raise
            warnings.warn(
                f"The reward {reward.name!r} is skipped in this rollout: {type(error).__name__}: {error}", stacklevel=3
            )
            self._failed.append(reward.name)
            return [None] * len(batch)


def remove_outliers(name: str, scores: Sequence[Score], batch: Completions) -> Sequence[Score]:
    """Replace scores next to which the others vanish in float32 rounding by None, with a warning.

    One such score, or number of a token, would dominate the mean, the variance and the gradient of its rollout, and the
    running averages for the rest of the run.
    """
    sizes = [0.0 if score is None else _size(score) for score in scores]
    scored_sizes = [size for size, score in zip(sizes, scores, strict=True) if score is not None]
    bound = min(MAX_SCORE, MAX_OUTLIER_RATIO * max(1.0, median_low(scored_sizes))) if scored_sizes else MAX_SCORE
    outliers = [row for row, size in enumerate(sizes) if size > bound]
    if not outliers:
        return scores
    warnings.warn(
        f"The reward function {name!r} returned {scores[outliers[0]]!r} for prompt {batch.prompts[outliers[0]]!r} with "
        f"completion {batch.completions[outliers[0]]!r}, above {bound:.3g} ({MAX_OUTLIER_RATIO:.0e} times the median "
        f"size of the rollout's scores, at most {MAX_SCORE:.0e}): the other scores would be lost in float32 rounding. "
        f"It and {len(outliers) - 1} others of {len(batch)} count as None. Bound the values that the function returns.",
        stacklevel=3,
    )
    return [None if row in outliers else score for row, score in enumerate(scores)]


def usable_scores(scores: Tensor, prompts: Sequence[Any]) -> Tensor:
    """Replace scores above `MAX_SCORE` by NaN, which excludes them from training; warn about the first.

    Args:
        scores: scores after weights and callbacks, `(N,)`, reward units; NaN for unscored rows.
        prompts: prompts of the same rows.
    """
    outliers = scores.abs() > MAX_SCORE
    if outliers.any():
        row = int(outliers.nonzero()[0])
        warnings.warn(
            f"After reward_weights and callbacks the score of prompt {prompts[row]!r} is {scores[row].item():.3g}, "
            f"above {MAX_SCORE:.0e}: {int(outliers.sum())} of {len(scores)} responses are excluded from training. "
            "Lower reward_weights, or bound the scores.",
            stacklevel=2,
        )
    return scores.masked_fill(outliers, torch.nan)


def _size(score: float | list[float]) -> float:
    return max(map(abs, [math.fsum(score), *score])) if isinstance(score, list) else abs(score)


def _sum(score: Score) -> float:
    if score is None:
        return math.nan
    return math.fsum(score) if isinstance(score, list) else score


def check_weights(weights: Sequence[float] | None, count: int) -> None:
    """Refuse a list of weights whose length differs from the number of reward functions."""
    if weights is not None and len(weights) != count:
        raise ValueError(f"reward_weights has {len(weights)} numbers for {count} reward functions; pass one for each.")

"""All rewards of a run: asked together, weighted, summed."""

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

from ..utils.interrupt import Interrupted, raise_if_interrupted
from .adapters import AdapterReward
from .completions import Completions, Reward, Score
from .functions import FunctionReward, await_all

OUTLIER = 1e6  # float32 has 7 digits: beside a score that many times larger the usual differences are gone
LARGEST_SCORE = 1e15  # squares of it, summed over a million tokens, still are in float32's range


NOT_SAMPLED = (
    "The policy had not answered yet: these completions are empty, or repeat the prompt. A policy may answer so, and a "
    "reward function must return a number or None for it."
)


@dataclass(frozen=True)
class Scores:
    """What all rewards of a run say of N completions of at most R tokens, in reward units.

    Attributes:
        by_function: `(N, F)` float32; the sum where a function scored tokens, NaN where it returned None.
        per_token: the weighted sum of token-level rewards, `(N, R)` float32.
        total: weighted sum over functions and tokens, `(N,)` float32; NaN for rows that no function scored.
        failed: names of functions that were left out because they failed.
    """

    by_function: Tensor
    per_token: Tensor
    total: Tensor
    failed: tuple[str, ...] = ()


class RewardSet:
    """All rewards of a run, weighted.

    Args:
        rewards: at least one.
        weights: one each; `None` means 1.
        on_error: "raise", or "skip" to go on without a reward function that failed, as if it had returned None.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float] | None, on_error: str = "raise") -> None:
        check_weights(weights, len(rewards))
        self.on_error = on_error
        self.rewards = list(rewards)
        self.weights = torch.tensor(list(weights) if weights is not None else [1.0] * len(rewards))

    @property
    def names(self) -> list[str]:
        """Names for metrics, one per reward, distinct."""
        return [reward.name for reward in self.rewards]

    @property
    def calls_functions(self) -> bool:
        """Whether code of the user is called, which may cost money or keep a state; reward models do neither."""
        return any(isinstance(reward, FunctionReward) for reward in self.rewards)

    def leave_unscored(self, batch: Completions) -> Scores:
        """Return no score for each completion, without a call."""
        tokens = torch.zeros(len(batch), max(map(len, batch.completion_ids), default=0))
        nothing = torch.full((len(batch), len(self.rewards)), torch.nan)
        return Scores(nothing, tokens, nothing[:, 0].clone())

    def __call__(self, batch: Completions) -> Scores:
        """Score completions: functions in their order, then async ones, which run side by side."""
        self._failed: list[str] = []
        answers = self._all_scores(self.rewards, batch)
        by_reward = [without_outliers(r.name, scores, batch) for r, scores in zip(self.rewards, answers, strict=True)]
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
                f"Every reward function returned None for {int(unscored.sum())} of {len(batch)} responses, which "
                f"are left out of learning; the first has prompt {batch.prompts[row]!r}.",
                stacklevel=2,
            )
        total = torch.where(unscored, torch.nan, (by_function * self.weights).nansum(1))
        return Scores(by_function, per_token, total, tuple(self._failed))

    def ask_functions(self, batch: Completions) -> Tensor:
        """Score completions by the reward functions alone, outside a rollout.

        Errors are treated as in a rollout (`on_error`).

        Returns:
            `(N, F)` float32 as `Scores.by_function`; NaN for reward models too.
        """
        self._failed = []
        functions = [reward for reward in self.rewards if isinstance(reward, FunctionReward)]
        try:
            found = self._all_scores(functions, batch)
        except Exception as error:
            error.add_note(NOT_SAMPLED)
            raise
        answers = dict(zip((f.name for f in functions), found, strict=True))
        nothing: list[Score] = [None] * len(batch)
        columns = [[_sum(score) for score in answers.get(name, nothing)] for name in self.names]
        return torch.tensor(columns, dtype=torch.float32).T

    @property
    def scores_prefixes(self) -> bool:
        """Whether `prefix_scores` gives any."""
        return any(isinstance(reward, AdapterReward) for reward in self.rewards)

    def prefix_scores(self, sequences: Sequence[list[int]]) -> list[Tensor] | None:
        """The weighted sum of what reward adapters say of each sequence as far as each of its tokens.

        None where there is no reward adapter. Other rewards can only be asked at the end.
        """
        adapters = [
            (weight, r) for weight, r in zip(self.weights, self.rewards, strict=True) if isinstance(r, AdapterReward)
        ]
        by_adapter = [[weight * scores for scores in r.prefix_scores(sequences)] for weight, r in adapters]
        return [sum(scores[1:], scores[0]) for scores in zip(*by_adapter, strict=True)] if adapters else None

    def _all_scores(self, rewards: Sequence[Reward], batch: Completions) -> list[Sequence[Score]]:
        functions = [reward for reward in rewards if isinstance(reward, FunctionReward)]
        begun = self._begin(functions, batch)
        waiting = [(reward, begun[reward.name]) for reward in functions if inspect.isawaitable(begun[reward.name])]
        if waiting:  # together: what they wait for, they wait for at the same time
            answers = await_all(waiting, batch)
            begun |= {reward.name: answer for (reward, _), answer in zip(waiting, answers, strict=True)}
        return [self._scores(reward, batch, begun) for reward in rewards]

    def _begin(self, functions: Sequence[FunctionReward], batch: Completions) -> dict[str, Any]:
        begun: dict[str, Any] = {}
        try:
            for reward in functions:
                raise_if_interrupted()
                begun[reward.name] = reward.begin(batch)
        except Interrupted:
            for result in begun.values():
                if inspect.iscoroutine(result):  # nobody is going to await it
                    result.close()
            raise
        return begun

    def _scores(self, reward: Reward, batch: Completions, begun: dict[str, Any]) -> Sequence[Score]:
        raise_if_interrupted()
        try:
            return reward.finish(begun[reward.name], batch) if isinstance(reward, FunctionReward) else reward(batch)
        except Exception as error:
            if self.on_error == "raise":
                raise
            warnings.warn(f"{reward.name!r} is left out of this rollout: {type(error).__name__}: {error}", stacklevel=3)
            self._failed.append(reward.name)
            return [None] * len(batch)


def without_outliers(name: str, scores: Sequence[Score], batch: Completions) -> Sequence[Score]:
    """Replace scores beside which float32 loses all others by None, with a warning that names the first.

    One such score, or number of a token, would be the mean, the variance and the gradient of its rollout, and stay in
    running averages for the rest of the run.
    """
    sizes = [0.0 if score is None else _size(score) for score in scores]
    known = [size for size, score in zip(sizes, scores, strict=True) if score is not None]
    bound = min(LARGEST_SCORE, OUTLIER * max(1.0, median_low(known))) if known else LARGEST_SCORE
    outside = [row for row, size in enumerate(sizes) if size > bound]
    if not outside:
        return scores
    warnings.warn(
        f"The reward function {name!r} gave {scores[outside[0]]!r} for prompt {batch.prompts[outside[0]]!r} with "
        f"completion {batch.completions[outside[0]]!r}, beyond {bound:.3g} ({OUTLIER:.0e} times the median size of the "
        f"rollout's scores, at most {LARGEST_SCORE:.0e}): beside it the other scores are lost in rounding. It and "
        f"{len(outside) - 1} others of {len(batch)} count as None. Bound what the function returns.",
        stacklevel=3,
    )
    return [None if row in outside else score for row, score in enumerate(scores)]


def usable_scores(scores: Tensor, prompts: Sequence[Any]) -> Tensor:
    """Replace scores that callbacks or weights made too large to compute with by NaN, which is left out of learning.

    Args:
        scores: `(N,)`, reward units; NaN where there is none.
        prompts: of the same rows.
    """
    outside = scores.abs() > LARGEST_SCORE
    if outside.any():
        row = int(outside.nonzero()[0])
        warnings.warn(
            f"After reward_weights and callbacks the score of prompt {prompts[row]!r} is {scores[row].item():.3g}, "
            f"beyond {LARGEST_SCORE:.0e}: {int(outside.sum())} of {len(scores)} responses are left out of learning.",
            stacklevel=2,
        )
    return scores.masked_fill(outside, torch.nan)


def _size(score: float | list[float]) -> float:
    return max(map(abs, [math.fsum(score), *score])) if isinstance(score, list) else abs(score)


def _sum(score: Score) -> float:
    if score is None:
        return math.nan
    return math.fsum(score) if isinstance(score, list) else score


def check_weights(weights: Sequence[float] | None, count: int) -> None:
    """Refuse weights that are not one per reward function."""
    if weights is not None and len(weights) != count:
        raise ValueError(f"reward_weights has {len(weights)} numbers for {count} reward functions; give one each.")

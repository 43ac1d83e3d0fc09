"""Scores of reward functions for trivial answers: an empty answer and a repetition of the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("empty_answer", "repeated_prompt")
PROMPTS = 4  # number of prompts: detects rewards that pay on some prompts only, with few calls of a paid judge
MIN_SHARE_BELOW = 0.75  # share of the first rollout's answers
RELATIVE_TOLERANCE = 1e-6  # rounding error of a float32 mean


@dataclass(frozen=True)
class CheapAnswers:
    """Scores of cheap answers to a few prompts, by reward function.

    Attributes:
        names: names of the F rewards of the run.
        weights: weight of each reward, `(F,)` float32.
        scores: mean over the prompts of each kind in `KINDS`, `(2, F)` float32, reward units; NaN for rewards that
            returned None or were not called.
    """

    names: Sequence[str]
    weights: Tensor
    scores: Tensor

    def metrics(self) -> dict[str, float]:
        """Return the scores that are not NaN, by metric name."""
        return {
            f"rewards/{name}/{kind}": score
            for kind, row in zip(KINDS, self.scores.tolist(), strict=True)
            for name, score in zip(self.names, row, strict=True)
            if not math.isnan(score)
        }

    def warning(self, first: Tensor) -> str | None:
        """Return a warning that names the reward functions that pay for a cheap answer, or None.

        A function pays for an answer if at least three quarters of the first rollout's answers have no higher score. A
        score of 0 or less must be strictly higher than theirs: a wrong answer with score 0, and a penalty that most
        answers avoid, are not paid for. Scores are compared with those of the policy because reward units have no
        common zero: 0 is the maximum of a negative distance, and 0.5 the middle of a probability.

        Args:
            first: scores of the first rollout's answers, `(N, F)` float32; NaN for None.
        """
        paid = [
            f"{name!r} returns {score.item():.4g} for {_describe(kind)}; its mean over the first rollout is "
            f"{answers[~answers.isnan()].mean().item():.4g}"
            for kind, row in zip(KINDS, self.scores, strict=True)
            for name, weight, score, answers in zip(self.names, self.weights, row, first.T, strict=True)
            if pays(weight * score, weight * answers)
        ]
        if not paid:
            return None
        return (
            f"A reward function pays for a trivial answer: {'. '.join(paid)}. At least three quarters of the policy's "
            "answers have no higher score, so training may converge to such answers. Return the lowest score for an "
            "answer that is empty or contains the prompt, or make sure that the other rewards outweigh it."
        )


def pays(score: Tensor, first: Tensor) -> bool:
    """Return whether most answers do not exceed the score of a cheap answer (see `CheapAnswers.warning`).

    Args:
        score: score of a cheap answer, a scalar; higher is better.
        first: scores of the policy's answers, `(N,)`; NaN for None.
    """
    first = first[~first.isnan()]
    if score.isnan() or not len(first):
        return False
    margin = RELATIVE_TOLERANCE * score.abs()
    below = first <= score + margin if score > 0 else first < score - margin
    return below.float().mean().item() >= MIN_SHARE_BELOW


def _describe(kind: str) -> str:
    return {"empty_answer": "an empty answer", "repeated_prompt": "the prompt repeated"}[kind]


def mean_by_kind(scores: Tensor) -> Tensor:
    """Average scores of cheap answers over prompts.

    Args:
        scores: scores of K empty answers and K repeated prompts, `(2 K, F)` float32; NaN for None.

    Returns:
        `(2, F)`; NaN where all are None.
    """
    return torch.stack([half.nanmean(0) for half in scores.chunk(2)])

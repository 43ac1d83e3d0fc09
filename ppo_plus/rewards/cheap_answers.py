"""Answers that take no work, an empty one and the prompt repeated: what reward functions give for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("empty_answer", "repeated_prompt")
PROMPTS = 4  # enough for a reward that pays on some prompts only, and few calls of a judge that costs money
MOST = 0.75  # of the first rollout's answers
ROUNDING = 1e-6  # relative, of a mean over float32


@dataclass(frozen=True)
class CheapAnswers:
    """Scores of cheap answers to a few prompts, by reward function.

    Attributes:
        names: of the F rewards of the run.
        weights: of each, `(F,)` float32.
        scores: mean over the prompts of each kind in `KINDS`, `(2, F)` float32, reward units; NaN for rewards that
            gave None or were not asked.
    """

    names: Sequence[str]
    weights: Tensor
    scores: Tensor

    def metrics(self) -> dict[str, float]:
        """Scores by the name that they are logged under; those that there are."""
        return {
            f"rewards/{name}/{kind}": score
            for kind, row in zip(KINDS, self.scores.tolist(), strict=True)
            for name, score in zip(self.names, row, strict=True)
            if not math.isnan(score)
        }

    def warning(self, first: Tensor) -> str | None:
        """Name the reward functions that pay for a cheap answer; None where none does.

        A function pays for an answer if at least three quarters of the first rollout's answers do not earn more from
        it. A score of 0 or less must be higher than theirs: a wrong answer that earns 0, and a penalty that spares
        most answers, pay for nothing. Scores are compared with the policy's own because reward units have no common
        zero: 0 is the most that a negative distance can give, and 0.5 the middle of a probability.

        Args:
            first: what the first rollout's answers earned, `(N, F)` float32; NaN for None.
        """
        paid = [
            f"{name!r} gives {score.item():.4g} for {_in_words(kind)}; its mean over the first rollout is "
            f"{answers[~answers.isnan()].mean().item():.4g}"
            for kind, row in zip(KINDS, self.scores, strict=True)
            for name, weight, score, answers in zip(self.names, self.weights, row, first.T, strict=True)
            if pays(weight * score, weight * answers)
        ]
        if not paid:
            return None
        return (
            f"A reward function pays for an answer that takes no work: {'. '.join(paid)}. At least three quarters of "
            "the policy's answers earn no more, so learning may end in such answers. Let the function return its "
            "lowest score for an answer that is empty or contains the prompt, or make sure that the other rewards "
            "outweigh it."
        )


def pays(score: Tensor, first: Tensor) -> bool:
    """Whether a score is one that most answers do not exceed, as `CheapAnswers.warning` explains.

    Args:
        score: of a cheap answer, a scalar; higher is better.
        first: of the policy's answers, `(N,)`; NaN for None.
    """
    first = first[~first.isnan()]
    if score.isnan() or not len(first):
        return False
    margin = ROUNDING * score.abs()
    below = first <= score + margin if score > 0 else first < score - margin
    return below.float().mean().item() >= MOST


def _in_words(kind: str) -> str:
    return {"empty_answer": "an empty answer", "repeated_prompt": "the prompt repeated"}[kind]


def mean_by_kind(scores: Tensor) -> Tensor:
    """Average scores of cheap answers over prompts.

    Args:
        scores: of K empty answers and K repeated prompts, `(2 K, F)` float32; NaN for None.

    Returns:
        `(2, F)`; NaN where all are None.
    """
    return torch.stack([half.nanmean(0) for half in scores.chunk(2)])

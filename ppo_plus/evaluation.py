"""What evaluation has beside a rollout: answers of the reference to compare with, and answers as one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from .collector import Collector, Samples
from .data import Row
from .rewards import Completions
from .rollout import isolated_rng


class WinRate:
    """How often the policy's answer scores above the reference's, to the same prompt with the same noise.

    The reference answers a dataset once. Its answers are scored each time, because a reward function may change as
    training goes.

    Args:
        collector: answers and scores.
    """

    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        self.answers: dict[str, Completions] = {}

    @torch.no_grad()
    def __call__(
        self, samples: Samples, rows: Sequence[Row], noise: Tensor, seed: int, dataset: str, trainer_state: Any
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
                self.answers[dataset] = collector.answer_as_reference(rows, noise)
            context = {"trainer_state": trainer_state, "log_metric": _drop, "log_extra": _drop}
            with collector.accelerator.autocast():
                theirs = collector.rewards(replace(self.answers[dataset], context=context)).total
        wins = (samples.scores > theirs).float() + 0.5 * (samples.scores == theirs)
        return collector.moments(wins.masked_fill((samples.scores + theirs).isnan(), torch.nan))[0]


def _drop(name: str, value: Any) -> None:
    """Log nothing."""


def gathered_answers(ids: list[list[int]]) -> np.ndarray:
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

"""What a reward adapter says of an unfinished response, as the part of each value that nobody has to learn.

A reward model can be asked at every token. Its score of a prefix foretells the score of the whole, long before a value
head that starts at zero does: the idea by which InstructGPT's critic starts as the reward model (Ouyang et al. 2022,
appendix C.4), without a second model. A line through what returns turned out to be, over rollouts that are over, makes
a prediction of the score, whatever the reward model's scale and whatever callbacks and penalties made of it; the value
head learns what is missing. As each line was fitted before its rollout was sampled, no return is in its own baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MEMORY = 256  # responses, over which an old rollout's weight falls to 1/e
PRIOR = 8  # responses that speak for a slope of 0: how little a few of them tell


@dataclass
class RewardBaseline:
    """Least squares of returns on prefix scores, with exponential forgetting and a slope that is shrunk towards 0.

    Attributes:
        responses: how many the moments are made of, forgetting included.
        tokens: the same of their tokens.
        moments: sums over tokens of the score, the return, the score squared, and the product of both.
    """

    responses: float = 0.0
    tokens: float = 0.0
    moments: Sequence[float] = (0.0, 0.0, 0.0, 0.0)

    def line(self) -> tuple[float, float]:
        """Slope and intercept, reward units; zeros before the first rollout."""
        if not self.tokens:
            return 0.0, 0.0
        score, of_return, squared, product = (moment / self.tokens for moment in self.moments)
        variance, covariance = squared - score**2, product - score * of_return
        trust = self.responses / (self.responses + PRIOR)
        slope = trust * covariance / variance if variance > 1e-8 * squared else 0.0
        return slope, of_return - slope * score

    def __call__(self, scores: Tensor) -> Tensor:
        """Predicted returns for prefix scores `(N, R)`, float32, reward units."""
        slope, intercept = self.line()
        return scores * slope + intercept

    def update(
        self, scores: Tensor, returns: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor] = lambda t: t
    ) -> None:
        """Learn from a rollout.

        Args:
            scores: of the prefix before each token, `(N, R)` float32, reward units.
            returns: what was earned from each token on, `(N, R)` float32, reward units.
            mask: the tokens that count, `(N, R)` bool.
            reduce: sums over processes.
        """
        x, y = scores[mask].double(), returns[mask].double()
        counts = [mask.any(1).sum().double(), mask.sum().double()]
        new = reduce(torch.stack([*counts, x.sum(), y.sum(), (x * x).sum(), (x * y).sum()])).tolist()
        kept = math.exp(-new[0] / MEMORY)
        old = [self.responses, self.tokens, *self.moments]
        self.responses, self.tokens, *self.moments = (kept * a + b for a, b in zip(old, new, strict=True))

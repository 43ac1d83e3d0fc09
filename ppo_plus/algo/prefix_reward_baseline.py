"""What a reward adapter says of an unfinished response, as the part of each value that nobody has to learn.

A reward model can be asked at every token. Its score of a prefix foretells the score of the whole, long before a value
head that starts at zero does: the idea by which InstructGPT's critic starts as the reward model (Ouyang et al. 2022,
appendix C.4), without a second model. A line through what returns turned out to be makes a prediction of the score,
whatever the reward model's scale and whatever callbacks and penalties made of it; the value head learns what it lacks.
The line of each response is fitted to all others, those of its own rollout too. So no return is in its own baseline,
which would bias the policy gradient, and the first rollout has one as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..utils.files import reraise_as_corrupt_file

REWARD_LINE = "reward_line"  # in the header of a value head's file: slope and intercept, as JSON
TIME_CONSTANT = 256  # responses, over which an old rollout's weight falls to 1/e
SHRINKAGE = 8  # responses that speak for a slope of 0: how little a few of them tell


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
        """Slope and intercept of all that was learned from, reward units; zeros where that is nothing."""
        slope, intercept = lines(self._moments())
        return slope.item(), intercept.item()

    def fit_predict(
        self, scores: Tensor, returns: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor] = lambda t: t
    ) -> Tensor:
        """Predict the returns of a rollout, each response's without its own, and learn from them.

        Args:
            scores: of the prefix before each token, `(N, R)` float32, reward units.
            returns: what was earned from each token on, `(N, R)` float32, reward units.
            mask: the tokens that count, `(N, R)` bool.
            reduce: sums over processes.

        Returns:
            Predicted returns, `(N, R)` float32, reward units; 0 outside the mask.
        """
        x, y = (tensor.double().masked_fill(~mask, 0.0) for tensor in (scores, returns))
        sums = [mask.any(1).double(), mask.double().sum(1), *(tensor.sum(1) for tensor in (x, y, x * x, x * y))]
        own = torch.stack(sums, 1)
        new = reduce(own.sum(0))
        known = self._moments().to(new.device) * (-new[0] / TIME_CONSTANT).exp() + new
        self.responses, self.tokens, *self.moments = known.tolist()
        slope, intercept = lines(known - own)
        return (x * slope[:, None] + intercept[:, None]).masked_fill(~mask, 0.0).float()

    def _moments(self) -> Tensor:
        return torch.tensor([self.responses, self.tokens, *self.moments], dtype=torch.float64)


def lines(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes and intercepts, each `(...)` float64, of moments `(..., 6)`; zeros where they are of no token."""
    responses, tokens = moments[..., 0], moments[..., 1]
    score, of_return, squared, product = (moments[..., 2:] / tokens.clamp(min=1e-12)[..., None]).unbind(-1)
    variance, covariance = squared - score**2, product - score * of_return
    trust = responses / (responses + SHRINKAGE)
    slope = torch.where(variance > 1e-8 * squared, trust * covariance / variance, 0.0)
    return slope, of_return - slope * score


def saved_reward_line(file: Path) -> tuple[float, float] | None:
    """Read slope and intercept of the baseline beside which a value head was trained; None where there was none."""
    with reraise_as_corrupt_file(file), safe_open(file, framework="pt") as tensors:
        line = (tensors.metadata() or {}).get(REWARD_LINE)
    if line is None:
        return None
    slope, intercept = json.loads(line)
    return slope, intercept

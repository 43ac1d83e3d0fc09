"""Value baseline: linear regression of returns on reward-model scores of response prefixes.

A reward model scores every prefix of a response, and that score predicts the final score long before a value head
initialized to zero does. InstructGPT initializes its critic from the reward model for the same reason (Ouyang et al.
2022, appendix C.4); the baseline needs no second model. The regression maps prefix scores to returns, whatever the
scale of the reward model and whatever callbacks and penalties change; the value head learns the residual. The
regression for each response is fitted to all other responses, including those of the same rollout. A return is never
part of its own baseline, which would bias the policy gradient, and the first rollout has a baseline too.
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
TIME_CONSTANT = 256  # responses over which the weight of an old rollout decays to 1/e
SHRINKAGE = 8  # responses: pseudo-count of the prior with slope 0, which dominates while few responses are known


@dataclass
class RewardBaseline:
    """Least squares of returns on prefix scores, with exponential forgetting and a slope shrunk toward 0.

    Attributes:
        responses: effective number of responses in the moments, after forgetting.
        tokens: effective number of tokens in the moments, after forgetting.
        moments: sums over tokens of the score, the return, the score squared, and the product of both.
    """

    responses: float = 0.0
    tokens: float = 0.0
    moments: Sequence[float] = (0.0, 0.0, 0.0, 0.0)

    def line(self) -> tuple[float, float]:
        """Return slope and intercept, reward units, fitted to all responses so far; zeros before the first."""
        slope, intercept = least_squares(self._moments())
        return slope.item(), intercept.item()

    def fit_predict(
        self, scores: Tensor, returns: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor] = lambda t: t
    ) -> Tensor:
        """Predict returns per response from all other responses, then add this rollout to the moments.

        Args:
            scores: scores of the prefix before each token, `(N, R)` float32, reward units.
            returns: returns from each token on, `(N, R)` float32, reward units.
            mask: True for the tokens that count, `(N, R)` bool.
            reduce: sums a tensor over all processes.

        Returns:
            Predicted returns, `(N, R)` float32, reward units; 0 outside the mask.
        """
        x, y = (tensor.double().masked_fill(~mask, 0.0) for tensor in (scores, returns))
        sums = [mask.any(1).double(), mask.double().sum(1), *(tensor.sum(1) for tensor in (x, y, x * x, x * y))]
        row_moments = torch.stack(sums, 1)
        rollout_moments = reduce(row_moments.sum(0))
        decay = (-rollout_moments[0] / TIME_CONSTANT).exp()
        all_moments = self._moments().to(rollout_moments.device) * decay + rollout_moments
        self.responses, self.tokens, *self.moments = all_moments.tolist()
        slope, intercept = least_squares(all_moments - row_moments)
        return (x * slope[:, None] + intercept[:, None]).masked_fill(~mask, 0.0).float()

    def _moments(self) -> Tensor:
        return torch.tensor([self.responses, self.tokens, *self.moments], dtype=torch.float64)


def least_squares(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Compute slopes and intercepts, each `(...)` float64, from moments `(..., 6)`; zeros where no token counts."""
    responses, tokens = moments[..., 0], moments[..., 1]
    mean_score, mean_return, squared, product = (moments[..., 2:] / tokens.clamp(min=1e-12)[..., None]).unbind(-1)
    variance, covariance = squared - mean_score**2, product - mean_score * mean_return
    shrinkage = responses / (responses + SHRINKAGE)
    slope = torch.where(variance > 1e-8 * squared, shrinkage * covariance / variance, 0.0)
    return slope, mean_return - slope * mean_score


def saved_reward_line(file: Path) -> tuple[float, float] | None:
    """Read the baseline's slope and intercept from a value head's file; None if it was trained without one."""
    with reraise_as_corrupt_file(file), safe_open(file, framework="pt") as tensors:
        coefficients = (tensors.metadata() or {}).get(REWARD_LINE)
    if coefficients is None:
        return None
    slope, intercept = json.loads(coefficients)
    return slope, intercept

"""Aggregation of several reward models."""

from __future__ import annotations

import torch
from torch import Tensor


def pessimistic_mean(scores: Tensor, weights: Tensor, beta: float) -> Tensor:
    """Compute `-beta log E[exp(-r / beta)]` over reward models, the pessimistic effective reward of 2606.09073.

    Its limits are the mean (beta to infinity) and the minimum (beta to 0); in between it is about the mean minus
    `Var[r] / (2 beta)`, the variance penalty of uncertainty-weighted optimization (Coste et al. 2023, 2310.02743). The
    abstract of 2606.09073 has the formula. It leaves open what to do with models on different scales: rescale them
    before, for the formula compares their numbers.

    Args:
        scores: `(N, F)` by reward, reward units; NaN where a reward gave none, which leaves it out of that row.
        weights: shares of the rewards, `(F,)`, 0 or more; normalized over the rewards that scored a row.
        beta: above 0, reward units.

    Returns:
        `(N,)` float32, reward units; NaN where no reward with a share gave a score.
    """
    exact = scores.double()  # a large beta divides, and multiplies the rounding error
    shares = torch.where(exact.isnan(), 0.0, weights.double())
    log_shares = (shares / shares.sum(1, keepdim=True)).log()  # -inf leaves a reward out
    return (-beta * torch.logsumexp(log_shares - exact.nan_to_num() / beta, dim=1)).float()

"""Masked statistics of per-token quantities: means, variances, whitening, explained variance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""All-reduce (sum) of a tensor over all processes; each process must call it equally often, even with an empty mask."""


Average = TypeVar("Average", float, Tensor)


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """Return `values` in at least float32, with 0 outside `mask`."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    # Filling rather than multiplying: 0 * inf is NaN, and padding may hold anything.
    return values.masked_fill(~mask.bool(), 0.0)


def masked_moments(values: Tensor, mask: Tensor, *, reduce: Reduce | None = None) -> tuple[Tensor, Tensor]:
    """Compute mean and variance over the masked positions of all processes (corrected two-pass: Chan et al. 1983).

    Args:
        values: any quantity, `(B, R)`; B and R may differ between processes.
        mask: 1 for the positions that count, same shape as `values`.
        reduce: sums a tensor over all processes; None means that there is one process.

    Returns:
        The mean and the biased variance (divided by the count, so one position gives 0 and never NaN),
        float32 scalars, equal on all processes; both 0 where no position counts.
    """
    reduce = reduce or (lambda tensor: tensor)
    kept = _masked(values, mask)
    total, count = reduce(torch.stack([kept.sum(), mask.bool().sum().to(kept.dtype)]))
    count = count.clamp(min=1)
    mean = total / count

    centered = _masked(kept - mean, mask)
    residual, squares = reduce(torch.stack([centered.sum(), centered.square().sum()])) / count
    # Correct the rounding error of the mean: without this, equal values get a variance slightly above 0, and
    # dividing by it amplifies noise.
    return mean + residual, (squares - residual.square()).clamp(min=0)


def whiten(
    values: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    reduce: Reduce | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """Scale masked values to variance 1 and, with `shift_mean`, to mean 0 (Huang et al. 2024, 2403.17031).

    Args:
        values: advantages or rewards, `(B, R)`.
        mask: 1 for the positions that count, same shape as `values`.
        shift_mean: True gives mean 0 (advantages). False scales the deviations from the mean and keeps the
            mean itself (rewards, whose sign and level matter).
        reduce: sums a tensor over all processes; the statistics then cover all processes.
        eps: added to the variance.

    Returns:
        The whitened values, `(B, R)` float32, unit: standard deviations; 0 outside `mask`. One single
        valid position is finite: 0 when shifted, itself when not.
    """
    mean, var = masked_moments(values, mask, reduce=reduce)
    whitened = (_masked(values, mask) - mean) * torch.rsqrt(var + eps)
    return _masked(whitened if shift_mean else whitened + mean, mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, *, reduce: Reduce | None = None) -> Tensor:
    """Compute the share of the variance of the returns that the critic predicts, `1 - Var[G - V] / Var[G]`.

    Args:
        values: V, the critic's predictions, `(B, R)`, reward units.
        returns: G, the targets, `(B, R)`, reward units.
        mask: 1 for response tokens up to and including EOS, else 0, `(B, R)`.
        reduce: sums a tensor over all processes.

    Returns:
        A float32 scalar without unit: 1 is perfect, 0 no better than a constant, below 0 worse; 0 where
        the returns do not vary.
    """
    _, total = masked_moments(returns, mask, reduce=reduce)
    _, unexplained = masked_moments(returns - values, mask, reduce=reduce)
    return torch.where(total > 0, 1 - unexplained / total, torch.zeros_like(total))


def ema(old: Average, new: Average, decay: float) -> Average:
    """Update an exponential moving average: `decay old + (1 - decay) new`.

    Args:
        old: the current average.
        new: the new measurement, in the same unit.
        decay: share of `old` that remains, 0 to 1.

    Returns:
        The new average.
    """
    return decay * old + (1 - decay) * new


def pairwise_calibration_error(margins: Tensor, bins: int = 10) -> float:
    """Compute the expected calibration error of a reward model's preference probabilities (Guo et al. 2017, eq. 3).

    The Bradley-Terry model prefers the answer with the higher score with probability `p = sigmoid(|margin|)`. Pairs
    are grouped by p into `bins` of equal width over [0.5, 1]; the error is the mean over pairs of
    `|share of correct pairs - mean of p|` of their bin. A tie has p = 0.5 and counts as half correct.

    Args:
        margins: score of the chosen answer minus that of the rejected one, `(N,)`, reward units.
        bins: number of bins.

    Returns:
        The error, from 0 (calibrated) to at most 1; NaN without pairs.
    """
    if not len(margins):
        return math.nan
    margins = margins.cpu().double()  # Apple's GPUs have no float64
    confidence = margins.abs().sigmoid()
    correct = (margins > 0).double() + 0.5 * (margins == 0)
    index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, correct - confidence)
    return (gaps.abs().sum() / len(margins)).item()

"""Charts of a run: curves of metrics as numbers for the page, and as a PNG for papers."""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_POINTS = 400  # points per curve
SERIES_COLORS = ("#0b62a4", "#c2520a", "#00785a", "#a6427f")


@dataclass(frozen=True)
class Chart:
    """One chart: metrics of the same unit over optimizer steps.

    Attributes:
        title: title of the chart.
        unit: unit of the vertical axis.
        series: label by metric; metrics that a run lacks are skipped.
        log: whether the vertical axis is logarithmic.
    """

    title: str
    unit: str
    series: dict[str, str]
    log: bool = False


CHARTS = (
    Chart("Reward", "reward units", {"reward": "training", "eval_reward": "evaluation"}),
    Chart("KL to the reference", "nats per response", {"kl": "training", "eval_kl": "evaluation"}),
    Chart("Entropy", "nats per token", {"entropy": "training", "eval_entropy": "evaluation"}),
    Chart("Clip fraction", "share of tokens", {"clip_ratio/policy": "policy", "clip_ratio/value": "value"}),
    Chart("Explained variance", "share of the returns' variance", {"critic/explained_variance": "training"}),
    Chart(
        "Response length",
        "tokens",
        {"completions/mean_length": "training", "eval_completions/mean_length": "evaluation"},
    ),
    Chart("Learning rate", "per step", {"learning_rate": "actor"}),
    Chart(
        "Speed by phase",
        "response tokens/s per process",
        {f"speed/{phase}": phase for phase in ("generate", "score", "logprobs", "learn")},
        log=True,
    ),
)


def curves(log_history: Iterable[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Extract the metrics of `CHARTS` over steps, downsampled to at most `MAX_POINTS` by averaging.

    Args:
        log_history: rows as in `TrainerState.log_history`.

    Returns:
        `[steps, values]` by metric. With several evaluation datasets each has its metric, `eval_<set>_<metric>`.
    """
    series: dict[str, list[list[float]]] = {}
    for row in log_history:
        for name, value in row.items():
            if _is_drawn(name) and isinstance(value, int | float) and math.isfinite(value) and "step" in row:
                steps, values = series.setdefault(name, [[], []])
                steps.append(row["step"])
                values.append(float(value))
    return {name: [_downsample(steps), _downsample(values)] for name, (steps, values) in series.items()}


@functools.cache
def _is_drawn(name: str) -> bool:
    """Return whether a metric is in a chart; cached because each page reads the whole log history."""
    base = re.sub(r"^eval_.+?_(?=(reward|kl|entropy|completions/mean_length)$)", "eval_", name)
    return any(base in chart.series for chart in CHARTS)


def _downsample(numbers: list[float]) -> list[float]:
    size = -(-len(numbers) // MAX_POINTS)
    chunks = [numbers[i : i + size] for i in range(0, len(numbers), size)] if size > 1 else []
    return [sum(chunk) / len(chunk) for chunk in chunks] if chunks else list(numbers)


def plot_curves(log_history: Sequence[dict[str, Any]], path: str | Path) -> Path | None:
    """Plot the curves of a run as a PNG, for a model card or a paper.

    Args:
        log_history: rows as in `TrainerState.log_history`.
        path: path of the PNG; its folder is created.

    Returns:
        The path, or None if no metric was logged or matplotlib is not installed (which is warned about once).
    """
    drawn = curves(log_history)
    charts = [chart for chart in CHARTS if any(name in drawn for name in chart.series)]
    figure = _figure() if charts else None
    if figure is None:
        return None
    columns = min(3, len(charts))
    rows = -(-len(charts) // columns)
    figure.set_size_inches(3.6 * columns, 2.5 * rows)
    for index, chart in enumerate(charts):
        axes = figure.add_subplot(rows, columns, index + 1)
        for (name, label), color in zip(chart.series.items(), SERIES_COLORS, strict=False):
            if name in drawn:
                steps, values = drawn[name]
                marker = "o" if name.startswith("eval_") or len(steps) == 1 else None
                axes.plot(steps, values, color=color, label=label, linewidth=1.4, marker=marker, markersize=3)
        axes.set_title(chart.title, fontsize=9)
        axes.set_ylabel(chart.unit, fontsize=7)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        if index + columns >= len(charts):
            axes.set_xlabel("optimizer step", fontsize=7)
        if sum(name in drawn for name in chart.series) > 1:
            axes.legend(fontsize=7, frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


@functools.cache
def _has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        warnings.warn("The curves are not plotted, since matplotlib is missing: pip install matplotlib.", stacklevel=4)
        return False
    return True


def _figure() -> Any:
    if not _has_matplotlib():
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")  # without pyplot, which has global state and may need a display
    FigureCanvasAgg(figure)
    return figure

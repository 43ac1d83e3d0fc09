"""Two metrics of a run over its optimizer steps, as an SVG and as a table in Markdown."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

COLORS = ("#1f77b4", "#d95f02")
MAX_TABLE_ROWS = 12

Labels = Mapping[str, str]
"""Two metrics of Trainer's log, each with the label of its axis; the first is on the left."""


def logged(history: Sequence[Mapping[str, float]], names: Sequence[str]) -> list[Mapping[str, float]]:
    """Return the rows of Trainer's log that have a step and a finite value of each of these metrics."""
    return [row for row in history if all(math.isfinite(row.get(name, math.nan)) for name in ("step", *names))]


def curves_table(history: Sequence[Mapping[str, float]], labels: Labels) -> list[str]:
    """Format at most `MAX_TABLE_ROWS` rows, evenly spread, as a Markdown table; empty if nothing was logged."""
    rows = logged(history, [*labels])
    last = len(rows) - 1
    count = min(len(rows), MAX_TABLE_ROWS)
    shown = sorted({round(i * last / max(1, count - 1)) for i in range(count)})
    lines = [f"| {' | '.join(['step', *labels.values()])} |", "|---" * (1 + len(labels)) + "|"] if rows else []
    return lines + [
        f"| {int(rows[i]['step'])} | {' | '.join(f'{rows[i][name]:.3f}' for name in labels)} |" for i in shown
    ]


def curves_svg(history: Sequence[Mapping[str, float]], labels: Labels, width: int = 640, height: int = 320) -> str:
    """Plot two metrics over optimizer steps, with one y axis for each."""
    rows, margin = logged(history, [*labels]), 56
    right, bottom = width - margin, height - margin

    def scale(name: str, start: float, end: float) -> tuple[list[float], float, float]:
        values = [row[name] for row in rows]
        low, high = min(values), max(values)
        return [start + (end - start) * (v - low) / ((high - low) or 1.0) for v in values], low, high

    def text(x: float, y: float, anchor: str, color: str, label: str) -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{color}">{html.escape(label)}</text>'

    x, first, last = scale("step", margin, right)
    body = [f'<rect width="{width}" height="{height}" fill="white"/>']
    sides = ((margin, -6, ("end", "start")), (right, 6, ("start", "end")))
    for (name, label), color, (edge, outwards, anchors) in zip(labels.items(), COLORS, sides, strict=True):
        y, low, high = scale(name, bottom, margin)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        body.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        for value, at in ((low, bottom), (high, margin)):
            body.append(text(edge + outwards, at, anchors[0], color, f"{value:.2f}"))
        body.append(text(edge, margin - 24, anchors[1], color, label))
    for step, at in ((first, margin), (last, right)):
        body.append(text(at, bottom + 22, "middle", "black", f"step {int(step)}"))
    view = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {view}>\n' + "\n".join(body) + "\n</svg>\n"

"""Logging of tables to the trackers in `report_to`, through the writers of Trainer's integration callbacks."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

import pandas as pd
from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback

# Trainer's callbacks of trackers with tables, and the attribute with the tracker's module.
WRITERS = {WandbCallback: "_wandb", TrackioCallback: "_trackio", MLflowCallback: "_ml_flow"}


def log_table(callbacks: Iterable[TrainerCallback], name: str, columns: dict[str, list[Any]], step: int) -> None:
    """Log a table to every initialized tracker among the callbacks.

    wandb, trackio and MLflow receive a table with the step as its first column, TensorBoard receives text. MLflow keeps
    tables as artifacts, `<name>.json`, to which the rows of later steps are appended.

    Args:
        callbacks: Trainer's callbacks; callbacks that are not trackers, or trackers without tables, are ignored.
        name: name of the table in the tracker.
        columns: columns of equal length, by name: numbers or text.
        step: optimizer step of the table.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(name, markdown_table(columns), step)
            callback.tb_writer.flush()
        attribute = next((each for kind, each in WRITERS.items() if isinstance(callback, kind)), None)
        tracker = getattr(callback, attribute) if attribute else None
        if tracker is None or not callback._initialized:
            continue
        table = pd.DataFrame({"step": [step] * len(next(iter(columns.values()))), **columns})
        if isinstance(callback, MLflowCallback):
            tracker.log_table(table, f"{name}.json")
        else:
            tracker.log({name: tracker.Table(dataframe=table), "train/global_step": step})


def markdown_table(columns: dict[str, list[Any]]) -> str:
    """Format columns as a Markdown table, with markup, links and images in the text escaped."""
    rows = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    lines = [[value if i == 1 else _escape_markdown(value) for value in row] for i, row in enumerate(rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape_markdown(value: Any) -> str:
    text = f"{value:.2f}" if isinstance(value, float) else str(value)
    escaped = re.sub(r"([\\`*_{}\[\]()#+.!|~-])", r"\\\1", html.escape(text, quote=False))
    return "<br>".join(escaped.splitlines())

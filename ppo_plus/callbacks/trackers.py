"""Tables for the trackers that `report_to` names. Trainer's own callbacks hold the writers; here is what they lack."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

import pandas as pd
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


def log_table(callbacks: Iterable[TrainerCallback], name: str, columns: dict[str, list[Any]], step: int) -> None:
    """Write a table to every tracker among the callbacks that has been started.

    wandb and trackio get a table with the step as its first column, TensorBoard gets text.

    Args:
        callbacks: Trainer's; those that are no trackers, or trackers without tables, are left alone.
        name: of the table in the tracker.
        columns: of equal length, by name: numbers or text.
        step: the optimizer step that it belongs to.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(name, markdown_table(columns), step)
            callback.tb_writer.flush()
        tracker = getattr(callback, "_wandb" if isinstance(callback, WandbCallback) else "_trackio", None)
        if isinstance(callback, WandbCallback | TrackioCallback) and tracker is not None and callback._initialized:
            rows = len(next(iter(columns.values())))
            table = tracker.Table(dataframe=pd.DataFrame({"step": [step] * rows, **columns}))
            tracker.log({name: table, "train/global_step": step})


def markdown_table(columns: dict[str, list[Any]]) -> str:
    """Columns as a table in Markdown that shows text as it is: nothing in it is markup, a link or an image."""
    rows = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    lines = [[value if at == 1 else _shown(value) for value in row] for at, row in enumerate(rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: Any) -> str:
    text = f"{value:.2f}" if isinstance(value, float) else str(value)
    escaped = re.sub(r"([\\`*_{}\[\]()#+.!|~-])", r"\\\1", html.escape(text, quote=False))
    return "<br>".join(escaped.splitlines())

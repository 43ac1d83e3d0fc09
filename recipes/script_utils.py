"""Helpers of `reward_model.py` and `ppo.py`: load datasets, rewards and model arguments from the command line."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from trl import ModelConfig

FORMAT_BY_SUFFIX = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
FUNCTION_PATTERN = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


def load_rows(name: str, split: str = "train", config: str | None = None) -> Dataset:
    """Load rows of a local file (json, jsonl, csv, parquet), or of a split of a dataset on the Hub."""
    file = Path(name)
    if file.suffix not in FORMAT_BY_SUFFIX:
        return load_dataset(name, config, split=split)
    if not file.is_file():
        raise SystemExit(f"The file {name} does not exist. Pass an existing file, or the name of a dataset on the Hub.")
    return load_dataset(FORMAT_BY_SUFFIX[file.suffix], data_files=str(file), split="train")


def train_and_eval_rows(
    name: str, config: str | None, train_split: str, test_split: str | None, eval_rows: int
) -> tuple[Dataset, Dataset | None]:
    """Load training and evaluation rows; the latter from the test split, or the last `eval_rows` training rows."""
    if type(eval_rows) is not int or eval_rows < 0:
        raise SystemExit(f"--eval_rows must be a whole number, 0 or more; got {eval_rows!r}.")
    rows = load_rows(name, train_split, config)
    if test_split is not None:
        if Path(name).suffix in FORMAT_BY_SUFFIX:
            raise SystemExit(f"{name} is a file and has no split {test_split!r}: use --eval_rows to hold out rows.")
        held_out = load_rows(name, test_split, config)
        return rows, held_out.select(range(min(eval_rows, len(held_out)))) if eval_rows else held_out
    if not eval_rows:
        return rows, None
    if eval_rows >= len(rows):
        raise SystemExit(
            f"--eval_rows {eval_rows} leaves no training rows: {name} has {len(rows)} rows. Lower --eval_rows."
        )
    return rows.select(range(len(rows) - eval_rows)), rows.select(range(len(rows) - eval_rows, len(rows)))


def load_reward(name: str) -> Any:
    """Import a function named `module:function`, also from the working directory; return other names unchanged."""
    match = FUNCTION_PATTERN.fullmatch(name)
    if match is None:
        return name
    module, function = match.groups()
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"The reward {name!r} cannot be imported: {error}. Pass it as module:function.") from error
    finally:
        sys.path.remove(str(Path.cwd()))


def init_kwargs(model: ModelConfig, model_init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Merge the flags of `ModelConfig` and `model_init_kwargs` to arguments of `from_pretrained`."""
    flags = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
    }
    return {name: value for name, value in flags.items() if value is not None} | (model_init_kwargs or {})

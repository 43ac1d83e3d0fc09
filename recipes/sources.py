"""From words on a command line to a dataset, a reward, a base model: what `reward_model.py` and `ppo.py` share."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from trl import ModelConfig

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
FUNCTION = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


def load_rows(name: str, split: str = "train", config: str | None = None) -> Dataset:
    """Rows of a local file (json, jsonl, csv, parquet), or of a split of a dataset on the Hub."""
    file = Path(name)
    if file.suffix not in READERS:
        return load_dataset(name, config, split=split)
    if not file.is_file():
        raise SystemExit(f"There is no file {name}. Give a file that exists, or the name of a dataset on the Hub.")
    return load_dataset(READERS[file.suffix], data_files=str(file), split="train")


def train_and_eval_rows(
    name: str, config: str | None, train_split: str, test_split: str | None, eval_rows: int
) -> tuple[Dataset, Dataset | None]:
    """Rows to train on and rows to evaluate on: a split of their own, or the last `eval_rows` of the training rows."""
    if type(eval_rows) is not int or eval_rows < 0:
        raise SystemExit(f"--eval_rows must be a whole number, 0 or more; got {eval_rows!r}.")
    rows = load_rows(name, train_split, config)
    if test_split is not None:
        if Path(name).suffix in READERS:
            raise SystemExit(f"{name} is a file and has no split {test_split!r}: use --eval_rows to hold rows out.")
        held_out = load_rows(name, test_split, config)
        return rows, held_out.select(range(min(eval_rows, len(held_out)))) if eval_rows else held_out
    if not eval_rows:
        return rows, None
    if eval_rows >= len(rows):
        raise SystemExit(f"--eval_rows {eval_rows} leaves nothing to train on: {name} has {len(rows)} rows.")
    return rows.select(range(len(rows) - eval_rows)), rows.select(range(len(rows) - eval_rows, len(rows)))


def load_reward(name: str) -> Any:
    """A Python function named `module:function` (modules of the working directory count), or the name as it is."""
    match = FUNCTION.fullmatch(name)
    if match is None:
        return name
    module, function = match.groups()
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"The reward {name!r} cannot be had: {error}. Write module:function.") from error
    finally:
        sys.path.remove(str(Path.cwd()))


def init_kwargs(model: ModelConfig, given: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of `from_pretrained`: what the flags of `ModelConfig` say, and what the configuration adds."""
    named = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
    }
    return {name: value for name, value in named.items() if value is not None} | (given or {})

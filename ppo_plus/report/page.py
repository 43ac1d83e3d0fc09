"""The page: a template and the data of runs as JSON, written as one file and read again from it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .curves import CHARTS

REPORT = "report.html"
TEMPLATE = Path(__file__).with_name("template.html")
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
FORMAT_VERSION = 1
PARTS = {"settings": dict, "curves": dict, "answers": list, "rollouts": list}  # what the page needs of a run


def to_script_json(data: Any) -> str:
    """JSON that stands safely inside a `<script>` element; NaN and infinities become null."""
    text = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # In strings only: JSON has none of these outside them. No `</script>`, no `<!--`, whatever a model writes.
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(name): _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    if isinstance(data, float):
        return float(f"{data:.5g}") if math.isfinite(data) else None
    return data if isinstance(data, int | str | bool | None) else str(data)


def write_page(path: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Write the page of one run, or of several side by side; readers never see half of it.

    Args:
        path: of the page.
        runs: what `RunReportCallback` collected, or `read_run` read.
    """
    data = to_script_json({"format": FORMAT_VERSION, "runs": list(runs), "charts": [asdict(chart) for chart in CHARTS]})
    before, after = TEMPLATE.read_text(encoding="utf-8").split("__DATA__")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes((before + data + after).encode("utf-8", "replace"))
        aside.replace(path)
    finally:
        with contextlib.suppress(OSError):  # it is not there any more, unless something went wrong
            aside.unlink()


def read_run(path: Path) -> dict[str, Any]:
    """The run in a page of one.

    Raises:
        ValueError: there is no such page, or it is none of ours, or a newer one.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist. PPOTrainer writes it as it trains, unless html_report=False.")
    try:
        found = DATA.search(path.read_text(encoding="utf-8"))
        data = json.loads(found[1]) if found else {}
    except (ValueError, RecursionError):  # no UTF-8, or no JSON
        data = {}
    version, runs = (data.get("format"), data.get("runs")) if isinstance(data, dict) else (None, None)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(f"{path} was written by a newer ppo_plus (format {version}). Upgrade ppo_plus.")
    if not isinstance(runs, list) or len(runs) != 1 or not _is_run(runs[0]):
        raise ValueError(f"{path} is not the report of one run, or damaged: give the output folder of a PPOTrainer.")
    return runs[0]


def _is_run(data: Any) -> bool:
    return isinstance(data, dict) and all(isinstance(data.get(name), kind) for name, kind in PARTS.items())

"""Report page: an HTML template with the data of runs as JSON, in one file that can be read back."""

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
REQUIRED_PARTS = {"settings": dict, "curves": dict, "answers": list, "rollouts": list}  # type by key of a run's data


def to_script_json(data: Any) -> str:
    """Serialize data as JSON that is safe inside a `<script>` element; NaN and infinities become null."""
    text = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # JSON has these characters only inside strings. Escaping them prevents `</script>` and `<!--` in generated text.
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
    """Write the page of one or several runs atomically.

    Args:
        path: path of the page.
        runs: data of runs, from `RunReportCallback` or `read_run`.
    """
    data = to_script_json({"format": FORMAT_VERSION, "runs": list(runs), "charts": [asdict(chart) for chart in CHARTS]})
    before, after = TEMPLATE.read_text(encoding="utf-8").split("__DATA__")
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp_path = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        tmp_path.write_bytes((before + data + after).encode("utf-8", "replace"))
        tmp_path.replace(path)
    finally:
        with contextlib.suppress(OSError):  # after a successful rename it does not exist
            tmp_path.unlink()


def read_run(path: Path) -> dict[str, Any]:
    """Read the data of a run from its report page.

    Raises:
        ValueError: the page does not exist, is not a report of one run, or has a newer format.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist. PPOTrainer writes it during training, unless html_report=False.")
    try:
        match = DATA.search(path.read_text(encoding="utf-8"))
        data = json.loads(match[1]) if match else {}
    except (ValueError, RecursionError):  # not UTF-8, or not JSON
        data = {}
    version, runs = (data.get("format"), data.get("runs")) if isinstance(data, dict) else (None, None)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(f"{path} was written by a newer ppo_plus (format {version}). Upgrade ppo_plus.")
    if not isinstance(runs, list) or len(runs) != 1 or not _is_run(runs[0]):
        raise ValueError(f"{path} is not the report of one run, or damaged: pass the output folder of a PPOTrainer.")
    return runs[0]


def _is_run(data: Any) -> bool:
    return isinstance(data, dict) and all(isinstance(data.get(name), kind) for name, kind in REQUIRED_PARTS.items())

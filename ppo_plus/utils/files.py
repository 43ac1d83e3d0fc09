"""Reading JSON and safetensors files so that a damaged one is named."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextlib.contextmanager
def reraise_as_corrupt_file(path: str | Path) -> Iterator[None]:
    """Name the file where safetensors or JSON inside the block turn out to be damaged."""
    try:
        yield
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): it is truncated or damaged. Use an earlier checkpoint."
        ) from error


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    with reraise_as_corrupt_file(file):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} must hold a JSON object, and holds {json.dumps(content)[:60]}: it is damaged, or another file."
        )
    return content

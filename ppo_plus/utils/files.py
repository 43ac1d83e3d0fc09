"""Reading of JSON and safetensors files, with errors that name a damaged file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextlib.contextmanager
def reraise_as_corrupt_file(path: str | Path) -> Iterator[None]:
    """Re-raise safetensors and JSON decoding errors of the block as a ValueError that names the file."""
    try:
        yield
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): it is truncated or damaged. Use an earlier checkpoint."
        ) from error


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        ValueError: the file is damaged, or contains another type.
    """
    with reraise_as_corrupt_file(file):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} must contain a JSON object; got {json.dumps(content)[:60]}. The file is damaged, or it is not "
            "the expected file. Use an earlier checkpoint."
        )
    return content

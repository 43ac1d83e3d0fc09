"""Prints pip constraints that hold what pyproject.toml names at its lower bounds.

    python .ci/lower_bounds.py [NAME==VERSION ...]

An argument replaces the bound of that library.
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
pins = dict(
    re.fullmatch(r"([\w-]+)[>=]=([\w.]+)", requirement).groups()
    for requirement in [*project["dependencies"], *extras["demo"], *extras["test"]]
)
pins |= dict(pin.split("==") for pin in sys.argv[1:])
print("\n".join(f"{name}=={version}" for name, version in pins.items()))

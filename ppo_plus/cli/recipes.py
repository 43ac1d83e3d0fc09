"""Recipes and launch profiles that are installed with the package, as files; nothing here is imported from them."""

from __future__ import annotations

import runpy
import shutil
import sys
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

from ..utils.versions import installed_version

_PACKAGE = Path(__file__).parents[1]
PROFILES = Path(__file__).parent / "accelerate_configs"


def folder() -> Path:
    """Return the folder of the recipes: inside an installed package, or at the top of the repository."""
    installed = _PACKAGE / "recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def names() -> list[str]:
    """Return the names of the recipes: folders with YAML files."""
    return sorted({file.parent.name for file in folder().glob("*/*.yaml")})


def profiles() -> list[str]:
    """Return the names that `--accelerate_config` accepts besides files."""
    return sorted(file.stem for file in PROFILES.glob("*.yaml"))


def title(name: str) -> str:
    """Return the heading of a recipe's README."""
    lines = (folder() / name / "README.md").read_text(encoding="utf-8").splitlines()
    return lines[0].removeprefix("# ")


def copy_files(name: str, target: str) -> list[Path]:
    """Copy the YAML files of a recipe into a new folder and return their paths.

    Raises:
        ValueError: no recipe has this name.
        FileExistsError: the target exists.
    """
    if name not in names():
        raise ValueError(f"There is no recipe {name!r}. Choose one of {', '.join(names())}.")
    if Path(target).exists():
        raise FileExistsError(f"{target} exists already. Choose another folder with --output.")
    Path(target).mkdir(parents=True)
    return [Path(shutil.copy(file, target)) for file in sorted((folder() / name).glob("*.yaml"))]


def missing_requirements(extra: str) -> list[str]:
    """Return the requirements of an extra of this package that are not installed."""
    requirements = [Requirement(line) for line in requires("ppo-plus") or []]
    needed = [each.name for each in requirements if each.marker and each.marker.evaluate({"extra": extra})]
    return [name for name in needed if installed_version(name) is None]


def run_demo(arguments: list[str]) -> None:
    """Run the script of the recipe `demo` in this process."""
    script = folder() / "demo" / "rm_then_ppo.py"
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")

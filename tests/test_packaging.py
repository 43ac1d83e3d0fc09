"""What an installation brings, asked of the build itself: a module left out is not missed where the source lies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def files(folder: Path) -> set[str]:
    """Paths of all files below `folder`, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def copy_source(folder: Path) -> Path:
    """Copy what a build needs, and return the folder."""
    for name in ("ppo_plus", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(tmp_path: Path, unlisted: str = "") -> tuple[set[str], set[str]]:
    """Files of the package, and those that setuptools builds from them without the line `unlisted` of pyproject."""
    source, built = copy_source(tmp_path / "source"), tmp_path / "built"
    project = (ROOT / "pyproject.toml").read_text()
    assert unlisted in project
    (source / "pyproject.toml").write_text(project.replace(unlisted, ""))
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "build", "--build-lib", str(built)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    recipes = {f"recipes/{name}" for name in files(source / "recipes")}
    return files(source / "ppo_plus") | recipes, files(built / "ppo_plus")


def test_every_file_of_the_package_is_installed(tmp_path):
    source, built = build(tmp_path)
    assert built == source
    assert {"py.typed", "report/template.html", "memory/__main__.py", "recipes/demo/assets.txt"} <= built


@pytest.mark.parametrize(
    ("unlisted", "missing"),
    [('"ppo_plus.report" = ["template.html"]', {"report/template.html"}), ('"ppo_plus.utils",', None)],
)
def test_a_file_that_is_not_named_would_be_missed(tmp_path, unlisted, missing):
    """Negative control of the above."""
    source, built = build(tmp_path, unlisted)
    missing = missing or {name for name in source if name.startswith("utils/")}
    assert missing and source - built == missing


def test_an_installed_wheel_has_the_command_and_the_recipes(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source, target = copy_source(tmp_path / "source"), tmp_path / "target"
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*pip, "wheel", *options, str(source)], check=True)
    (wheel,) = tmp_path.glob("ppo_plus-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    command = [sys.executable, str(target / "bin" / "ppo-plus")]
    done = subprocess.run([*command, "init", "tldr"], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert done.stdout.decode().split() == [str(Path("tldr") / "ppo.yaml")]
    assert (tmp_path / "tldr" / "ppo.yaml").read_bytes() == (ROOT / "recipes" / "tldr" / "ppo.yaml").read_bytes()

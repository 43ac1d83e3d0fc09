"""What an installation brings, asked of the build itself: a module left out is not missed where the source lies."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def files(folder: Path) -> set[str]:
    """Paths of all files below `folder`, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def build(tmp_path: Path, unlisted: str = "") -> tuple[set[str], set[str]]:
    """Files of the package, and those that setuptools builds from them without the line `unlisted` of pyproject."""
    source, built = tmp_path / "source", tmp_path / "built"
    shutil.copytree(ROOT / "ppo_plus", source / "ppo_plus", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    project = (ROOT / "pyproject.toml").read_text()
    assert unlisted in project
    (source / "pyproject.toml").write_text(project.replace(unlisted, ""))
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "build", "--build-lib", str(built)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return files(source / "ppo_plus"), files(built / "ppo_plus")


def test_every_file_of_the_package_is_installed(tmp_path):
    source, built = build(tmp_path)
    assert built == source
    assert {"py.typed", "report/template.html", "memory/__main__.py"} <= built


def test_a_file_that_is_not_named_would_be_missed(tmp_path):
    """Negative control of the above."""
    source, built = build(tmp_path, unlisted='"ppo_plus.report" = ["template.html"]')
    assert source - built == {"report/template.html"}

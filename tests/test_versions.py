"""Supported versions: pyproject.toml and constraints.txt agree with one table; an import refuses or names others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from ppo_plus.utils.versions import SUPPORTED_VERSIONS, check_versions, installed_versions

ROOT = Path(__file__).parents[1]
LIBRARIES = [*SUPPORTED_VERSIONS]


def newest(**other: str) -> dict[str, Version]:
    tested = {name: limit.newest_tested for name, limit in SUPPORTED_VERSIONS.items()}
    return {name: Version(v) for name, v in {**tested, **other}.items()}


def oldest(**other: str) -> dict[str, Version]:
    bounds = {name: limit.oldest for name, limit in SUPPORTED_VERSIONS.items()}
    return {name: Version(v) for name, v in {**bounds, **other}.items()}


def test_the_lower_bounds_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = {r.name: str(r.specifier) for r in map(Requirement, project["dependencies"])}
    assert bounds == {name: f">={limit.oldest}" for name, limit in SUPPORTED_VERSIONS.items()}


def test_the_newest_tested_versions_are_those_of_constraints():
    """A pin may be older than the newest version tested where its comment names that one."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", "\n".join(lines), re.MULTILINE))
    later = dict(re.findall(r"^([\w-]+)==\S+ +# newest tested: (\S+)$", "\n".join(lines), re.MULTILINE))
    assert {**pins, **later}.items() >= {name: v.newest_tested for name, v in SUPPORTED_VERSIONS.items()}.items()
    assert all(Version(pins[name]) < Version(tested) for name, tested in later.items())


def test_every_library_is_looked_at():
    found = installed_versions()
    assert list(found) == LIBRARIES
    assert all(v.local is None for v in found.values())  # "2.13.0+cpu" is newer than "2.13.0" to `Version`


@pytest.mark.parametrize("versions", [oldest(), newest()])
def test_the_supported_range_is_taken_without_a_word(versions):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_versions(versions)


@pytest.mark.parametrize("name", LIBRARIES)
def test_an_older_library_is_refused_with_the_version_and_the_command(name):
    with pytest.raises(
        ImportError, match=rf'{name} 0\.0\.1\b.*pip install -U "{name}>={SUPPORTED_VERSIONS[name].oldest}"'
    ):
        check_versions(newest(**{name: "0.0.1"}))


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_newer_library_is_named_in_one_warning(name):
    tested = SUPPORTED_VERSIONS[name].newest_tested
    with pytest.warns(UserWarning) as caught:
        check_versions(newest(**{name: "999.0"}))
    assert len(caught) == 1
    assert f"{name} 999.0" in str(caught[0].message) and f"{name} {tested}" in str(caught[0].message)
    assert not any(other in str(caught[0].message) for other in LIBRARIES if other not in name)


def test_several_newer_libraries_share_a_warning():
    with pytest.warns(UserWarning, match=r"torch 999\.0, trl 999\.1") as caught:
        check_versions(newest(torch="999.0", trl="999.1"))
    assert len(caught) == 1


@pytest.fixture
def old_transformers(tmp_path):
    """Paths of a process that finds the metadata of an old transformers first."""
    info = tmp_path / "transformers-5.20.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.20.0\n", encoding="utf-8")
    return [str(tmp_path), str(ROOT)]


def run_python(paths, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_the_import_refuses_before_it_imports_anything_large(old_transformers):
    script = (
        "import sys\ntry:\n    import ppo_plus\nexcept ImportError as error:\n    print(error, 'torch' in sys.modules)"
    )
    result = run_python(old_transformers, "-c", script)
    assert "transformers 5.20.0" in result.stdout and result.stdout.endswith("False\n")


COMMAND = "import sys\nfrom ppo_plus.cli.main import main\nsys.exit(main())\n"  # what pip writes into its script


@pytest.mark.parametrize(
    "words",
    [["ppo-plus", "env"], ["ppo-plus-script.py", "ppo"], ["-m", "ppo_plus.cli.main", "env"], ["-m", "ppo_plus.memory"]],
)
def test_a_command_refuses_an_old_library_in_one_line(tmp_path, old_transformers, words):
    module = words[0] == "-m"
    if not module:
        (tmp_path / words[0]).write_text(COMMAND, encoding="utf-8")
    result = run_python(old_transformers, words[0] if module else str(tmp_path / words[0]), *words[1:])
    name = f"python -m {words[1]}" if module else "ppo-plus"
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(
        rf'{name}: error: ppo_plus .*transformers 5\.20\.0\. Run: pip .*"transformers>=[\d.]+"\n', result.stderr
    )


def test_a_program_that_imports_the_package_keeps_its_import_error(tmp_path, old_transformers):
    """Neither its own name nor `-m` makes it one of our commands: it may go on without the package."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text(
        "try:\n    import ppo_plus\nexcept ImportError as error:\n    print(error)\n", encoding="utf-8"
    )
    (tmp_path / "mine/__main__.py").write_text("print('went on')\n", encoding="utf-8")
    result = run_python(old_transformers, "-m", "mine", "-m", "ppo_plus.memory")
    assert result.returncode == 0 and "transformers 5.20.0" in result.stdout
    assert result.stdout.endswith("went on\n") and result.stderr == ""

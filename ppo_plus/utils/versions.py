"""Supported and tested versions of the libraries that ppo_plus depends on."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath

from packaging.version import Version


@dataclass(frozen=True)
class SupportedVersions:
    """Versions of one library.

    Attributes:
        oldest: the lower bound in pyproject.toml; `make test-oldest` runs with it.
        newest_tested: the newest version that the tests run with, as pinned in constraints.txt; `make test-latest`
            tests newer ones.
    """

    oldest: str
    newest_tested: str


SUPPORTED_VERSIONS: Mapping[str, SupportedVersions] = {
    "torch": SupportedVersions("2.8", "2.14.1"),
    "transformers": SupportedVersions("5.23", "5.24.0"),
    "trl": SupportedVersions("1.16", "1.16.0"),
    "peft": SupportedVersions("0.21", "0.21.2"),
    "bitsandbytes": SupportedVersions("0.46.1", "0.50.2"),
    "accelerate": SupportedVersions("1.10.1", "1.15.0"),
    "datasets": SupportedVersions("4.7", "5.2.0"),
    "safetensors": SupportedVersions("0.8", "0.8.0"),
    "click": SupportedVersions("8.4.2", "8.5.1"),
}


def installed_version(name: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def installed_versions() -> dict[str, Version]:
    """Return the installed versions of these libraries, without local labels such as `+cpu`."""
    versions = {name: installed_version(name) for name in SUPPORTED_VERSIONS}  # importing a missing one raises
    return {name: Version(Version(number).public) for name, number in versions.items() if number is not None}


def check_versions(installed: Mapping[str, Version]) -> None:
    """Refuse libraries older than their lower bound, and warn once about all newer than tested.

    Args:
        installed: installed version by library.

    Raises:
        ImportError: a library is older than the lower bound.
    """
    limits = {name: SUPPORTED_VERSIONS[name] for name in installed}
    old = [name for name, limit in limits.items() if installed[name] < Version(limit.oldest)]
    if old:
        requirements = " ".join(f'"{name}>={limits[name].oldest}"' for name in old)
        raise ImportError(
            f"ppo_plus does not support {_format_versions(old, installed)}. Run: pip install -U {requirements}"
        )
    new = [name for name, limit in limits.items() if installed[name] > Version(limit.newest_tested)]
    if new:
        tested = ", ".join(f"{name} {limits[name].newest_tested}" for name in new)
        warnings.warn(
            f"ppo_plus was not tested with {_format_versions(new, installed)}; the newest tested versions are "
            f"{tested}. If a run fails, install these.",
            stacklevel=2,
        )


def exit_if_command(message: str) -> None:
    """Print an error and exit with status 2 if this process is `ppo-plus` or `python -m ppo_plus...`; else do nothing.

    The versions are checked when the package is imported, which a command does before its own code runs.

    Args:
        message: the error, without the name of the command.

    Raises:
        SystemExit: this process is a command of ppo_plus.
    """
    if name := _command_name():
        print(f"{name}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def _command_name() -> str | None:
    program = PurePath(sys.argv[0] if getattr(sys, "argv", None) else "")  # an embedded interpreter has none
    if program.stem.removesuffix("-script") == "ppo-plus":  # without .exe and -script.py of Windows
        return "ppo-plus"
    if program.name != "-m":  # stands there while Python looks for the module, and so imports its package
        return None
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if "-m" in sys.orig_argv else []
    return f"python -m {module[0]}" if module and module[0].partition(".")[0] == "ppo_plus" else None


def _format_versions(names: list[str], installed: Mapping[str, Version]) -> str:
    return ", ".join(f"{name} {installed[name]}" for name in names)

"""`ppo-plus env`: versions and devices of this machine, and what was tested."""

from __future__ import annotations

import os
import platform

import torch

from .. import __version__
from ..utils.versions import SUPPORTED_VERSIONS, installed_version


def _devices() -> list[str]:
    """Describe each accelerator and the CPU with what decides precision and speed."""
    lines = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        lines.append(
            f"{card.name}, {card.total_memory / 2**30:.1f} GiB, compute capability {card.major}.{card.minor}, "
            f"CUDA {torch.version.cuda or torch.version.hip}"
        )
    if not lines and torch.accelerator.is_available():
        lines.append(str(torch.accelerator.current_accelerator()))
    abilities = [name for name, able in torch.cpu.get_capabilities().items() if able is True and "bf16" in name]
    cpu = f"{os.cpu_count()} CPU cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return [*lines, ", ".join([cpu, *abilities])]


def describe() -> str:
    """Return versions, devices and tested ranges as a Markdown list."""
    rows = {"ppo_plus": __version__, "Python": platform.python_version(), "platform": platform.platform()}
    rows |= {f"device {index}": device for index, device in enumerate(_devices())}
    for name, limit in SUPPORTED_VERSIONS.items():
        number = installed_version(name) or "not installed"
        rows[name] = f"{number} (tested: {limit.oldest} to {limit.newest_tested})"
    rows["tested on"] = "CPUs; CUDA is emulated in tests, and `make gpu` runs them on a card"
    return "\n".join(f"- {name}: {value}" for name, value in rows.items())

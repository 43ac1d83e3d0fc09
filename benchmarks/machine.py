"""What every result says about where it was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import date

import torch

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "ppo-plus")


def describe_machine() -> dict:
    """Machine, versions and date."""
    return {
        "machine": {
            "cpu_cores": os.cpu_count(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "architecture": platform.machine(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "date": date.today().isoformat(),
    }

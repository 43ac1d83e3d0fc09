"""What every result says about where it was measured, and the model that is measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "ppo-plus")


def cpu_capability() -> str:
    """Vector instructions, and AMX where there is one: bf16 products are several times faster with it."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.backends.cpu.get_cpu_capability() + (" with AMX" if known.get("amx_bf16") else "")


def describe_machine(**instead: str) -> dict:
    """Machine, versions and date; `instead` names versions that were measured in place of the installed ones."""
    return {
        "machine": {
            "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "cpu_capability": cpu_capability(),
            "architecture": platform.machine(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES} | instead,
        "date": date.today().isoformat(),
    }


def smollm2() -> str:
    """The folder of SmolLM2-135M-Instruct, from its package."""
    sys.path.insert(0, str(ROOT / "recipes"))
    from demo_assets import load_smollm2

    return str(load_smollm2())

"""What every result says about where it was measured, and the model that is measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
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
            **describe_card(),
        },
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES} | instead,
        "date": date.today().isoformat(),
    }


def describe_card() -> dict:
    """Return memory, compute capability, CUDA and driver version of the first card; empty where there is none."""
    if not torch.cuda.is_available():
        return {}
    card, driver = torch.cuda.get_device_properties(0), None
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        driver = lines[0].strip() if lines else None
    return {
        "gpu_memory_gb": round(card.total_memory / 2**30, 1),
        "gpu_capability": f"{card.major}.{card.minor}",
        "cuda": torch.version.cuda,
        "driver": driver,
    }


def smollm2() -> str:
    """The folder of SmolLM2-135M-Instruct, from its package."""
    sys.path.insert(0, str(ROOT / "recipes" / "demo"))
    from demo_assets import load_smollm2

    return str(load_smollm2())

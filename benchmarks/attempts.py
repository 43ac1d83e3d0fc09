"""Runs that are interrupted and resumed, each attempt in a process of its own: start, wait, interrupt, compare."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

FILES = ("adapter_model.safetensors", "value_head.safetensors")


def end_of(log: Path) -> str:
    """Return the last lines of a log."""
    return log.read_text(encoding="utf-8", errors="replace")[-2000:]


def start_attempt(script: str | Path, arguments: Sequence[str], log: Path) -> subprocess.Popen:
    """Start a script in a process of one thread, whose output goes to a log file and never fills a pipe."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        return subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def wait_for(process: subprocess.Popen, reached: Callable[[], bool], log: Path) -> None:
    """Wait until a condition holds; exit with the end of the log where the process ends before that."""
    while not reached():
        if process.poll() is not None:
            sys.exit(f"The run ended by itself with exit status {process.returncode}:\n{end_of(log)}")
        time.sleep(0.01)


def interrupt(process: subprocess.Popen, number: signal.Signals, log: Path) -> None:
    """Send a signal and wait for the process; exit where another cause ended it first."""
    process.send_signal(number)
    if (status := process.wait()) != -number:
        sys.exit(f"{number.name} was sent, and the exit status is {status}:\n{end_of(log)}")


def finish(process: subprocess.Popen, log: Path) -> None:
    """Wait for a process to end its run; exit with the end of its log where it fails."""
    if status := process.wait():
        sys.exit(f"The run ended with exit status {status}:\n{end_of(log)}")


def equal_weights(first: Path, second: Path) -> bool:
    """Return whether two saved policies have the same adapter, value head and metadata, bit for bit.

    Files are not compared by their bytes, because safetensors writes the entries of its metadata in any order.
    """
    return all(read_bits(first / name) == read_bits(second / name) for name in FILES)


def read_bits(file: Path) -> tuple[dict, dict]:
    """Return a safetensors file's metadata and, by name, each tensor's dtype, shape and bytes."""
    with safe_open(file, "pt") as saved:
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118  # it is no dict
        metadata = saved.metadata() or {}
    bits = {name: (t.dtype, t.shape, t.contiguous().view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}
    return metadata, bits

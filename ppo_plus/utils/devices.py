"""What a device lacks. Imports torch only."""

from __future__ import annotations

import functools

import torch

SAVED_BY_TRAINER = ("cuda", "npu", "hpu", "mlu", "musa")  # of which Trainer's checkpoints hold the random numbers


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Try whether a device computes in float64: Apple's GPUs do not, nor do some of Intel's."""
    if device.type in ("cpu", "cuda", "meta"):
        return True
    try:
        torch.ones(2, dtype=torch.float64, device=device).add(1).tolist()
    except (TypeError, RuntimeError):
        return False
    return True


def float64_device(device: torch.device) -> torch.device:
    """Return the device on which numbers of this one are computed in float64: itself, or the CPU."""
    return device if has_float64(device) else torch.device("cpu")


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the most precise dtype for sums that stay on a device."""
    return torch.float64 if has_float64(device) else torch.float32


def generator_state() -> str | None:
    """Return the accelerator's type and the state of its random numbers, `type:hexadecimal`.

    None on a CPU, and where Trainer saves it.
    """
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type in SAVED_BY_TRAINER:
        return None
    state = torch.get_device_module(accelerator).get_rng_state()
    return f"{accelerator.type}:{bytes(state.cpu().tolist()).hex()}"


def set_generator_state(state: str) -> None:
    """Set the accelerator's random numbers to what `generator_state` returned; do nothing on another kind of it."""
    accelerator, (kind, numbers) = torch.accelerator.current_accelerator(), state.split(":")
    if accelerator is not None and accelerator.type == kind:
        torch.get_device_module(kind).set_rng_state(torch.tensor(list(bytes.fromhex(numbers)), dtype=torch.uint8))

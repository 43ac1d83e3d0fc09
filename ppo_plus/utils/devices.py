"""Device capabilities and random number generator states that differ between accelerators."""

from __future__ import annotations

import functools

import torch

RNG_SAVED_BY_TRAINER = ("cuda", "npu", "hpu", "mlu", "musa")  # device types whose RNG state Trainer checkpoints


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Return whether a device supports float64; Apple's GPUs and some of Intel's do not."""
    if device.type in ("cpu", "cuda", "meta"):
        return True
    try:
        torch.ones(2, dtype=torch.float64, device=device).add(1).tolist()
    except (TypeError, RuntimeError):
        return False
    return True


def float64_device(device: torch.device) -> torch.device:
    """Return the device to use for float64 computations: the device itself, or the CPU."""
    return device if has_float64(device) else torch.device("cpu")


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the most precise dtype for sums on a device: float64, or float32 where it is missing."""
    return torch.float64 if has_float64(device) else torch.float32


def generator_state() -> str | None:
    """Return the accelerator's type and RNG state as `type:hexadecimal`.

    None on a CPU, and for device types whose RNG state Trainer saves.
    """
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type in RNG_SAVED_BY_TRAINER:
        return None
    state = torch.get_device_module(accelerator).get_rng_state()
    return f"{accelerator.type}:{bytes(state.cpu().tolist()).hex()}"


def set_generator_state(state: str) -> None:
    """Restore the accelerator's RNG state from `generator_state`; do nothing on another device type."""
    accelerator, (device_type, hex_state) = torch.accelerator.current_accelerator(), state.split(":")
    if accelerator is not None and accelerator.type == device_type:
        rng_state = torch.tensor(list(bytes.fromhex(hex_state)), dtype=torch.uint8)
        torch.get_device_module(device_type).set_rng_state(rng_state)

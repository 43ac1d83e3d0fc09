"""Deterministic seeds and random numbers as pure functions of the position in training."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, *key: int | str) -> int:
    """Derive a 63-bit seed that depends only on `seed` and a key such as `("sampling", rollout_index)`."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextlib.contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch inside the block, and restore their states after it.

    User code such as reward functions may draw random numbers in rollouts and evaluations. Without isolation, the
    number of evaluations would change the results of training.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator()
    with torch.random.fork_rng(device_type="cuda" if accelerator is None else accelerator.type):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def sampling_uniforms(seed: int, rows: int, length: int) -> Tensor:
    """Draw the uniforms that determine every sampled token, `(rows, length)` float64 on the CPU.

    They are drawn per row and position rather than per decoding step, so a response does not depend on the generation
    batch size, on the order of the rows, or on when other rows finish.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, length, generator=generator, dtype=torch.float64)

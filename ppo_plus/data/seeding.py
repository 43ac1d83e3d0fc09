"""Seeds and random numbers as pure functions of a position in training."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, *position: int | str) -> int:
    """A 63-bit seed that depends on nothing but `seed` and a position such as `("sampling", rollout_index)`."""
    digest = hashlib.blake2b(repr((seed, *position)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextlib.contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's generators inside the block and put them back after it.

    User code runs inside rollouts and evaluations (reward functions may draw numbers); without this, how often
    one evaluates would change how one trains.
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
    """Uniform numbers that decide every sampled token, `(rows, length)` float64 on the CPU.

    Drawn per row and position rather than per step, so a response does not depend on the size of the decode
    batch, on the order of its rows, or on when its neighbours finished.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, length, generator=generator, dtype=torch.float64)

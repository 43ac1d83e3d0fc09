"""The result of decoding, and rows of a key-value cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class GenerateOutput:
    """Sampled responses: `tokens` `(B, R)` int64, padded after the stop token, and their `logprobs` `(B, R)`, nats."""

    tokens: Tensor
    logprobs: Tensor


def select_rows(cache: Any, rows: Tensor) -> None:
    """Keep only these rows of a cache, in place: keys and values, and the states of recurrent layers."""
    # Not `batch_select_indices`: layers with attention and recurrence inherit one that forgets the recurrent half.
    cache.reorder_cache(rows)

"""Keys and values that stay between the turns of a response, so that a turn reads new tokens only.

Each response is kept for itself, without padding. The next turn joins the responses that continue, in any composition,
with padding on the left, where masks are 0. Positions follow from the mask, so the slot of a key in the cache has no
effect as long as every layer attends to the whole cache. Models that have other layers, with a sliding window or a
recurrent state, or that take no positions, keep nothing: their turns read the conversation again.

Notation: B rows, T tokens of a response, K heads of keys and values, D their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True)
class TurnCache:
    """Keys and values of one response by layer, each `(K, T, D)`."""

    layers: list[tuple[Tensor, Tensor]]

    @property
    def length(self) -> int:
        """T, in tokens."""
        return self.layers[0][0].shape[1]


def keep_row(cache: Any, row: int, mask: Tensor) -> TurnCache | None:
    """Copy a row out of a cache, without its padding; None if its layers cannot be joined again.

    `mask` is that of the row, `(slots,)`, 1 for real tokens.
    """
    plain = type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
    if not plain or any(layer.keys is None or layer.keys.dim() != 4 for layer in cache.layers):
        return None
    slots = mask.bool()
    return TurnCache([(layer.keys[row][:, slots], layer.values[row][:, slots]) for layer in cache.layers])


def join_rows(rows: Sequence[TurnCache]) -> tuple[DynamicCache, Tensor]:
    """Join rows to one left-padded cache; return it and its mask, `(B, slots)` int64."""
    width = max(row.length for row in rows)

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([nn.functional.pad(tensor, (0, 0, width - tensor.shape[1], 0)) for tensor in tensors])

    layers = [
        (join([row.layers[i][0] for row in rows]), join([row.layers[i][1] for row in rows]))
        for i in range(len(rows[0].layers))
    ]
    device = layers[0][0].device
    starts = torch.tensor([width - row.length for row in rows], device=device)[:, None]
    return DynamicCache(ddp_cache_data=layers), (torch.arange(width, device=device) >= starts).long()


def tokens_after(caches: list[TurnCache | None] | None, sequences: list[list[int]]) -> list[list[int]]:
    """Return the tokens that the caches of these sequences lack: all, if any of them has no cache."""
    if caches is None or any(cache is None for cache in caches):
        return sequences
    return [ids[cache.length :] for ids, cache in zip(sequences, caches, strict=True) if cache is not None]

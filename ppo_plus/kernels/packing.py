"""Passes without padding: rows of unequal length become one row of their real tokens, but in attention.

What a layer does to each token by itself, which is nearly all of its arithmetic, is done to real tokens alone. For
attention they are put into padded rows again, those of similar length together, under the model's own rule of who sees
whom: so windows and shared heads stay as they are. The padding stands behind the real tokens, where a causal layer
never looks: such a layer gets no mask, and with it the fastest kernel (flash attention takes none). Whether an
architecture can be run like that is tried out, not listed.

Measured (benchmarks/kernel_speed.py, bf16, a CPU with AVX512) on rows of 56 to 112 tokens: with padding, learning takes
1.24 times the time and 1.19 times the activations, scoring 1.17 times the time. Where 72 % of the tokens are padding,
learning takes 3.26 times the time (benchmarks/results/uneven.json).

Nothing here asks a device for a number.

Notation: B rows, L tokens of a row with its padding, T real tokens in all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from .cpu_attention import PACKED, eager_gqa_attention, prefer_eager

MAX_UNPACKED_PADDING = 0.05  # of a pass; with as little, putting tokens to and fro takes as long as it saves
MIN_LENGTH_RATIO = 0.5  # rows at least that share of the longest are padded to it in attention


class _GatherRows(torch.autograd.Function):
    """Chosen rows of a matrix. Each is chosen once, so the gradient is copied, where autograd's own would add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(x)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None


class _ScatterRows(torch.autograd.Function):
    """The way back, to 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(index)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class Packing:
    """Where the real tokens of padded rows are.

    Args:
        mask: not 0 for real tokens, `(B, L)`.
        lengths: how many each row has, which the host knows.
    """

    def __init__(self, mask: Tensor, lengths: Sequence[int]) -> None:
        self.rows, self.length = mask.shape
        self.lengths = list(lengths)
        # In ascending order; `nonzero` would wait for the device to say how many there are.
        self._index = (mask.flatten() != 0).byte().argsort(descending=True, stable=True)[: sum(lengths)]

    def pack(self, x: Tensor) -> Tensor:
        """`(B, L, ...)` to `(1, T, ...)`."""
        return _GatherRows.apply(x.flatten(0, 1), self._index)[None]

    def spread(self, x: Tensor) -> Tensor:
        """`(1, T, ...)` to `(B, L, ...)`, 0 where there is padding."""
        return _ScatterRows.apply(x[0], self._index, self.rows * self.length).unflatten(0, (self.rows, self.length))


class NoPacking:
    """Rows as they are, padding and all."""

    @staticmethod
    def pack(x: Tensor) -> Tensor:
        """The same."""
        return x

    spread = pack


NO_PACKING = NoPacking()


def make_packing(mask: Tensor | None, lengths: Sequence[int] | None, least: float = 0.0) -> Packing | NoPacking:
    """How to leave out what is padding, or `NO_PACKING` where there is none, or too little.

    Args:
        mask: not 0 for real tokens, `(B, L)`; None if all are.
        lengths: real tokens by row; None where they are not known.
        least: share of padding from which on it is worth it.
    """
    if mask is None or lengths is None or not 0 < sum(lengths) < (1 - least) * mask.numel():
        return NO_PACKING
    return Packing(mask, lengths)


class LengthBuckets:
    """Rows of similar length together, for attention.

    Args:
        lengths: real tokens by row.
        device: where the tokens are.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        groups = bucket_by_length(lengths)
        order = [row for group in groups for row in group]
        self._order = None if order == sorted(order) else reordered(lengths, order, device)
        self._counts = [sum(lengths[row] for row in group) for group in groups]
        self.masks = [left_aligned([lengths[row] for row in group], device) for group in groups]
        self._packings = [
            Packing(mask, [lengths[row] for row in group]) for mask, group in zip(self.masks, groups, strict=True)
        ]

    def take(self, x: Tensor) -> list[Tensor]:
        """`(1, T, ...)` to the padded rows of each group."""
        x = x if self._order is None else _GatherRows.apply(x[0], self._order)[None]
        return [packing.spread(part) for packing, part in zip(self._packings, x.split(self._counts, 1), strict=True)]

    def give(self, parts: Sequence[Tensor]) -> Tensor:
        """The way back."""
        x = torch.cat([packing.pack(part) for packing, part in zip(self._packings, parts, strict=True)], 1)
        return x if self._order is None else _ScatterRows.apply(x[0], self._order, x.shape[1])[None]


def bucket_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Rows by length, ascending, in groups whose shortest is not much shorter than their longest; no empty rows."""
    descending = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: (-lengths[row], -row))
    groups: list[list[int]] = []
    for row in descending:
        if not groups or lengths[row] < MIN_LENGTH_RATIO * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return [group[::-1] for group in groups[::-1]]


def left_aligned(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Build the mask of rows of these lengths, padded on the right to the longest, `(B, L)` bool."""
    longest = max(lengths)
    mask = torch.zeros(len(lengths), longest, dtype=torch.bool, device=device)
    for row, length in enumerate(lengths):
        mask[row, :length] = True
    return mask


def reordered(lengths: Sequence[int], order: Sequence[int], device: torch.device) -> Tensor:
    """Where the tokens of rows in another order are among those of all rows, `(T,)`."""
    ends = list(accumulate(lengths))
    return torch.cat([torch.arange(ends[row] - lengths[row], ends[row], device=device) for row in order])


@dataclass(frozen=True)
class PackedMask:
    """What goes through the layers of a packed pass as their attention mask.

    Attributes:
        groups: of the rows.
        masks: of each group, as its attention function wants it; None where it is causal by itself.
        functions: which that is.
    """

    groups: LengthBuckets
    masks: list[Tensor | None]
    functions: list[Callable[..., tuple[Tensor, None]]]


# A mask function of transformers is told of shapes and the attention mask alone.
_current: ContextVar[Packing | NoPacking] = ContextVar("packing", default=NO_PACKING)


@contextlib.contextmanager
def packing_context(packing: Packing | NoPacking) -> Iterator[None]:
    """Inside, the tokens that a backbone gets are packed like this; who sees whom follows from that alone."""
    token = _current.set(packing)
    try:
        yield
    finally:
        _current.reset(token)


def packed_mask(*, dtype: torch.dtype, device: torch.device, **kwargs: Any) -> PackedMask | Tensor | None:
    """The mask function of transformers that belongs to `packed_attention`; outside of packed passes `sdpa`'s."""
    packing = _current.get()
    if isinstance(packing, NoPacking):
        return sdpa_mask(dtype=dtype, device=device, **kwargs)
    groups = LengthBuckets(packing.lengths, device)
    masks: list[Tensor | None] = []
    functions: list[Callable[..., tuple[Tensor, None]]] = []
    for mask in groups.masks:
        rows, length = mask.shape
        plain = prefer_eager(device, dtype, length, length)
        # transformers allows to skip the mask where a token sees none behind it, and so no padding. Elsewhere the
        # padding is masked, and whether there is any at all, a device would have to be asked for.
        padding = None if kwargs.get("allow_is_causal_skip", False) else mask
        sizes = {"batch_size": rows, "q_length": length, "kv_length": length, "attention_mask": padding}
        masks.append((eager_mask if plain else sdpa_mask)(**{**kwargs, **sizes, "dtype": dtype, "device": device}))
        functions.append(eager_gqa_attention if plain else sdpa_attention_forward)
    return PackedMask(groups, masks, functions)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of packed rows, `(1, heads, T, D)` each to `(1, T, heads, D')`; outside of packed passes `sdpa`'s."""
    if not isinstance(attention_mask, PackedMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    groups = attention_mask.groups
    inputs = [groups.take(x.transpose(1, 2)) for x in (query, key, value)]
    mixed = [
        function(module, *(x.transpose(1, 2) for x in padded), mask, **kwargs)[0]
        for *padded, mask, function in zip(*inputs, attention_mask.masks, attention_mask.functions, strict=True)
    ]
    return groups.give(mixed), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)


# Of each row of a pass, its tokens and how many of them are its response: numbers that the host knows.
SeqLens = Sequence[tuple[int, int]]

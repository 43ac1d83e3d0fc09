"""Padding-free passes: tokens are packed into one row, except in attention, which runs on buckets of similar length.

Nearly all arithmetic of a layer is done token by token, so it runs on real tokens alone. For attention, they are
unpacked into padded rows of similar length, under the model's own mask: so windows and shared heads keep working. The
padding is on the right, where a causal layer attends to none of it: such a layer gets no mask and uses the fastest
kernel (flash attention takes none). A self-test decides whether an architecture can run like this; there is no list.

Measured (benchmarks/kernel_speed.py, bf16, a CPU with AVX512) on rows of 56 to 112 tokens: with padding, learning takes
1.24 times the time and 1.19 times the activations, scoring 1.17 times the time. Where 72 % of the tokens are padding,
learning takes 3.26 times the time (benchmarks/results/variable_length.json).

Nothing here needs a host sync.

Notation: B rows, L tokens of a row with its padding, T real tokens in all.
"""

from __future__ import annotations

import contextlib
import sys
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

from .cpu_attention import (
    PACKED,
    PACKED_EAGER,
    causal_gqa_attention,
    eager_gqa_attention,
    mean_causal_keys,
    prefer_eager,
)

MAX_UNPACKED_PADDING = 0.05  # share of a pass; with less padding, packing takes as long as it saves
MIN_LENGTH_RATIO = 0.5  # shortest row of a bucket, relative to its longest


class _GatherRows(torch.autograd.Function):
    """Gather rows by unique indices: the backward pass copies, where autograd's own would scatter and add."""

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
    """Scatter rows to unique indices of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(index)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class Packing:
    """Converts padded rows to one row of their real tokens, and back.

    Args:
        mask: not 0 for real tokens, `(B, L)`.
        lengths: real tokens of each row, as Python ints.
    """

    def __init__(self, mask: Tensor, lengths: Sequence[int]) -> None:
        self.rows, self.length = mask.shape
        self.lengths = list(lengths)
        # In ascending order; `nonzero` would need a host sync for its size.
        self._index = (mask.flatten() != 0).byte().argsort(descending=True, stable=True)[: sum(lengths)]

    def pack(self, x: Tensor) -> Tensor:
        """Gather the real tokens: `(B, L, ...)` to `(1, T, ...)`."""
        return _GatherRows.apply(x.flatten(0, 1), self._index)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """Scatter to padded rows: `(1, T, ...)` to `(B, L, ...)`, 0 at padding."""
        return self._scatter(x[0], self._index)

    def unpack_last(self, x: Tensor, columns: int) -> Tensor:
        """Scatter to the last columns of padded rows: `(1, T, ...)` to `(B, columns, ...)`."""
        return self.unpack(x)[:, -columns:]

    def attention_buckets(self, device: torch.device) -> Any:
        """Return how attention splits the packed tokens into padded rows."""
        return LengthBuckets(self.lengths, device)

    def _scatter(self, tokens: Tensor, index: Tensor) -> Tensor:
        return _ScatterRows.apply(tokens, index, self.rows * self.length).unflatten(0, (self.rows, self.length))


class NoPacking:
    """Packing that keeps rows and their padding unchanged."""

    @staticmethod
    def pack(x: Tensor) -> Tensor:
        """Return the input."""
        return x

    unpack = pack

    @staticmethod
    def unpack_last(x: Tensor, columns: int) -> Tensor:
        """Return the last columns, `(B, columns, ...)`."""
        return x[:, -columns:]


class EvenRows:
    """Packs rows of equal length, which have no padding."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    @staticmethod
    def pack(x: Tensor) -> Tensor:
        """Join the rows: `(B, L, ...)` to `(1, T, ...)`."""
        return x.flatten(0, 1)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """Split into rows: `(1, T, ...)` to `(B, L, ...)`."""
        return x[0].unflatten(0, (self.rows, -1))


NO_PACKING = NoPacking()


def make_packing(mask: Tensor | None, lengths: Sequence[int] | None, min_padding: float = 0.0) -> Packing | NoPacking:
    """Build the packing of a batch; `NO_PACKING` if it has too little padding.

    Args:
        mask: not 0 for real tokens, `(B, L)`; None if all are.
        lengths: real tokens of each row; None if the host does not have them.
        min_padding: share of padding that a packed batch must exceed.
    """
    if mask is None or lengths is None or not 0 < sum(lengths) < (1 - min_padding) * mask.numel():
        return NO_PACKING
    return Packing(mask, lengths)


@dataclass(frozen=True)
class AttentionRows:
    """Padded rows of one call of an attention function; the queries of a row are the last of its keys.

    Attributes:
        mask: True for real keys, `(rows, keys)` bool.
        queries: number of queries per row, padding included.
        causal: whether all keys are queries and all padding is on the right, where a causal layer never attends to it.
        left_padding: padding before the first token of each row, `(rows,)` int64; None for none.
    """

    mask: Tensor
    queries: int
    causal: bool
    left_padding: Tensor | None = None

    def mask_options(self, mask_function: Callable[..., Any], allow_skip: bool) -> dict[str, Any]:
        """Return the arguments of a mask function of transformers for these rows."""
        (rows, keys), padding = self.mask.shape, self.left_padding

        def count_from_first_token(row: Any, head: Any, query: Any, key: Any) -> Any:
            return mask_function(row, head, query - padding[row], key - padding[row])  # type: ignore[index]

        # transformers allows skipping the mask of a causal layer, whose tokens never attend to padding on the right.
        # In other layers padding is always masked, because a check whether there is any would need a host sync.
        skip = allow_skip and self.causal
        return {
            "batch_size": rows, "q_length": self.queries, "kv_length": keys, "q_offset": keys - self.queries,
            "attention_mask": None if skip else self.mask, "allow_is_causal_skip": skip,
            "mask_function": mask_function if padding is None else count_from_first_token,
        }  # fmt: skip


class LengthBuckets:
    """Splits packed tokens into padded buckets of rows of similar length, for attention.

    Args:
        lengths: real tokens of each row.
        device: device of the tokens.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        buckets = bucket_by_length(lengths)
        order = [row for bucket in buckets for row in bucket]
        self._order = None if order == sorted(order) else token_indices(lengths, order, device)
        bucket_lengths = [[lengths[row] for row in bucket] for bucket in buckets]
        self._counts = [sum(bucket) for bucket in bucket_lengths]
        masks = [right_padded_mask(bucket, device) for bucket in bucket_lengths]
        self.parts = [AttentionRows(mask, mask.shape[1], causal=True) for mask in masks]
        self._packings = [Packing(*arguments) for arguments in zip(masks, bucket_lengths, strict=True)]

    def split(self, x: Tensor) -> list[Tensor]:
        """Split packed tokens `(1, T, ...)` into the padded rows of each bucket."""
        x = x if self._order is None else _GatherRows.apply(x[0], self._order)[None]
        return [packing.unpack(part) for packing, part in zip(self._packings, x.split(self._counts, 1), strict=True)]

    split_keys = split

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """Merge the padded rows of each bucket to packed tokens `(1, T, ...)`."""
        x = torch.cat([packing.pack(part) for packing, part in zip(self._packings, parts, strict=True)], 1)
        return x if self._order is None else _ScatterRows.apply(x[0], self._order, x.shape[1])[None]


def bucket_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Group row indices by similar length, shortest first; rows without tokens are left out."""
    descending = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: (-lengths[row], -row))
    buckets: list[list[int]] = []
    for row in descending:
        if not buckets or lengths[row] < MIN_LENGTH_RATIO * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(row)
    return [bucket[::-1] for bucket in buckets[::-1]]


def right_padded_mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Build the mask of rows of these lengths, padded on the right to the longest, `(B, L)` bool."""
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.bool, device=device)
    for row, length in enumerate(lengths):
        mask[row, :length] = True
    return mask


def token_indices(lengths: Sequence[int], order: Sequence[int], device: torch.device) -> Tensor:
    """Return the positions of the tokens of reordered rows among the tokens of all rows, `(T,)`."""
    ends = list(accumulate(lengths))
    return torch.cat([torch.arange(ends[row] - lengths[row], ends[row], device=device) for row in order])


@dataclass(frozen=True)
class PackedMask:
    """Attention mask of a packed pass.

    Attributes:
        buckets: splits tokens into the rows of attention: `LengthBuckets` or `PromptBuckets`.
        masks: mask of each bucket in the format of its attention function; None if that is causal by itself.
        functions: attention function of each bucket.
    """

    buckets: Any
    masks: list[Tensor | None]
    functions: list[Callable[..., tuple[Tensor, None]]]


# A mask function of transformers receives only shapes and the attention mask, so the packing needs another way.
_current: ContextVar[Packing | NoPacking] = ContextVar("packing", default=NO_PACKING)


@contextlib.contextmanager
def packing_context(packing: Packing | NoPacking) -> Iterator[None]:
    """Context manager: the backbone's input has this packing, from which attention masks follow."""
    token = _current.set(packing)
    try:
        yield
    finally:
        _current.reset(token)


def packed_mask(*, dtype: torch.dtype, device: torch.device, **kwargs: Any) -> PackedMask | Tensor | None:
    """Build the attention mask for `packed_attention`; outside of packed passes `sdpa`'s."""
    packing = _current.get()
    if isinstance(packing, NoPacking):
        return sdpa_mask(dtype=dtype, device=device, **kwargs)
    return _mask_of_buckets(packing, dtype, device, kwargs)


def packed_eager_mask(**kwargs: Any) -> PackedMask | Tensor | None:
    """Build the mask of a packed pass over a model with `eager` attention; of other passes as `eager` does."""
    packing = _current.get()
    if isinstance(packing, NoPacking):
        return eager_mask(**kwargs)
    return _mask_of_buckets(packing, kwargs.pop("dtype"), kwargs.pop("device"), kwargs, own_attention)


def _mask_of_buckets(
    packing: Packing, dtype: torch.dtype, device: torch.device, kwargs: dict[str, Any],
    attention: Callable[..., tuple[Tensor, Any]] | None = None,
) -> PackedMask:  # fmt: skip
    buckets = packing.attention_buckets(device)
    masks: list[Tensor | None] = []
    functions: list[Callable[..., tuple[Tensor, None]]] = []
    for part in buckets.parts:
        options = part.mask_options(kwargs["mask_function"], kwargs.get("allow_is_causal_skip", False))
        options = {**kwargs, **options, "dtype": dtype, "device": device}
        causal = attention is None and part.causal and sdpa_mask(**options) is None
        # A mask makes `sdpa` slow on CPUs, so rows with more keys than queries are compared by their queries alone.
        keys = mean_causal_keys(part.queries) if causal else part.queries
        eager = attention is not None or prefer_eager(device, dtype, part.queries, keys)
        masks.append(None if causal else (eager_mask if eager else sdpa_mask)(**options))
        plain = causal_gqa_attention if causal else eager_gqa_attention
        functions.append(attention or (plain if eager else sdpa_attention_forward))
    return PackedMask(buckets, masks, functions)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute attention of packed rows, `(1, heads, T, D)` to `(1, T, heads, D')`; of other inputs as `sdpa`."""
    if not isinstance(attention_mask, PackedMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    buckets = attention_mask.buckets
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    inputs = buckets.split(query), buckets.split_keys(key), buckets.split_keys(value)
    attn_outputs = [
        function(module, *(x.transpose(1, 2) for x in padded), mask, **kwargs)[0]
        for *padded, mask, function in zip(*inputs, attention_mask.masks, attention_mask.functions, strict=True)
    ]
    return buckets.merge(attn_outputs), None


def own_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """Call the `eager` attention of a layer's own family, with its soft caps and attention sinks."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def packed_eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Compute attention of packed rows as `packed_attention` does, by the layer's own function; of others as that."""
    if not isinstance(attention_mask, PackedMask):
        return own_attention(module, query, key, value, attention_mask, **kwargs)
    return packed_attention(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)
AttentionInterface.register(PACKED_EAGER, packed_eager_attention)
AttentionMaskInterface.register(PACKED_EAGER, packed_eager_mask)


# (total tokens, response tokens) of each row of a pass, as Python ints so that no host sync is needed.
SeqLens = Sequence[tuple[int, int]]

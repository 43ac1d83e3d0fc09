"""Passes that read a prompt once for all responses to it: `[prompt, response 1, ..., response k]`.

A pass over k responses to a prompt of P tokens would run the prompt k times. Here the tokens of the prompt run once and
those of each response after them, P + kR in place of k(P + R), by the same means as packing: layers run on the
concatenated tokens, and the positions of each response continue those of the prompt. Attention runs on padded rows, in
which prompts attend to themselves, and responses to their prompt and themselves. The model's own mask function decides
which of these keys a query sees, so sliding windows and shared key-value heads stay unchanged. In the backward pass,
the gradient of a prompt's tokens is the sum over its responses.

Whether an architecture can run like that is determined by a trial. A state-space layer cannot, because its state would
carry one response over to the next.

Notation: B rows, L tokens of a row with its padding, T tokens of the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .packing import NO_PACKING, AttentionRows, EvenRows, NoPacking, Packing, bucket_by_length

MIN_SHARED_TOKENS = 0.05  # of a pass; with fewer, the copies of keys and values take as long as it saves

# For each row: its group, and the number of first tokens that all rows of that group share.
Prefixes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class PrefixBucket:
    """Groups of equally many rows, with prefixes of similar length.

    Attributes:
        rows: by group, the indices of its rows.
        prefix_lengths: by group, number of tokens that its rows share.
        suffix_lengths: by group, number of tokens of each row after the prefix.
    """

    rows: list[list[int]]
    prefix_lengths: list[int]
    suffix_lengths: list[list[int]]

    def spans(self) -> list[tuple[list[int], int, int]]:
        """Return (rows, first position, tokens) of each stretch of tokens, in the order of the pass."""
        prefixes = [(rows, 0, size) for rows, size in zip(self.rows, self.prefix_lengths, strict=True)]
        groups = zip(self.rows, self.prefix_lengths, self.suffix_lengths, strict=True)
        return prefixes + [([row], size, n) for rows, size, sizes in groups for row, n in zip(rows, sizes, strict=True)]


def bucket_prefixes(lengths: Sequence[int], prefixes: Prefixes) -> list[PrefixBucket]:
    """Group rows by their prefix; a row that shares no tokens is all prefix."""
    members: dict[int, list[int]] = {}
    for row, (group, _) in enumerate(prefixes):
        if lengths[row]:
            members.setdefault(group, []).append(row)
    by_size: dict[int, list[tuple[list[int], int]]] = {}
    for rows in members.values():
        shared = min(min(lengths[row], prefixes[row][1]) for row in rows)
        parts = [(rows, shared)] if len(rows) > 1 and shared else [([row], lengths[row]) for row in rows]
        by_size.setdefault(len(parts[0][0]), []).extend(parts)
    buckets = []
    for groups in by_size.values():
        for indices in bucket_by_length([shared for _, shared in groups]):
            similar = [groups[i] for i in indices]
            suffixes = [[lengths[row] - shared for row in rows] for rows, shared in similar]
            buckets.append(PrefixBucket([rows for rows, _ in similar], [shared for _, shared in similar], suffixes))
    return buckets


class SharedPrompts(Packing):
    """Packs padded rows, with one copy of the first tokens that rows share.

    Args:
        mask: nonzero for real tokens, `(B, L)`.
        lengths: number of real tokens of each row, as Python ints.
        buckets: the rows by prefix.
    """

    def __init__(self, mask: Tensor, lengths: Sequence[int], buckets: Sequence[PrefixBucket]) -> None:
        super().__init__(mask, lengths)
        self._buckets, self._real, starts = buckets, self._index, [0, *accumulate(lengths)]
        sources: list[Tensor] = []  # of each packed token, its index among all real tokens
        # Of each real token, its index among the packed ones.
        packed_indices = torch.empty(sum(lengths), dtype=torch.int64)
        count = 0
        for rows, begin, size in (span for bucket in buckets for span in bucket.spans()):
            sources.append(torch.arange(begin, begin + size) + starts[rows[0]])
            for row in rows:
                packed_indices[starts[row] + begin :][:size] = torch.arange(count, count + size)
            count += size
        self._packed_indices = packed_indices.to(mask.device, non_blocking=True)
        self._index = self._real[torch.cat(sources).to(mask.device, non_blocking=True)]

    def unpack(self, x: Tensor) -> Tensor:
        """Copy to padded rows: `(1, T, ...)` to `(B, L, ...)`, 0 at padding."""
        return self._scatter(x[0].index_select(0, self._packed_indices), self._real)

    def unpack_last(self, x: Tensor, columns: int) -> Tensor:
        """Copy to the last columns of padded rows: `(1, T, ...)` to `(B, columns, ...)`; undefined at padding."""
        indices = self._packed_indices.new_zeros(self.rows * self.length)
        last = indices.index_copy_(0, self._real, self._packed_indices).view(self.rows, -1)[:, -columns:]
        return x[0].index_select(0, last.flatten()).unflatten(0, last.shape)

    def attention_buckets(self, device: torch.device) -> PromptBuckets:
        """Return how attention splits the packed tokens into padded rows."""
        return PromptBuckets(self._buckets, device)


class PromptBuckets:
    """Splits packed tokens into padded rows for attention: per bucket the prefixes, and the suffixes of its rows.

    A suffix attends to its prefix and itself. Prefixes are padded on the left, so that suffixes follow them directly.

    Args:
        buckets: the rows by prefix.
        device: device of the tokens.
    """

    def __init__(self, buckets: Sequence[PrefixBucket], device: torch.device) -> None:
        self.parts: list[AttentionRows] = []
        self._counts: list[int] = []
        self._packings: list[Packing | EvenRows] = []
        self._rows_per_prefix: list[int] = []  # of each part of suffixes; 0 for a part of prefixes
        for bucket in buckets:
            sizes, suffixes = bucket.prefix_lengths, [n for lengths in bucket.suffix_lengths for n in lengths]
            mask, padding = aligned_mask(sizes, device, right=True)
            is_even, answers = min(sizes) == max(sizes), len(bucket.rows[0])
            self.parts.append(AttentionRows(mask, max(sizes), is_even, None if is_even else padding))
            self._add(mask, sizes, 0)
            if any(suffixes):
                suffix_mask, _ = aligned_mask(suffixes, device, right=False)
                keys = torch.cat([mask.repeat_interleave(answers, 0), suffix_mask], 1)
                padding = padding.repeat_interleave(answers)
                self.parts.append(AttentionRows(keys, max(suffixes), False, None if is_even else padding))
                self._add(suffix_mask, suffixes, answers)

    def _add(self, mask: Tensor, lengths: Sequence[int], rows_per_prefix: int) -> None:
        self._counts.append(sum(lengths))
        self._packings.append(EvenRows(len(lengths)) if min(lengths) == max(lengths) else Packing(mask, lengths))
        self._rows_per_prefix.append(rows_per_prefix)

    def split(self, x: Tensor) -> list[Tensor]:
        """Split packed tokens `(1, T, ...)` into the padded rows of each part, `(rows, queries, ...)`."""
        return [packing.unpack(part) for packing, part in zip(self._packings, x.split(self._counts, 1), strict=True)]

    def split_keys(self, x: Tensor) -> list[Tensor]:
        """Split packed keys `(1, T, ...)` into those of the rows of each part, `(rows, keys, ...)`."""
        rows = self.split(x)
        for i, answers in enumerate(self._rows_per_prefix):
            if answers:
                suffixes = rows[i].unflatten(0, (-1, answers))
                prefix = rows[i - 1].unsqueeze(1).expand(-1, answers, *rows[i - 1].shape[1:])
                rows[i] = torch.cat([prefix, suffixes], 2).flatten(0, 1)
        return rows

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """Merge the padded rows of each part to packed tokens `(1, T, ...)`."""
        return torch.cat([packing.pack(part) for packing, part in zip(self._packings, parts, strict=True)], 1)


def aligned_mask(lengths: Sequence[int], device: torch.device, *, right: bool) -> tuple[Tensor, Tensor]:
    """Build the mask of rows padded to the longest, `(B, L)` bool, and the padding of each, `(B,)` int64."""
    sizes, width = torch.tensor(lengths).to(device, non_blocking=True), max(lengths)
    columns, padding = torch.arange(width, device=device), width - sizes
    return (columns >= padding[:, None] if right else columns < sizes[:, None]), padding


def make_shared_packing(
    mask: Tensor, lengths: Sequence[int] | None, prefixes: Prefixes | None, least: float = 0.0
) -> SharedPrompts | NoPacking:
    """Return a packing with one copy of each prefix, or `NO_PACKING` if that saves too few tokens.

    Args:
        mask: nonzero for real tokens, `(B, L)`.
        lengths: number of real tokens of each row; None if unknown.
        prefixes: the prefix of each row; None for none.
        least: smallest share of the real tokens to save.
    """
    if lengths is None or prefixes is None:
        return NO_PACKING
    buckets = bucket_prefixes(lengths, prefixes)
    saved = sum((len(rows) - 1) * size for b in buckets for rows, size in zip(b.rows, b.prefix_lengths, strict=True))
    return SharedPrompts(mask, lengths, buckets) if saved > least * sum(lengths) else NO_PACKING


def common_prefixes(rows: Sequence[Sequence[int]]) -> Prefixes:
    """Group rows of token ids of which the first half or more is equal; return their prefixes."""
    groups: list[list[int]] = []
    for row in sorted(range(len(rows)), key=lambda row: list(rows[row])):
        # In sorted order, what the first and the last row of a group share, all rows between them share.
        if groups and 2 * count_common(rows[groups[-1][0]], rows[row]) >= len(rows[row]):
            groups[-1].append(row)
        else:
            groups.append([row])
    prefixes: dict[int, tuple[int, int]] = {}
    for group, members in enumerate(groups):
        shared = count_common(rows[members[0]], rows[members[-1]])
        prefixes |= dict.fromkeys(members, (group, shared))
    return [prefixes[row] for row in range(len(rows))]


def count_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of equal tokens at the start of two rows."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))

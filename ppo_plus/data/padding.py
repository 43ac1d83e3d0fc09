"""Padding token ids to a rectangle, and taking the padding off again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the padding token, which a tokenizer has once it was checked."""
    return cast(int, tokenizer.pad_token_id)


def unpad(input_ids: Tensor, attention_mask: Tensor) -> list[list[int]]:
    """Token ids of each row without its padding."""
    return [ids[mask].tolist() for ids, mask in zip(input_ids, attention_mask.bool(), strict=True)]


def left_pad(sequences: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of prompts, `(B, P)` int64 each, padded on the left."""
    longest = max(map(len, sequences))
    input_ids = torch.full((len(sequences), longest), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        attention_mask[row, longest - len(ids) :] = 1
    return input_ids, attention_mask


def right_pad(sequences: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, `(B, T)` int64 each, padded on the right."""
    rows = [torch.tensor(ids) for ids in sequences]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    return input_ids, pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True)

"""Padding of token id lists to rectangular tensors, and removal of padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the padding token, which `check_tokenizer` has ensured."""
    return cast(int, tokenizer.pad_token_id)


def unpad(input_ids: Tensor, attention_mask: Tensor) -> list[list[int]]:
    """Return the token ids of each row without padding."""
    return [ids[mask].tolist() for ids, mask in zip(input_ids, attention_mask.bool(), strict=True)]


def left_pad(sequences: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left; returns token ids and attention mask, `(B, P)` int64 each."""
    width = max(map(len, sequences))
    input_ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    return input_ids, attention_mask


def right_pad(sequences: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Pad sequences on the right; returns token ids and attention mask, `(B, T)` int64 each."""
    rows = [torch.tensor(ids) for ids in sequences]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    return input_ids, pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True)

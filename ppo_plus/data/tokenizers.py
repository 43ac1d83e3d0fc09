"""What a tokenizer must have for training: a padding side, special tokens that the model embeds, stop tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot end or pad a response; take EOS as padding where there is none."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class must be a tokenizer; got {type(tokenizer).__name__}. Pass "
            "AutoTokenizer.from_pretrained(...), or the tokenizer of a multimodal processor."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no EOS token, so no response could ever end. "
            "Set processing_class.eos_token before you pass it."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def check_embedded(tokenizer: PreTrainedTokenizerBase, num_embeddings: int, *, with_eos: bool = True) -> None:
    """Refuse an EOS that the model does not embed; pad with EOS in the place of a padding token that it does not.

    Args:
        tokenizer: its padding token may be changed.
        num_embeddings: of the model.
        with_eos: False where another EOS will take the place of the tokenizer's.
    """
    fix = "call model.resize_token_embeddings(len(tokenizer)) and pass the model"
    ends = tokenizer.eos_token_id
    if with_eos and ends is not None and ends >= num_embeddings:
        raise ValueError(
            f"The EOS token {tokenizer.eos_token!r} (id {ends}) has no embedding in the model ({num_embeddings} "
            "tokens): no response could end in it and no reward model read it. "
            f"Set processing_class.eos_token, or {fix}."
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= num_embeddings:
        warnings.warn(
            f"The padding token {tokenizer.pad_token!r} has no embedding in the model ({num_embeddings} tokens): EOS "
            "pads in its place, which changes no result.",
            stacklevel=3,
        )
        tokenizer.pad_token = tokenizer.eos_token


def stop_token_ids(generation_config: Any, tokenizer: PreTrainedTokenizerBase, extra: Sequence[int] = ()) -> list[int]:
    """List every id that ends a response: the tokenizer's EOS, those that the model declares, and further ones."""
    declared = getattr(generation_config, "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    ids: list[Any] = [tokenizer.eos_token_id, *declared, *extra]
    return sorted({int(i) for i in ids if i is not None})

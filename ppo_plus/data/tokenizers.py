"""Checks of the tokenizer: EOS and padding tokens, embeddings of special tokens, stop token ids."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without EOS, and set the padding token to EOS if it is missing."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class must be a tokenizer; got {type(tokenizer).__name__}. Pass "
            "AutoTokenizer.from_pretrained(...), or the tokenizer of a multimodal processor."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no EOS token, so no response could end. Set "
            "processing_class.eos_token before you pass it."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def check_embedded(tokenizer: PreTrainedTokenizerBase, num_embeddings: int, *, with_eos: bool = True) -> None:
    """Refuse an EOS without an embedding, and replace a padding token without one by EOS.

    Args:
        tokenizer: its padding token may be changed.
        num_embeddings: number of token embeddings of the model.
        with_eos: whether to check EOS; False if another EOS replaces the tokenizer's later.
    """
    fix = "call model.resize_token_embeddings(len(tokenizer)) and pass the model"
    eos_id = tokenizer.eos_token_id
    if with_eos and eos_id is not None and eos_id >= num_embeddings:
        raise ValueError(
            f"The EOS token {tokenizer.eos_token!r} (id {eos_id}) has no embedding in the model ({num_embeddings} "
            "tokens), so no response could end with it and no reward model could process it. "
            f"Set processing_class.eos_token, or {fix}."
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= num_embeddings:
        warnings.warn(
            f"The padding token {tokenizer.pad_token!r} has no embedding in the model ({num_embeddings} tokens): EOS "
            "is used for padding instead, which does not change any result.",
            stacklevel=3,
        )
        tokenizer.pad_token = tokenizer.eos_token


def stop_token_ids(
    generation_config: Any, tokenizer: PreTrainedTokenizerBase, num_embeddings: int, extra: Sequence[int] = ()
) -> list[int]:
    """List the ids that end a response: the tokenizer's EOS, the generation config's EOS ids, and extra ids.

    An EOS id of the generation config without an embedding is left out with a warning: no model can generate it.

    Raises:
        ValueError: an extra id has no embedding.
    """
    if unembedded := [i for i in extra if i >= num_embeddings]:
        raise ValueError(
            f"stop_token_id={unembedded[0]}, but the model has embeddings for {num_embeddings} tokens, so no response "
            "can end with it. Set stop_token_id to an id that the model can generate."
        )
    declared = getattr(generation_config, "eos_token_id", None)
    declared = [i for i in (declared if isinstance(declared, list) else [declared]) if i is not None]
    for unknown in (i for i in declared if not 0 <= i < num_embeddings):
        warnings.warn(
            f"generation_config.eos_token_id has the id {unknown}, but the model has embeddings for {num_embeddings} "
            "tokens, so no response can end with it. Set model.generation_config.eos_token_id to the ids that end "
            "its answers.",
            stacklevel=3,
        )
    ids = [tokenizer.eos_token_id, *declared, *extra]
    return sorted({int(i) for i in ids if i is not None and 0 <= i < num_embeddings})

"""Text of sampled token ids, and what of a distribution is sampled from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper

from ..config import PPOConfig
from ..models.logprobs import top_p_filter


def decode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], response: list[int], skip_special_tokens: bool = True
) -> str:
    """Decode a response that continues a prompt; some tokenizers drop a leading space when it is decoded alone."""
    before, whole = (decode(tokenizer, ids, skip_special_tokens) for ids in (prompt, prompt + response))
    return whole[len(before) :] if whole.startswith(before) else decode(tokenizer, response, skip_special_tokens)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip_special_tokens: bool = True) -> str:
    """Decode one sequence of token ids, with or without its special tokens."""
    return cast(str, tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))


def build_logits_processor(args: PPOConfig) -> Callable[[Tensor], Tensor] | None:
    """Top-k, top-p and min-p as one map on logits at the temperature; None where all are off."""
    warpers: list[Any] = []
    if args.top_k:
        warpers.append(TopKLogitsWarper(args.top_k))
    if args.top_p < 1:
        warpers.append(lambda _, logits: top_p_filter(logits, args.top_p))  # TopPLogitsWarper, with deterministic sums
    if args.min_p:
        warpers.append(MinPLogitsWarper(args.min_p))
    if not warpers:
        return None

    def logits_processor(logits: Tensor) -> Tensor:
        for warper in warpers:
            logits = warper(None, logits)
        return logits

    return logits_processor

"""Decode sampled token ids for reward functions, and build the logits processor of sampling."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper

from ..config import PPOConfig
from ..data.chat_templates import find_generation_opening, find_opening_ids, is_conversational, merge_template_kwargs
from ..data.prompts import Row, to_columns
from ..models.logprobs import top_p_filter
from ..rewards import Completions
from ..rewards.completions import message_texts
from .responses import Responses


class CompletionDecoder:
    """Decodes responses to what reward functions receive."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: PPOConfig, stop_ids: Sequence[int]) -> None:
        self.tokenizer, self.args, self.stop_ids = tokenizer, args, stop_ids

    def decode(self, responses: Responses, context: dict[str, Any]) -> tuple[Completions, dict[str, list]]:
        """Return the completions, and columns that reward functions fill by `log_extra`."""
        rows = responses.rows
        ids = [row[keep].tolist() for row, keep in zip(responses.tokens, responses.mask, strict=True)]
        columns, prompt_ids = to_columns(rows), None
        prompts, skip = columns.pop("prompt", None), self.args.skip_special_tokens
        if prompts is None:
            prompt_ids = [row["input_ids"] for row in rows]
            prompts = self.tokenizer.batch_decode(prompt_ids, skip_special_tokens=True)
        texts: list[Any] = [
            [{"role": "assistant", "content": decode(self.tokenizer, response, skip)}]
            if is_conversational(prompt)
            else decode_completion(self.tokenizer, row["input_ids"], response, skip)
            for prompt, row, response in zip(prompts, rows, map(self._strip_eos, ids), strict=True)
        ]
        completions = texts if responses.messages is None else responses.messages
        extra: dict[str, list] = {}

        def log_extra(name: str, values: Any) -> None:
            if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != len(rows):
                raise ValueError(f"log_extra({name!r}, ...) takes a list with one value for each of {len(rows)} rows.")
            extra[name] = list(values)

        # Messages that were parsed contain the opening.
        openings = [self._find_opening(row) if responses.messages is None else "" for row in rows]
        opening_ids = [
            find_opening_ids(row["input_ids"], opening, self.tokenizer)
            for row, opening in zip(rows, openings, strict=True)
        ]
        openings = [opening if ids else "" for opening, ids in zip(openings, opening_ids, strict=True)]
        context = {**context, "log_extra": log_extra}
        if responses.environments is not None:
            context["environments"] = responses.environments
        parts = (prompts, completions, ids, columns, context, prompt_ids, openings, opening_ids, responses.turn_ends())
        return Completions(*parts, responses.schemas), extra

    def encode_prompt_text(self, row: Row) -> list[int]:
        """Return the ids of a response that repeats the prompt: the last message of a conversation, without BOS."""
        prompt = row.get("prompt")
        if prompt is None:
            prompt = self.tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        text = message_texts(prompt[-1:])[0] if is_conversational(prompt) else prompt
        return cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _strip_eos(self, response: list[int]) -> list[int]:
        """Drop the final EOS of a response if special tokens are kept, because a chat template adds its own."""
        if self.args.skip_special_tokens:
            return response
        stop_token_id = self.args.stop_token_id
        kept = {*stop_token_id} if isinstance(stop_token_id, list | tuple) else {stop_token_id}
        ends = {*self.stop_ids} - kept | {self.tokenizer.eos_token_id}
        return response[:-1] if response and response[-1] in ends else response

    def _find_opening(self, row: Row) -> str:
        prompt = row.get("prompt")
        if not is_conversational(prompt) or prompt[-1]["role"] == "assistant":  # type: ignore[index]
            return ""
        kwargs = merge_template_kwargs(cast(dict, self.args.chat_template_kwargs), row)
        return find_generation_opening(cast(list, prompt), self.tokenizer, kwargs)


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
    """Compose top-k, top-p and min-p into one function of the tempered logits; None if all are off."""
    warpers: list[Any] = []
    if args.top_k:
        warpers.append(TopKLogitsWarper(args.top_k))
    if args.top_p < 1:
        warpers.append(lambda _, logits: top_p_filter(logits, args.top_p))  # TopPLogitsWarper, with deterministic sums
    if args.min_p:
        warpers.append(MinPLogitsWarper(args.min_p))
    if not warpers:
        return None
    return lambda logits: functools.reduce(lambda scores, warper: warper(None, scores), warpers, logits)

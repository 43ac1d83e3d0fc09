"""Tokenization of texts for a reward model, and batching that backs off when memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from ..data.chat_templates import is_conversational
from ..data.padding import right_pad
from ..data.prompts import starts_twice
from ..kernels.batch_backoff import BatchSize
from .completions import Completions


class RewardTokenizer:
    """Create right-padded inputs from texts, text pairs or token ids; truncate long inputs with one warning.

    A truncated text keeps its end, which holds the response, and its first token if it is special (BOS, CLS). Of a text
    pair, the longer text is truncated.

    Args:
        tokenizer: tokenizer of the reward model; the padding token of the model's configuration takes precedence.
        name: name of the reward model in warnings.
        max_length: maximum tokens per input; None means no limit.
        pad_token_id: padding token id in the configuration of the reward model; None if it has none.
        num_embeddings: number of token embeddings of the reward model; None if unknown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        max_length: int | None,
        pad_token_id: int | None = None,
        num_embeddings: int | None = None,
    ) -> None:
        self.tokenizer, self.name, self.max_length = tokenizer, name, max_length
        self.pad_token_id, self.num_embeddings = pad_token_id, num_embeddings
        self._warned = False

    def __call__(self, texts: list, batch: Completions) -> BatchEncoding:
        """Tokenize to padded inputs, `(B, T)` each; texts from a chat template already have special tokens."""
        columns = self._tokenize(texts, batch)
        tokens = max(map(len, columns["input_ids"]))
        if self.max_length is not None and tokens > self.max_length:
            pairs = isinstance(texts[0], tuple)
            self._warn_truncation(tokens, self.max_length, pairs)
            if pairs:
                columns = self._tokenize(texts, batch, truncation=True, max_length=self.max_length)
            else:
                columns = self._truncate_left(columns, self.max_length)
        return self._pad(columns)

    def choose_pad_id(self, rows: Sequence[Sequence[int]]) -> int:
        """Choose a padding id such that a model that searches for it finds the last token of each row.

        This is the padding token of the model's configuration. A model without a valid one (None, or -1 in old
        configurations) skips no token, so the id must differ from the last token of every row.
        """
        model_pad_id, last_ids = self.pad_token_id, {row[-1] for row in rows if row}
        vocab_size = self.tokenizer.vocab_size if self.num_embeddings is None else self.num_embeddings
        if model_pad_id is not None and 0 <= model_pad_id < vocab_size:
            return model_pad_id
        tokenizer_pad_id = self.tokenizer.pad_token_id
        candidates = [*([] if tokenizer_pad_id is None else [tokenizer_pad_id]), *range(vocab_size)]
        return next(i for i in candidates if i < vocab_size and i not in last_ids)

    def _tokenize(self, texts: list, batch: Completions, **options: Any) -> dict[str, list[list[int]]]:
        if isinstance(texts[0], list):
            return {"input_ids": texts}
        if isinstance(texts[0], tuple):
            questions, answers = map(list, zip(*texts, strict=True))
            options |= {"text": questions, "text_pair": answers}
        else:
            options |= {"text": texts, "add_special_tokens": not is_conversational(batch.prompts[0])}
        columns = dict(self.tokenizer(verbose=False, **options))
        if options.get("add_special_tokens"):
            ids = columns["input_ids"]
            twice = [starts_twice(row, text, self.tokenizer) for row, text in zip(ids, texts, strict=True)]
            columns = {
                name: [row[int(drop) :] for row, drop in zip(rows, twice, strict=True)]
                for name, rows in columns.items()
            }
        return columns

    def _pad(self, columns: dict[str, list[list[int]]]) -> BatchEncoding:
        rows = columns["input_ids"]
        input_ids, attention_mask = right_pad(rows, self.choose_pad_id(rows))
        padded = {"input_ids": input_ids, "attention_mask": attention_mask}
        for name in columns.keys() - padded.keys():
            padded[name], _ = right_pad(columns[name], self.tokenizer.pad_token_type_id)
        return BatchEncoding(padded)

    def _warn_truncation(self, tokens: int, max_length: int, pairs: bool) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"The maximum input length of the reward model {self.name!r} is {max_length} tokens, but prompt and "
                f"response have up to {tokens}: {'the longer of the two' if pairs else 'the start of the prompt'} is "
                "truncated. Lower max_prompt_length or response_length, or use a reward model with longer inputs.",
                stacklevel=3,
            )

    def _truncate_left(self, columns: dict[str, list[list[int]]], max_length: int) -> dict[str, list[list[int]]]:
        special = set(self.tokenizer.all_special_ids)
        firsts = [int(ids[:1] != [] and ids[0] in special) for ids in columns["input_ids"]]
        return {
            name: [
                row if len(row) <= max_length else row[:first] + row[len(row) - max_length + first :]
                for row, first in zip(rows, firsts, strict=True)
            ]
            for name, rows in columns.items()
        }


def max_input_length(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the maximum input length of a classifier: the minimum of its tokenizer's limit and its positions."""
    config = getattr(model, "config", None)
    positions = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = module.num_embeddings - module.padding_idx - 1  # RoBERTa's positions start after its padding id
    limits = (tokenizer.model_max_length, positions)
    return min((n for n in limits if n is not None and 0 < n < VERY_LARGE_INTEGER), default=None)


@torch.no_grad()
def score_in_batches(
    texts: list, batch_size: BatchSize, score: Callable[[list], Tensor], prompts: Sequence[Any] | None = None
) -> list[float]:
    """Score texts (or pairs, or token ids) in batches of similar length; returns scores in the order of texts.

    With `prompts`, consecutive texts with the same prompt stay adjacent, so that a batch can share it.
    """
    sizes = [len("".join(text)) if isinstance(text, str | tuple) else len(text) for text in texts]
    if prompts is not None:
        runs = [list(run) for _, run in groupby(range(len(texts)), key=lambda i: prompts[i])]
        sizes = [max(sizes[i] for i in run) for run in runs for _ in run]
    order = torch.tensor(sizes).argsort(stable=True)
    scores = torch.zeros(len(texts))

    def score_rows(rows: Tensor) -> None:
        scores[rows] = score([texts[int(i)] for i in rows]).cpu()

    batch_size.run(order, score_rows)
    return scores.tolist()

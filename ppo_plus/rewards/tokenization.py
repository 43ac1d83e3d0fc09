"""From texts to the inputs of a reward model, as many at a time as fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
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
    """Makes right-padded inputs of texts, pairs of texts or token ids, and says once where there are too many tokens.

    One text keeps its end, where the response is, and its first token if that is a special one (BOS, CLS). Of a pair
    the longer text is cut.

    Args:
        tokenizer: of the reward model; its padding token is not used where the model has one of its own.
        name: of the reward model.
        longest: most tokens that it reads; None where there is no limit.
        pad_token_id: the padding token in the configuration of the reward model itself; None where it has none.
        embeddings: how many token ids the reward model has embeddings for; None where that is not known.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        longest: int | None,
        pad_token_id: int | None = None,
        embeddings: int | None = None,
    ) -> None:
        self.tokenizer, self.name, self.longest = tokenizer, name, longest
        self.pad_token_id, self.embeddings = pad_token_id, embeddings
        self._warned = False

    def __call__(self, texts: list, batch: Completions) -> BatchEncoding:
        """Inputs of the reward model, `(B, T)` each; a chat template has put its special tokens in already."""
        columns = self._tokenize(texts, batch)
        tokens = max(map(len, columns["input_ids"]))
        if self.longest is not None and tokens > self.longest:
            pairs = isinstance(texts[0], tuple)
            self._say_cut(tokens, self.longest, pairs)
            if pairs:
                columns = self._tokenize(texts, batch, truncation=True, max_length=self.longest)
            else:
                columns = self._keep_ends(columns, self.longest)
        return self._pad(columns)

    def padding(self, rows: Sequence[Sequence[int]]) -> int:
        """Choose the id that fills short rows, such that a model which looks for it finds where each row ends.

        It is the model's own padding token. A model without a usable one (None, or -1 as old configurations have it)
        passes over no token, so it gets an id with which no row ends.
        """
        own, ends = self.pad_token_id, {row[-1] for row in rows if row}
        known = self.tokenizer.vocab_size if self.embeddings is None else self.embeddings
        if own is not None and 0 <= own < known:
            return own
        other = self.tokenizer.pad_token_id
        candidates = [*([] if other is None else [other]), *range(known)]
        return next(i for i in candidates if i < known and i not in ends)

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
        input_ids, attention_mask = right_pad(rows, self.padding(rows))
        padded = {"input_ids": input_ids, "attention_mask": attention_mask}
        for name in columns.keys() - padded.keys():
            padded[name], _ = right_pad(columns[name], self.tokenizer.pad_token_type_id)
        return BatchEncoding(padded)

    def _say_cut(self, tokens: int, longest: int, pairs: bool) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"The reward model {self.name!r} reads {longest} tokens, but prompt and response have up to "
                f"{tokens}: {'the longer of the two is cut' if pairs else 'the beginning of the prompt is left out'}. "
                "Lower max_prompt_length or response_length, or take a reward model that reads more.",
                stacklevel=3,
            )

    def _keep_ends(self, columns: dict[str, list[list[int]]], longest: int) -> dict[str, list[list[int]]]:
        special = set(self.tokenizer.all_special_ids)
        firsts = [int(ids[:1] != [] and ids[0] in special) for ids in columns["input_ids"]]
        return {
            name: [
                row if len(row) <= longest else row[:first] + row[len(row) - longest + first :]
                for row, first in zip(rows, firsts, strict=True)
            ]
            for name, rows in columns.items()
        }


def max_input_length(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens a classifier reads: what its tokenizer says, and no more than it has positions for."""
    config = getattr(model, "config", None)
    positions = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = module.num_embeddings - module.padding_idx - 1  # RoBERTa counts on from its padding id
    limits = (tokenizer.model_max_length, positions)
    return min((n for n in limits if n is not None and 0 < n < VERY_LARGE_INTEGER), default=None)


@torch.no_grad()
def score_in_batches(texts: list, batch_size: BatchSize, score: Callable[[list], Tensor]) -> list[float]:
    """Score texts (or pairs of them, or token ids) of similar length together; scores in the order of the texts."""
    sizes = [len("".join(text)) if isinstance(text, str | tuple) else len(text) for text in texts]
    order = torch.tensor(sizes).argsort(stable=True)
    scores = torch.zeros(len(texts))

    def score_rows(rows: Tensor) -> None:
        scores[rows] = score([texts[int(i)] for i in rows]).cpu()

    batch_size.run(order, score_rows)
    return scores.tolist()

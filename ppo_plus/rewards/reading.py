"""From texts to the inputs of a reward model, as many at a time as fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from ..chat import is_conversational
from ..data import drop_doubled_start, pad_id, right_pad
from ..out_of_memory import in_chunks
from .completions import Completions


class Reader:
    """Makes right-padded inputs of texts, pairs of texts or token ids, and says once where there are too many tokens.

    One text keeps its end, where the response is, and its first token if that is a special one (BOS, CLS). Of a pair
    the longer text is cut.

    Args:
        tokenizer: of the reward model.
        name: of the reward model.
        longest: most tokens that it reads; None where there is no limit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, longest: int | None) -> None:
        self.tokenizer, self.name, self.longest = tokenizer, name, longest
        self._said = False

    def __call__(self, texts: list, batch: Completions) -> BatchEncoding:
        """Inputs of the reward model, `(B, T)` each; a chat template has put its special tokens in already."""
        options: dict[str, Any] = {"return_tensors": "pt", "padding": True, "padding_side": "right", "verbose": False}
        pairs, tokenized = isinstance(texts[0], tuple), isinstance(texts[0], list)
        if pairs:
            questions, answers = map(list, zip(*texts, strict=True))
            options |= {"text": questions, "text_pair": answers}
        else:
            options |= {"text": texts, "add_special_tokens": not is_conversational(batch.prompts[0])}
        if tokenized:
            input_ids, attention_mask = right_pad(texts, pad_id(self.tokenizer))
            inputs = BatchEncoding({"input_ids": input_ids, "attention_mask": attention_mask})
        else:
            inputs = self.tokenizer(**options)
            if not pairs and options["add_special_tokens"]:
                inputs = drop_doubled_start(inputs, texts, self.tokenizer)
        tokens = inputs["input_ids"].shape[1]
        if self.longest is None or tokens <= self.longest:
            return inputs
        if not self._said:
            self._said = True
            warnings.warn(
                f"The reward model {self.name!r} reads {self.longest} tokens, but prompt and response have up to "
                f"{tokens}: {'the longer of the two is cut' if pairs else 'the beginning of the prompt is left out'}. "
                "Lower max_prompt_length or response_length, or take a reward model that reads more.",
                stacklevel=2,
            )
        if pairs:
            return self.tokenizer(**options, truncation=True, max_length=self.longest)
        return self._ends(inputs, self.longest)

    def _ends(self, inputs: BatchEncoding, longest: int) -> BatchEncoding:
        kept = {name: tensor[:, :longest].clone() for name, tensor in inputs.items()}
        for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            if length > longest:
                first = int(inputs["input_ids"][row, 0].item() in self.tokenizer.all_special_ids)
                for name, tensor in inputs.items():
                    kept[name][row, first:] = tensor[row, length - longest + first : length]
        return BatchEncoding(kept)


def most_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens a classifier reads: what its tokenizer says, and no more than it has positions for."""
    config = getattr(model, "config", None)
    positions = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = module.num_embeddings - module.padding_idx - 1  # RoBERTa counts on from its padding id
    limits = (tokenizer.model_max_length, positions)
    return min((n for n in limits if n is not None and 0 < n < VERY_LARGE_INTEGER), default=None)


@torch.no_grad()
def in_batches(texts: list, batch_size: int, score: Callable[[list], Tensor]) -> tuple[list[float], int]:
    """Score texts (or pairs of them, or token ids) of similar length together.

    Returns:
        the scores in the order of the texts, and the batch size that fitted into memory.
    """
    sizes = [len("".join(text)) if isinstance(text, str | tuple) else len(text) for text in texts]
    order = torch.tensor(sizes).argsort(stable=True)
    scores = torch.zeros(len(texts))

    def score_rows(rows: Tensor) -> None:
        scores[rows] = score([texts[int(i)] for i in rows]).cpu()

    batch_size = in_chunks(order, batch_size, score_rows)
    return scores.tolist(), batch_size

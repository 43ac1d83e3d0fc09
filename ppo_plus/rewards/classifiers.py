"""Sequence classifiers as rewards, with a tokenizer of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.padding import unpad
from ..kernels.batch_backoff import BatchSize
from ..kernels.fp32_heads import compute_heads_in_fp32
from ..models.classifier import is_encoder, set_padding
from .completions import Completions, Score, validate_scores
from .tokenization import RewardTokenizer, max_input_length, score_in_batches


class ClassifierReward:
    """A sequence classifier with one label and its own tokenizer.

    An encoder (BERT, DeBERTa) whose tokenizer has no chat template reads question and answer as a pair of texts, the
    way such reward models are trained. Every other classifier reads one text, and so does an encoder that
    `RewardTrainer` has trained: through its own chat template where prompts are messages, else with its EOS at the end,
    with or without which the same text may get quite another score. `RewardTokenizer` truncates a text that is
    longer than the model reads. The score is read where the model itself would read it of the text alone: at the last
    token but for the padding token of the model's own configuration, whatever padding token the tokenizer has.

    Args:
        model: with one label; on its device already.
        tokenizer: of that model. One without `eos_token` leaves plain text as it is.
        name: what metrics call it.
        batch_size: texts per forward pass.
        chat_template_kwargs: arguments of `apply_chat_template`.
        expects_single_text: whether `RewardTrainer` has trained it: on texts with EOS, whatever the tokenizer adds.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        batch_size: int,
        chat_template_kwargs: dict[str, Any],
        expects_single_text: bool = False,
    ) -> None:
        config = getattr(model, "config", None)
        labels = getattr(config, "num_labels", 1)
        if labels != 1:
            raise ValueError(f"The reward model {name!r} has num_labels={labels}; a reward model needs num_labels=1.")
        text_config = None if config is None else config.get_text_config()
        own_padding, known = (getattr(text_config, key, None) for key in ("pad_token_id", "vocab_size"))
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        compute_heads_in_fp32(model)
        self.batch_size, self.chat_template_kwargs = BatchSize(batch_size), chat_template_kwargs
        self.read = RewardTokenizer(tokenizer, name, max_input_length(model, tokenizer), own_padding, known)
        self.reads_pairs = is_encoder(config) and tokenizer.chat_template is None and not expects_single_text
        adds_eos = tokenizer("")["input_ids"][-1:] == [tokenizer.eos_token_id]
        self.end = tokenizer.eos_token or "" if expects_single_text or not adds_eos else ""

    def __call__(self, batch: Completions) -> Sequence[Score]:
        """Score prompt and completion, rendered with this model's own template and tokenizer."""
        one = (self.tokenizer, self.chat_template_kwargs, self.end)
        texts = batch.pairs() if self.reads_pairs else batch.texts(*one)
        device = next(self.model.parameters()).device

        def score(texts: list) -> Tensor:
            inputs = self.read(texts, batch)
            self._check_vocabulary(int(inputs["input_ids"].max()))
            filler = self.read.padding(unpad(inputs["input_ids"], inputs["attention_mask"]))
            with set_padding(self.model, filler):
                return self.model(**inputs.to(device)).logits[:, 0].float()

        return validate_scores(score_in_batches(texts, self.batch_size, score), batch, self.name)

    def _check_vocabulary(self, largest: int) -> None:
        known = getattr(getattr(self.model, "config", None), "vocab_size", None)
        if known is not None and largest >= known:
            raise ValueError(
                f"The reward model {self.name!r} has embeddings for {known} tokens, but its tokenizer gave the id "
                f"{largest}. Pass the reward model's own tokenizer in reward_processing_classes."
            )

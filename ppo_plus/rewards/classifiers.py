"""Sequence classifiers as rewards, each with its own tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.chat_templates import PROBE, render_chat
from ..data.padding import unpad
from ..kernels.batch_backoff import BatchSize
from ..kernels.fp32_heads import compute_heads_in_fp32
from ..models.classifier import is_encoder, set_padding, trial_precisions
from .completions import Completions, Score, validate_scores
from .tokenization import RewardTokenizer, max_input_length, score_in_batches

# Prompts, answers and their token ids: a short text, and a longer one to whose length it is padded.
TRIAL = Completions(["so", "is it so"], ["no", "it is"], [[0], [0]])


class ClassifierReward:
    """Score completions with a sequence classifier that has one label and its own tokenizer.

    An encoder (BERT, DeBERTa) whose tokenizer has no chat template receives question and answer as a text pair, as in
    the training of such reward models. Every other classifier receives a single text, and so does an encoder trained by
    `RewardTrainer`: messages are rendered with its chat template, and EOS is appended to plain text, because the score
    may differ considerably without it. `RewardTokenizer` truncates texts that exceed the model's maximum input length.
    The score is taken at the same token as for the unpadded text: the last token that is not the padding token of the
    model's configuration, whatever the padding token of the tokenizer.

    Args:
        model: classifier with one label, already on its device.
        tokenizer: tokenizer of the model. Without `eos_token`, plain text is scored without EOS.
        name: name in metrics and errors.
        batch_size: texts per forward pass.
        chat_template_kwargs: arguments of `apply_chat_template`.
        expects_single_text: whether `RewardTrainer` trained the model, on texts with EOS for any tokenizer.
        use_kernels: whether its head computes in fp32, whatever the dtype of the backbone.
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
        use_kernels: bool = True,
    ) -> None:
        config = getattr(model, "config", None)
        labels = getattr(config, "num_labels", 1)
        if labels != 1:
            raise ValueError(f"The reward model {name!r} has num_labels={labels}; a reward model needs num_labels=1.")
        text_config = None if config is None else config.get_text_config()
        pad_token_id, num_embeddings = (getattr(text_config, key, None) for key in ("pad_token_id", "vocab_size"))
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        if use_kernels:
            compute_heads_in_fp32(model)
        self.batch_size, self.chat_template_kwargs = BatchSize(batch_size), chat_template_kwargs
        self.tokenize = RewardTokenizer(
            tokenizer, name, max_input_length(model, tokenizer), pad_token_id, num_embeddings
        )
        self.expects_pairs = is_encoder(config) and tokenizer.chat_template is None and not expects_single_text
        adds_eos = tokenizer("")["input_ids"][-1:] == [tokenizer.eos_token_id]
        self.text_suffix = tokenizer.eos_token or "" if expects_single_text or not adds_eos else ""
        self._check_special_tokens()
        self.pads = True
        self.pads = not self._depends_on_padding()

    def __call__(self, batch: Completions) -> Sequence[Score]:
        """Score prompts with completions, rendered with this model's template and tokenizer."""
        if self.expects_pairs:
            texts: list = batch.pairs()
        else:
            texts = batch.texts(self.tokenizer, self.chat_template_kwargs, self.text_suffix)
        device = next(self.model.parameters()).device

        def score(texts: list) -> Tensor:
            if not self.pads and len(texts) > 1:
                return torch.cat([score([text]) for text in texts])
            inputs = self.tokenize(texts, batch)
            self._check_vocabulary(int(inputs["input_ids"].max()))
            pad_token_id = self.tokenize.choose_pad_id(unpad(inputs["input_ids"], inputs["attention_mask"]))
            with set_padding(self.model, pad_token_id):
                return self.model(**inputs.to(device)).logits[:, 0].float()

        return validate_scores(score_in_batches(texts, self.batch_size, score), batch, self.name)

    def _depends_on_padding(self) -> bool:
        """Return whether padding to the length of a longer text changes a score, as in XLNet, CANINE and FNet.

        Under autocast, the texts are scored in its dtype and in that of the weights.
        """
        short = Completions(TRIAL.prompts[:1], TRIAL.completions[:1], TRIAL.completion_ids[:1])
        depends = False
        try:
            for context, tolerance in trial_precisions(next(self.model.parameters())):
                with context:
                    together, alone = (cast(float, self(batch)[0]) for batch in (TRIAL, short))
                depends |= abs(together - alone) > tolerance * max(1.0, abs(alone))
        except Exception as error:
            raise ValueError(
                f"The reward model {self.name!r} ({type(self.model).__name__}) failed on the prompts {TRIAL.prompts}: "
                f"{type(error).__name__}: {error}. Pass a function that calls it."
            ) from error
        if depends:
            warnings.warn(
                f"The scores of the reward model {self.name!r} ({type(self.model).__name__}) depend on the padding of "
                "their batch, so it scores one text at a time, which is slower. A model whose attention mask covers "
                "padding everywhere scores in batches.",
                stacklevel=4,
            )
        return depends

    def _check_special_tokens(self) -> None:
        chat = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]
        rendered = "" if self.tokenizer.chat_template is None else render_chat(chat, self.tokenizer, {})
        ids = [*self.tokenizer(self.text_suffix)["input_ids"], *self.tokenizer(rendered)["input_ids"]]
        self._check_vocabulary(max(ids, default=0))

    def _check_vocabulary(self, max_id: int) -> None:
        vocab_size = getattr(getattr(self.model, "config", None), "vocab_size", None)
        if vocab_size is not None and max_id >= vocab_size:
            raise ValueError(
                f"The reward model {self.name!r} has embeddings for {vocab_size} tokens, but its tokenizer returned "
                f"the id {max_id} ({self.tokenizer.convert_ids_to_tokens(max_id)!r}). Pass the tokenizer that it was "
                "trained with in reward_processing_classes."
            )

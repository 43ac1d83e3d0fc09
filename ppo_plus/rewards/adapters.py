"""Reward adapters on the actor's backbone, and checks that an adapter matches base, template and precision."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..data.padding import left_pad, pad_id, unpad
from ..kernels.batch_backoff import BatchSize
from ..kernels.shared_prompts import common_prefixes
from ..models.actor_critic import ActorCritic
from ..models.adapter_checks import check_base_weights
from ..models.adapter_files import REWARD_FILE, base_samples, load_reward_metadata, local_base, trained_on
from ..models.base_weights import WeightSamples, read_configuration
from ..models.score_heads import pool_last_token, read_v_head
from .completions import Completions, Score, validate_scores
from .tokenization import RewardTokenizer, score_in_batches


class AdapterReward:
    """Reward model as a PEFT adapter on the actor's backbone; it needs memory only for its LoRA weights."""

    def __init__(
        self,
        path: Path,
        model: ActorCritic,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        batch_size: int,
        chat_template_kwargs: dict[str, Any],
    ) -> None:
        self.info = load_reward_metadata(path)
        check_same_template(path, self.info, tokenizer)
        check_same_precision(path, self.info, model.config)
        self.head = model.load_reward_adapter(name, path)
        self.pad_token_id = find_padding_id(path, self.info, tokenizer)
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.batch_size, self.chat_template_kwargs = BatchSize(batch_size), chat_template_kwargs
        self.tokenize = RewardTokenizer(tokenizer, name, model.context, num_embeddings=model.num_embeddings)
        # Prefix scores of the last batch, by token ids.
        self._prefix_score_cache: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, batch: Completions) -> Sequence[Score]:
        """Score prompts with completions, with the same result as the reward model used alone.

        Prompts given as token ids, and the tokens sampled after them, are scored without tokenizing them again.
        """
        self._prefix_score_cache.clear()
        texts: list
        if batch.prompt_ids is None:
            # The reward model was trained on texts that end with EOS.
            texts = batch.texts(self.tokenizer, self.chat_template_kwargs, cast(str, self.tokenizer.eos_token))
        else:
            texts = self._sequences(batch.prompt_ids, batch)

        def score(texts: list) -> Tensor:
            inputs = self.tokenize(texts, batch)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            scores = self._score_tokens(ids, mask)
            for row, row_scores in zip(unpad(ids, mask), scores, strict=True):
                self._prefix_score_cache[self._strip_eos(row)] = row_scores
            return pool_last_token(scores, ids, mask, self.pad_token_id)

        prompts = batch.prompts if self.model.runner.sharing_models else None
        return validate_scores(score_in_batches(texts, self.batch_size, score, prompts), batch, self.name)

    def _sequences(self, prompt_ids: list[list[int]], batch: Completions) -> list[list[int]]:
        eos = cast(int, self.tokenizer.eos_token_id)
        sequences = [prompt + completion for prompt, completion in zip(prompt_ids, batch.completion_ids, strict=True)]
        return [ids if ids[-1] == eos else [*ids, eos] for ids in sequences]

    @torch.no_grad()
    def prefix_scores(self, sequences: Sequence[list[int]]) -> list[Tensor]:
        """Score every prefix of each sequence, except for an EOS at its end; float32, reward units.

        Sequences of the last scored batch come from the cache; the others need a forward pass.
        """
        eos = self.tokenizer.eos_token_id
        keys = [tuple(s[:-1] if s[-1] == eos else s) for s in sequences]
        missing = [key for key in keys if key not in self._prefix_score_cache]

        def score_rows(rows: Tensor) -> None:
            batch = [missing[int(i)] for i in rows]
            scores = self._score_tokens(*left_pad(batch, pad_id(self.tokenizer)))
            self._prefix_score_cache.update((key, row[-len(key) :]) for key, row in zip(batch, scores, strict=True))

        order = torch.tensor([len(key) for key in missing], dtype=torch.int64).argsort(stable=True)
        self.batch_size.run(order, score_rows)
        return [self._prefix_score_cache[key][: len(key)] for key in keys]

    def _score_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        device, lengths = self.model.device, attention_mask.sum(1).tolist()
        shares = self.model.language_model in self.model.runner.sharing_models
        prefixes = common_prefixes(unpad(input_ids, attention_mask)) if shares else None
        inputs = input_ids.to(device), attention_mask.to(device)
        return self.model.prefix_rewards(self.name, self.head, *inputs, lengths, prefixes).cpu()

    def _strip_eos(self, ids: list[int]) -> tuple[int, ...]:
        # The last EOS and the tokens that a chat template appends to it are not part of the sampled prefix.
        eos_positions = [i for i, token in enumerate(ids) if token == self.tokenizer.eos_token_id]
        return tuple(ids[: eos_positions[-1]] if eos_positions else ids)


def check_same_base(path: Path, base: str, samples: WeightSamples) -> None:
    """Refuse an adapter trained on a different base than the actor's, by the weights or else by the names.

    Args:
        path: folder of the adapter.
        base: name of the actor's base.
        samples: weight samples of the actor's base; empty if the base is not on this machine yet.
    """
    trained_base = trained_on(path)
    if check_base_weights(path, samples, base) or (not samples and base_samples(path)):
        return  # the weights are equal, or will be compared after the actor's base is loaded
    names = [
        Path(name).name.lower().removesuffix("-bnb-4bit").removesuffix("-unsloth") for name in (trained_base, base)
    ]
    if all(names) and names[0] != names[1]:
        raise ValueError(
            f"The reward adapter in {path} was trained on {trained_base!r}, but the actor's base is {base!r}, so its "
            "scores would be meaningless. Train an adapter on the actor's base (or, if this is the same base under "
            f"another name, write that name into {REWARD_FILE} and {CONFIG_NAME})."
        )
    if all(names) and trained_base != base:
        warnings.warn(
            f"The reward adapter in {path} was trained on {trained_base!r}, which is not on this machine, so its "
            f"weights could not be compared with those of the actor's base {base!r}: only the names were compared.",
            stacklevel=2,
        )


def find_padding_id(path: Path, info: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the padding token id of a reward adapter; None if its score is at the last token.

    Sources, in order of precedence: the metadata written by `RewardTrainer`; a value head of LLaMA-Factory, whose score
    is at the last token; the adapter's tokenizer, whose padding token TRL's `RewardTrainer` sets in the model; the
    configuration of the base.

    Args:
        path: folder of the adapter.
        info: metadata from `load_reward_metadata`.
        tokenizer: tokenizer of the base.
    """
    if "pad_token_id" in info:
        recorded = info["pad_token_id"]
        if not isinstance(recorded, int | None):
            raise ValueError(
                f"{path / REWARD_FILE}: pad_token_id is {recorded!r}; it must be a token id, or null if the score is "
                "at the last token."
            )
        return recorded
    if read_v_head(path):
        return None
    token = get_tokenizer_config(path).get("pad_token")
    if token is not None:
        return tokenizer.get_vocab().get(token["content"] if isinstance(token, dict) else token)
    config = read_configuration(local_base(path))
    return cast(int | None, config.get("text_config", config).get("pad_token_id"))


def check_same_template(path: Path, info: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn if a reward adapter was trained with a different chat template than the actor's."""
    template = info.get("chat_template_sha256")
    if "chat_template_sha256" in info and template != template_hash(tokenizer):
        warnings.warn(
            f"The reward adapter in {path} was trained with the chat template {str(template)[:12]}, but the actor's "
            f"tokenizer has {str(template_hash(tokenizer))[:12]}, so conversations are rendered differently. Set the "
            "template of the reward adapter's training on the actor's tokenizer.",
            stacklevel=2,
        )


def check_same_precision(path: Path, info: dict[str, Any], config: PretrainedConfig) -> None:
    """Warn if the base of a reward adapter was quantized differently than the actor's base."""
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, QuantizationConfigMixin):
        quantization = quantization.to_dict()
    actor_format, trained_format = quantization_name(quantization), quantization_name(info.get("quantization"))
    if "quantization" in info and actor_format != trained_format:
        warnings.warn(
            f"The reward adapter in {path} was trained on a base that is {trained_format}, but the actor's base is "
            f"{actor_format}: its scores differ from those it was trained and calibrated with. Load both bases the "
            "same way.",
            stacklevel=2,
        )


def quantization_name(config: dict[str, Any] | None) -> str:
    """Return a short name of a quantization format, such as `nf4`, `int8` or `not quantized`."""
    if not config:
        return "not quantized"
    if config.get("load_in_4bit"):
        return cast(str, config["bnb_4bit_quant_type"])
    return "int8" if config.get("load_in_8bit") else str(config.get("quant_method"))


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the SHA-256 of the chat template, or None without a template."""
    template = tokenizer.chat_template
    return None if template is None else hashlib.sha256(json.dumps(template).encode()).hexdigest()

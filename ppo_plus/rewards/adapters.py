"""Reward adapters on the actor's own backbone, and what must be true of one before it is mounted there."""

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
from ..models.actor_critic import ActorCritic, pool_last_token
from ..models.adapter_checks import check_base_weights
from ..models.adapter_files import REWARD_FILE, base_samples, load_reward_metadata, local_base, trained_on
from ..models.base_weights import WeightSamples, read_configuration
from ..models.score_heads import read_v_head
from .completions import Completions, Score, validate_scores
from .tokenization import RewardTokenizer, score_in_batches


class AdapterReward:
    """A reward adapter mounted on the actor's backbone: a reward model for the memory of its LoRA weights."""

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
        self.pad_token_id = own_padding(path, self.info, tokenizer)
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.batch_size, self.chat_template_kwargs = BatchSize(batch_size), chat_template_kwargs
        self.read = RewardTokenizer(tokenizer, name, model.context, embeddings=model.num_embeddings)
        self._seen: dict[tuple[int, ...], Tensor] = {}  # of the last batch: scores at its tokens, by the tokens

    def __call__(self, batch: Completions) -> Sequence[Score]:
        """Score prompt and completion as the stand-alone reward model would.

        Prompts that are token ids are read as they are, and so are the tokens that were sampled after them.
        """
        self._seen.clear()
        texts: list
        if batch.prompt_ids is None:
            # The reward model was trained on texts that end in EOS.
            texts = batch.texts(self.tokenizer, self.chat_template_kwargs, cast(str, self.tokenizer.eos_token))
        else:
            texts = self._sequences(batch.prompt_ids, batch)

        def score(texts: list) -> Tensor:
            inputs = self.read(texts, batch)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            scores = self._token_scores(ids, mask)
            for row, at_tokens in zip(unpad(ids, mask), scores, strict=True):
                self._seen[self._before_eos(row)] = at_tokens
            return pool_last_token(scores, ids, mask, self.pad_token_id)

        return validate_scores(score_in_batches(texts, self.batch_size, score), batch, self.name)

    def _sequences(self, prompt_ids: list[list[int]], batch: Completions) -> list[list[int]]:
        eos = cast(int, self.tokenizer.eos_token_id)
        sequences = [prompt + completion for prompt, completion in zip(prompt_ids, batch.completion_ids, strict=True)]
        return [ids if ids[-1] == eos else [*ids, eos] for ids in sequences]

    @torch.no_grad()
    def prefix_scores(self, sequences: Sequence[list[int]]) -> list[Tensor]:
        """Scores of each sequence as far as each of its tokens, but for an EOS at its end; float32, reward units.

        Costs nothing where the last texts scored have just these tokens; others are read here.
        """
        ends = self.tokenizer.eos_token_id
        keys = [tuple(s[:-1] if s[-1] == ends else s) for s in sequences]
        missing = [key for key in keys if key not in self._seen]

        def score_rows(rows: Tensor) -> None:
            chosen = [missing[int(i)] for i in rows]
            scores = self._token_scores(*left_pad(chosen, pad_id(self.tokenizer)))
            self._seen.update((key, at_tokens[-len(key) :]) for key, at_tokens in zip(chosen, scores, strict=True))

        order = torch.tensor([len(key) for key in missing], dtype=torch.int64).argsort(stable=True)
        self.batch_size.run(order, score_rows)
        return [self._seen[key][: len(key)] for key in keys]

    def _token_scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        device, lengths = self.model.device, attention_mask.sum(1).tolist()
        inputs = input_ids.to(device), attention_mask.to(device)
        return self.model.prefix_rewards(self.name, self.head, *inputs, lengths).cpu()

    def _before_eos(self, ids: list[int]) -> tuple[int, ...]:
        # The last EOS and what a chat template puts behind it were not sampled, or end what was.
        ends = [i for i, token in enumerate(ids) if token == self.tokenizer.eos_token_id]
        return tuple(ids[: ends[-1]] if ends else ids)


def check_same_base(path: Path, base: str, samples: WeightSamples) -> None:
    """Refuse an adapter that was trained on another base than the actor's, by the weights, else by the names.

    Args:
        path: of the adapter.
        base: name of the actor's base.
        samples: of the weights of the actor's base; empty where none is on this machine yet.
    """
    theirs = trained_on(path)
    if check_base_weights(path, samples, base) or (not samples and base_samples(path)):
        return  # the same, or compared once the actor's base is loaded
    names = [Path(name).name.lower().removesuffix("-bnb-4bit").removesuffix("-unsloth") for name in (theirs, base)]
    if all(names) and names[0] != names[1]:
        raise ValueError(
            f"The reward adapter in {path} was trained on {theirs!r}, the actor's base is {base!r}: its numbers mean "
            "nothing there. Train one on the actor's base (or, if this is the same base under another name, put that "
            f"name into {REWARD_FILE} and {CONFIG_NAME})."
        )
    if all(names) and theirs != base:
        warnings.warn(
            f"The reward adapter in {path} was trained on {theirs!r}, which is not on this machine, so its weights "
            f"could not be compared with those of the actor's base {base!r}: they are taken for the same by the name.",
            stacklevel=2,
        )


def own_padding(path: Path, info: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the padding token of a reward adapter used alone; None where its score is read at the last token.

    The sources, in their order: what `RewardTrainer` wrote; a value head of LLaMA-Factory, which is read at the last
    token; the adapter's own tokenizer, whose padding token TRL's `RewardTrainer` gives to the model; the base.

    Args:
        path: of the adapter.
        info: of `load_reward_metadata`.
        tokenizer: of the base.
    """
    if "pad_token_id" in info:
        recorded = info["pad_token_id"]
        if not isinstance(recorded, int | None):
            raise ValueError(
                f"{path / REWARD_FILE}: pad_token_id is {recorded!r}; it must be the id of a token, or null where the "
                "score is read at the last token."
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
    """Name both sides where a reward adapter was trained with another chat template than the actor's."""
    template = info.get("chat_template_sha256")
    if "chat_template_sha256" in info and template != template_hash(tokenizer):
        warnings.warn(
            f"The reward adapter in {path} was trained with the chat template {str(template)[:12]}, the actor's "
            f"tokenizer has {str(template_hash(tokenizer))[:12]}; conversations would be scored in another form.",
            stacklevel=2,
        )


def check_same_precision(path: Path, info: dict[str, Any], config: PretrainedConfig) -> None:
    """Name both sides where a reward adapter was trained on a base that is quantized otherwise than the actor's."""
    given = getattr(config, "quantization_config", None)
    here = quantization_name(given.to_dict() if isinstance(given, QuantizationConfigMixin) else given)
    there = quantization_name(info.get("quantization"))
    if "quantization" in info and here != there:
        warnings.warn(
            f"The reward adapter in {path} was trained on a base that is {there}, the actor's is {here}: its scores "
            "are not those that it was trained and calibrated with. Load both bases the same way.",
            stacklevel=2,
        )


def quantization_name(config: dict[str, Any] | None) -> str:
    """What a quantization makes of the weights, in a word or two."""
    if not config:
        return "not quantized"
    if config.get("load_in_4bit"):
        return cast(str, config["bnb_4bit_quant_type"])
    return "int8" if config.get("load_in_8bit") else str(config.get("quant_method"))


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the chat template, or None where there is none."""
    template = tokenizer.chat_template
    return None if template is None else hashlib.sha256(json.dumps(template).encode()).hexdigest()

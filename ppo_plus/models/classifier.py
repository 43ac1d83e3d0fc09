"""Load sequence classifiers and their tokenizers, also for model families without a class in transformers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..kernels.lora import autocast_dtype
from ..utils.contexts import evaluation_mode, set_attributes
from .backbone import CACHE_NAMES, is_recurrent
from .base_weights import local_folder, read_weight
from .score_heads import OTHER_HEAD_KEY, make_score_head, read_v_head

# A head among the weights that a classifier's class does not have, except for a language-model head.
HEAD_KEY = re.compile(r"^(?!lm_head\.)\w*(?:head|score|classifier|reward|regression)\w*\.")


def is_encoder(config: PreTrainedConfig | str | None) -> bool:
    """Return whether a configuration, or a `model_type`, is that of an encoder such as BERT."""
    kind = config if isinstance(config, str) else getattr(config, "model_type", None)
    return kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def set_padding(model: nn.Module, pad_token_id: int) -> AbstractContextManager:
    """Context manager: set a classifier's padding token; its score is that of the last other token."""
    config = getattr(model, "config", None)
    return nullcontext() if config is None else set_attributes(config.get_text_config(), pad_token_id=pad_token_id)


@torch.no_grad()
def depends_on_padding(model: nn.Module, pad_token_id: int) -> bool:
    """Return whether padding changes the score of a text, as in XLNet, CANINE and FNet.

    Under autocast, the text is scored in its dtype and in that of the weights.

    Args:
        model: sequence classifier with one label.
        pad_token_id: token with which its texts are padded on the right.
    """
    config, weight = cast(Any, model).config.get_text_config(), next(model.parameters())
    eos = getattr(config, "eos_token_id", None)
    end = eos if isinstance(eos, int) and eos >= 0 else 1  # BART pools its score at EOS
    ids = [*(i for i in range(min(12, getattr(config, "vocab_size", 12))) if i not in (pad_token_id, end)), end]
    # A second row, without padding, because batches are as long as their longest text.
    rows = torch.tensor([ids + [pad_token_id] * len(ids), [*ids[:-1] * 2, ids[0], end]], device=weight.device)
    mask = torch.ones_like(rows)
    mask[0, len(ids) :] = 0
    depends = False
    for context, tolerance in trial_precisions(weight):
        with evaluation_mode(model), context:
            padded = model(input_ids=rows, attention_mask=mask).logits[:1].float()
            alone = model(input_ids=rows[:1, : len(ids)], attention_mask=mask[:1, : len(ids)]).logits.float()
        depends |= bool(((padded - alone).abs() > tolerance * alone.abs().clamp(min=1.0)).any())
    return depends


def trial_precisions(weight: Tensor) -> list[tuple[AbstractContextManager, float]]:
    """Return contexts for trials of a model, each with the largest error of a score that is rounding there.

    One computes in the dtype of the weights, and another in that of autocast if it is on.
    """
    kind, exact = weight.device.type, 1e-3 if weight.dtype == torch.float32 else 0.05
    if autocast_dtype(kind) in (None, weight.dtype):
        return [(nullcontext(), exact)]
    return [(torch.autocast(kind, enabled=False), exact), (nullcontext(), 0.05)]


def register_sequence_classifier(config: PreTrainedConfig) -> None:
    """Register a model family without a classifier in transformers at `AutoModelForSequenceClassification`.

    Half of the decoders have none (in 5.24: Gemma 4, Granite, LFM 2, Cohere). They get the generic classifier of the
    others: a linear head `score` on the last hidden state of the last token.
    """
    kind = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or kind not in MODEL_MAPPING:
        return
    backbone = cast(Any, MODEL_MAPPING[kind])
    has_cache = not {*CACHE_NAMES}.isdisjoint(inspect.signature(backbone.forward).parameters)
    if not has_cache or is_recurrent(DynamicCache(config=config.get_text_config())):
        raise ValueError(  # the generic classifier does not know Mamba's states
            f"{kind.__name__.removesuffix('Config')} is no sequence classifier: transformers has none for it, and its "
            "states are recurrent. Train the reward model or critic on another model."
        )
    family = next(base for base in backbone.__mro__ if PreTrainedModel in base.__bases__)
    # By `__module__`, transformers recognizes its own classes, and fills buffers that are in no file.
    names = {"config_class": kind, "base_model_prefix": family.base_model_prefix, "__module__": backbone.__module__}
    name = kind.__name__.removesuffix("Config") + "ForSequenceClassification"
    classifier = type(name, (GenericForSequenceClassification, family), names)
    AutoModelForSequenceClassification.register(kind, classifier, exist_ok=True)  # False would refuse its own families


def load_classifier(name: str, dtype: torch.dtype | str) -> tuple[PreTrainedModel, list[str]]:
    """Load a sequence classifier with one label, including a bias of its head, or a value head as its score.

    Args:
        name: a sequence classifier, or a language model with a value head (`v_head.*`), as LLaMA-Factory writes.
        dtype: dtype of the weights.

    Returns:
        the model, and the names of its weights that are missing in its files.

    Raises:
        ValueError: it was trained with another number of labels, or with a head that transformers would not load.
    """
    register_sequence_classifier(AutoConfig.from_pretrained(name, trust_remote_code=False))
    model, info = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=1, dtype=dtype, trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True
    )
    if info["mismatched_keys"]:
        raise ValueError(
            f"{name!r} was trained with more than one label, so its outputs are classes. A reward model or critic has "
            "one output: train one with num_labels=1."
        )
    missing, unexpected = sorted(info["missing_keys"]), set(info["unexpected_keys"])
    if missing == ["score.weight"] and (head := read_v_head(local_folder(name))):
        _set_score_head(model, head)
        model.config.get_text_config().pad_token_id = None  # its score is read at the last token
        return model, []
    if "score.bias" in unexpected and "score.weight" not in missing:
        bias = read_weight(local_folder(name), "score.bias")
        _set_score_head(model, {"weight": cast(Any, model).score.weight.detach(), "bias": bias})
        unexpected.remove("score.bias")
    heads = {(): HEAD_KEY, ("score.weight",): OTHER_HEAD_KEY}.get(tuple(missing))
    if left_out := sorted(key for key in unexpected if heads is not None and heads.search(key)):
        raise ValueError(
            f"{name!r} has a head that {type(model).__name__} does not load ({', '.join(left_out[:3])}), so its scores "
            "would be wrong. Load it with the code that trained it, and pass a function that calls it."
        )
    return model, missing


def _set_score_head(model: PreTrainedModel, head: Mapping[str, Tensor]) -> None:
    like = cast(Any, model).score.weight
    cast(Any, model).score = make_score_head(head).to(like.device, like.dtype).requires_grad_()


def load_reward_tokenizer(reward: Any) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that a reward model was saved with; None for an instance without a name.

    Raises:
        ValueError: there is none, or it has only special tokens: for a folder without a tokenizer, transformers may
            build one that turns every text into unknown tokens.
    """
    is_name = isinstance(reward, str | Path)
    source = str(reward) if is_name else getattr(getattr(reward, "config", None), "_name_or_path", "")
    if not source:
        return None
    fix = "Pass the reward model's tokenizer in reward_processing_classes, or save it in the model's folder"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"The tokenizer of the reward model {source!r} cannot be loaded: {reason} {fix}.") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(f"The reward model {source!r} was saved without a tokenizer. {fix}.")
    return tokenizer

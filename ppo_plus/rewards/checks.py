"""Reward models that could not score, told before the policy is loaded: by a trial pass, and by trial conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..data.chat_templates import is_conversational
from ..models.adapter_files import load_reward_metadata, resolve_adapter_path
from ..models.classifier import is_encoder, load_reward_tokenizer
from .build import normalize_rewards, reward_name
from .completions import Completions

# Classes whose outputs are no score of a text, by the end of their names in a model's `architectures`.
OTHER_TASKS = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
FIX = (
    "Pass a sequence classifier with num_labels=1, or a function(prompts, completions, **kwargs) that asks this model."
)


def check_reward_module(model: nn.Module) -> None:
    """Refuse a module that is no sequence classifier with one label, by a trial pass over three tokens.

    Raises:
        ValueError: it has no weights or another number of labels, fails, or returns something else than
            `logits` of shape (1, 1).
    """
    name, config = reward_name(model), getattr(model, "config", None)
    weight = next(model.parameters(), None)
    if weight is None:
        raise ValueError(f"The reward model {name!r} ({type(model).__name__}) has no weights. {FIX}")
    if (labels := getattr(config, "num_labels", 1)) != 1:
        raise ValueError(f"The reward model {name!r} has num_labels={labels}; a reward model needs num_labels=1.")
    if weight.is_meta:
        return
    end = getattr(config, "eos_token_id", None)  # BART reads its score there
    ids = torch.tensor([[0, 1, end if isinstance(end, int) and end >= 0 else 1]], device=weight.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:
        raise ValueError(
            f"The reward model {name!r} ({type(model).__name__}) failed on a text of three tokens, called with "
            f"input_ids and attention_mask: {type(error).__name__}: {error}. {FIX}"
        ) from error
    finally:
        model.train(training)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape != (1, 1):
        found = f"a {type(output).__name__} without logits"
        if isinstance(logits, Tensor):
            found = f"logits of shape {tuple(logits.shape)}"
        raise ValueError(
            f"The reward model {name!r} ({type(model).__name__}) returned {found} for one text; a reward model returns "
            f"logits of shape (1, 1). {FIX}"
        )


def check_reward_task(name: str) -> None:
    """Refuse the name of a model whose configuration says that it was trained for another task."""
    architectures = PreTrainedConfig.get_config_dict(name)[0].get("architectures") or []
    if other := [each for each in architectures if each.endswith(OTHER_TASKS)]:
        raise ValueError(f"The reward model {name!r} is a {other[0]}, whose outputs are no score of a text. {FIX}")


def load_reward_tokenizers(reward_funcs: Any, tokenizers: Any) -> list[PreTrainedTokenizerBase | None]:
    """Return the tokenizer of each reward model, loaded by its name where none was passed.

    None stands for a reward function, a reward adapter, which reads with the policy's, and an instance without a name.
    """
    funcs, passed = normalize_rewards(reward_funcs, tokenizers)
    loaded: list[PreTrainedTokenizerBase | None] = []
    for func, tokenizer in zip(funcs, passed, strict=True):
        asks_by_name = (
            isinstance(func, str | Path | nn.Module) and tokenizer is None and resolve_adapter_path(func) is None
        )
        loaded.append(load_reward_tokenizer(func) if asks_by_name else tokenizer)
    return loaded


def check_templates(
    reward_funcs: Any,
    tokenizers: Sequence[PreTrainedTokenizerBase | None],
    policy_tokenizer: PreTrainedTokenizerBase,
    datasets: Mapping[str, Any],
    chat_template_kwargs: dict[str, Any],
) -> None:
    """Refuse conversations that the chat template of a reward model does not render, by their row.

    Each form of conversation, by its roles, kinds of content and template arguments, is rendered once with an answer.
    Rows of a stream are not known yet: they are named when they are scored.

    Args:
        reward_funcs: what the user passed.
        tokenizers: of each, as `load_reward_tokenizers` returns them.
        policy_tokenizer: reads for reward adapters, and where there is no other.
        datasets: of prompts, by name.
        chat_template_kwargs: of the run.
    """
    funcs, _ = normalize_rewards(reward_funcs, None)
    asked = [
        (func, policy_tokenizer if tokenizer is None or resolve_adapter_path(func) is not None else tokenizer)
        for func, tokenizer in zip(funcs, tokenizers, strict=True)
        if isinstance(func, str | Path | nn.Module)
    ]
    readers = [(func, tokenizer) for func, tokenizer in asked if not _takes_pairs(func, tokenizer)]
    if not readers:
        return
    for name, dataset in datasets.items():
        for index, row in _distinct_conversations(dataset):
            columns: dict[str, list] = {
                column: [row[column]] for column in ("tools", "chat_template_kwargs") if column in row
            }
            answer = [{"role": "assistant", "content": "yes"}]
            trial = Completions([row["prompt"]], [answer], [[0]], columns)
            for func, tokenizer in readers:
                try:
                    trial.texts(tokenizer, chat_template_kwargs)
                except ValueError as error:
                    raise ValueError(
                        f"{name}[{index}]: the reward model {reward_name(func)!r} cannot read it. {error} Set "
                        "chat_template on its tokenizer and pass that in reward_processing_classes, or change the row."
                    ) from error


def _takes_pairs(func: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    if tokenizer.chat_template is not None or resolve_adapter_path(func) is not None:
        return False
    if isinstance(func, nn.Module):
        config = getattr(func, "config", None)
        return is_encoder(config) and not load_reward_metadata(getattr(config, "_name_or_path", "") or "")
    config = PreTrainedConfig.get_config_dict(str(func))[0].get("model_type")
    return is_encoder(config) and not load_reward_metadata(func)


def _distinct_conversations(dataset: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The first row of each form of conversation in a dataset, with its index."""
    if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
        return
    kept = [name for name in ("prompt", "tools", "chat_template_kwargs") if name in dataset.column_names]
    seen: set[str] = set()
    for index, row in enumerate(dataset.select_columns(kept)):
        if not is_conversational(row["prompt"]):
            continue
        messages = [
            [message["role"], type(message.get("content")).__name__, sorted(key for key in message if message[key])]
            for message in row["prompt"]
        ]
        form = json.dumps([messages, bool(row.get("tools")), row.get("chat_template_kwargs")], default=str)
        if form not in seen:
            seen.add(form)
            yield index, row

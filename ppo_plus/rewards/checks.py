"""Checks of reward models before the policy is loaded: a trial forward pass and trial conversations."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase

from ..data.chat_templates import PROBE, is_conversational
from ..models.adapter_files import load_reward_metadata, resolve_adapter_path
from ..models.classifier import is_encoder, load_reward_tokenizer
from ..utils.contexts import evaluation_mode
from .build import normalize_rewards, reward_name
from .completions import Completions

# Suffixes of class names in a model's `architectures` whose outputs are not the score of a text.
UNSUPPORTED_TASK_SUFFIXES = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
REWARD_MODEL_HINT = (
    "Pass a sequence classifier with num_labels=1, or a function(prompts, completions, **kwargs) that calls this model."
)


def check_reward_module(model: nn.Module) -> None:
    """Refuse a module that is not a sequence classifier with one label, by a forward pass over three tokens.

    Raises:
        ValueError: it has no weights or another number of labels, fails, or does not return `logits` of shape (1, 1).
    """
    name, config = reward_name(model), getattr(model, "config", None)
    weight = next(model.parameters(), None)
    if weight is None:
        raise ValueError(f"The reward model {name!r} ({type(model).__name__}) has no weights. {REWARD_MODEL_HINT}")
    if (labels := getattr(config, "num_labels", 1)) != 1:
        raise ValueError(f"The reward model {name!r} has num_labels={labels}; a reward model needs num_labels=1.")
    if weight.is_meta:
        return
    eos = getattr(config, "eos_token_id", None)  # BART pools its score at EOS
    ids = torch.tensor([[0, 1, eos if isinstance(eos, int) and eos >= 0 else 1]], device=weight.device)
    try:
        with torch.no_grad(), evaluation_mode(model):
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:
        raise ValueError(
            f"The reward model {name!r} ({type(model).__name__}) failed on three tokens, called with input_ids and "
            f"attention_mask: {type(error).__name__}: {error}. {REWARD_MODEL_HINT}"
        ) from error
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape != (1, 1):
        returned = f"a {type(output).__name__} without logits"
        if isinstance(logits, Tensor):
            returned = f"logits of shape {tuple(logits.shape)}"
        raise ValueError(
            f"The reward model {name!r} ({type(model).__name__}) returned {returned} for one text; a reward model must "
            f"return logits of shape (1, 1). {REWARD_MODEL_HINT}"
        )


def check_reward_task(name: str) -> None:
    """Refuse the name of a model whose configuration lists an architecture for another task."""
    config = PreTrainedConfig.get_config_dict(name)[0]
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"The reward model {name!r} needs code from its repository, which ppo_plus does not run. Load it yourself "
            "(trust_remote_code=True), and pass the model if it is a sequence classifier with one label, or a "
            "function(prompts, completions, **kwargs) that calls it."
        )
    architectures = config.get("architectures") or []
    if unsupported := [each for each in architectures if each.endswith(UNSUPPORTED_TASK_SUFFIXES)]:
        raise ValueError(
            f"The reward model {name!r} is a {unsupported[0]}, whose outputs are not the score of a text. "
            f"{REWARD_MODEL_HINT}"
        )


def load_reward_tokenizers(reward_funcs: Any, tokenizers: Any) -> list[PreTrainedTokenizerBase | None]:
    """Return the tokenizer of each reward model, loaded by the model's name if none was passed.

    None for a reward function, for a reward adapter, which uses the policy's tokenizer, and for a model without a name.
    """
    funcs, passed_tokenizers = normalize_rewards(reward_funcs, tokenizers)
    reward_tokenizers: list[PreTrainedTokenizerBase | None] = []
    for func, tokenizer in zip(funcs, passed_tokenizers, strict=True):
        needs_loading = (
            isinstance(func, str | Path | nn.Module) and tokenizer is None and resolve_adapter_path(func) is None
        )
        reward_tokenizers.append(load_reward_tokenizer(func) if needs_loading else tokenizer)
    return reward_tokenizers


def check_templates(
    reward_funcs: Any,
    tokenizers: Sequence[PreTrainedTokenizerBase | None],
    policy_tokenizer: PreTrainedTokenizerBase,
    datasets: Mapping[str, Any],
    chat_template_kwargs: dict[str, Any],
    schemas_of: Callable[[dict[str, Any]], list[dict[str, Any]]] = lambda row: [],
) -> None:
    """Refuse conversations that the chat template of a reward model cannot render; errors name the row.

    Each form of conversation, by its roles, types of content and template arguments, is rendered once with an answer.
    Rows of a stream are checked when they are scored.

    Args:
        reward_funcs: rewards as passed by the user.
        tokenizers: tokenizer of each reward, from `load_reward_tokenizers`.
        policy_tokenizer: tokenizer for reward adapters and for models without a tokenizer.
        datasets: datasets of prompts, by name.
        chat_template_kwargs: arguments of the chat template for the run.
        schemas_of: returns the tools of the run that a row's prompt shows.
    """
    funcs, _ = normalize_rewards(reward_funcs, None)
    models = [
        (func, policy_tokenizer if tokenizer is None or resolve_adapter_path(func) is not None else tokenizer)
        for func, tokenizer in zip(funcs, tokenizers, strict=True)
        if isinstance(func, str | Path | nn.Module)
    ]
    chat_models = [(func, tokenizer) for func, tokenizer in models if not _expects_pairs(func, tokenizer)]
    if not chat_models:
        return
    for name, dataset in datasets.items():
        for index, row in _distinct_conversations(dataset):
            columns: dict[str, list] = {
                column: [row[column]] for column in ("tools", "chat_template_kwargs") if column in row
            }
            schemas = schemas_of(row)
            trial = Completions([row["prompt"]], [_trial_answer(schemas)], [[0]], columns, schemas=[schemas])
            for func, tokenizer in chat_models:
                try:
                    (text,) = trial.texts(tokenizer, chat_template_kwargs)
                    if schemas and not (PROBE in text and schemas[0]["function"]["name"] in text):
                        _warn_of_template_without_tools(func)
                except ValueError as error:
                    raise ValueError(
                        f"{name}[{index}]: the reward model {reward_name(func)!r} cannot process it. {error}"
                    ) from error


def _trial_answer(schemas: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return an answer; with tools, one that calls the first tool and reads its result."""
    answer = [{"role": "assistant", "content": "yes"}]
    if not schemas:
        return answer
    name = schemas[0]["function"]["name"]
    call = {"type": "function", "function": {"name": name, "arguments": {}}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": name, "content": PROBE},
        *answer,
    ]


def _warn_of_template_without_tools(func: Any) -> None:
    warnings.warn(
        f"The chat template of the reward model {reward_name(func)!r} leaves out tool calls or the answers of tools, "
        "so it scores conversations without them. Set chat_template on its tokenizer to one that has tools and pass "
        "the tokenizer in reward_processing_classes, or ignore this warning if it was trained this way.",
        stacklevel=5,
    )


def _expects_pairs(func: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    if tokenizer.chat_template is not None or resolve_adapter_path(func) is not None:
        return False
    if isinstance(func, nn.Module):
        config = getattr(func, "config", None)
        return is_encoder(config) and not load_reward_metadata(getattr(config, "_name_or_path", "") or "")
    config = PreTrainedConfig.get_config_dict(str(func))[0].get("model_type")
    return is_encoder(config) and not load_reward_metadata(func)


def _distinct_conversations(dataset: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield index and content of the first row of each form of conversation in a dataset."""
    if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
        return
    columns = [name for name in ("prompt", "tools", "chat_template_kwargs") if name in dataset.column_names]
    seen: set[str] = set()
    for index, row in enumerate(dataset.select_columns(columns)):
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

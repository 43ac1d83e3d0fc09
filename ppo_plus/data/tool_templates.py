"""Tools in chat templates: schemas, parsing of calls, and the tokens of a tool's answer, as in TRL's GRPOTrainer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema
from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    supports_tool_calling,
)

from .chat_templates import fit_content


def tool_schema(tool: Callable, where: str = "tools") -> dict[str, Any]:
    """Return the JSON schema of a tool, from its type hints and its Google docstring; errors name the tool."""
    name = getattr(tool, "__name__", None)
    if not callable(tool) or not name:
        raise ValueError(f"{where}: {tool!r} is not a function with a name; a tool must be one.")
    try:
        return cast(dict[str, Any], get_json_schema(tool))
    except Exception as error:  # of transformers: a type hint or a description is missing
        raise ValueError(
            f"{where}: the tool {name!r} cannot be described to the model: {error} Give each argument and the result "
            "a type hint, and write a docstring with a sentence and `Args:` with a line for each argument."
        ) from error


def prepare_tool_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy that can parse tool calls and whose chat template preserves prefixes.

    A template that renders earlier messages differently when a tool's answer follows is replaced by TRL's training
    template of the same model family, with a warning.

    Raises:
        ValueError: the template cannot render tools, is not prefix-preserving, or has no known format of calls.
    """
    name, copied = tokenizer.name_or_path, copy.deepcopy(tokenizer)
    if not supports_tool_calling(copied):
        raise ValueError(
            f"The chat template of the tokenizer {name!r} has no tools: a call or the answer of a tool is missing in "
            "what it renders. Set processing_class.chat_template to one that does, or take a model trained on tools."
        )
    if getattr(copied, "response_template", None) is None and getattr(copied, "response_schema", None) is None:
        try:
            add_response_schema(copied)
        except ValueError as error:
            raise ValueError(
                f"The tokenizer {name!r} has no response_template, and its chat template is none of those in TRL, so "
                "tool calls in answers cannot be parsed. Set processing_class.response_template (see transformers' "
                "page on response parsing)."
            ) from error
    if not is_chat_template_prefix_preserving(copied):
        try:
            copied.chat_template = get_training_chat_template(copied)
        except ValueError as error:
            raise ValueError(
                f"The chat template of the tokenizer {name!r} renders an assistant's message differently when a tool's "
                "answer follows, so the tokens of an earlier turn would change. Remove what depends on later messages "
                "from processing_class.chat_template."
            ) from error
        warnings.warn(
            f"The chat template of the tokenizer {name!r} is not prefix-preserving: rollouts use TRL's training "
            "template of the same family. The saved tokenizer keeps its own.",
            stacklevel=2,
        )
    return copied


def tool_suffix_ids(
    tool_messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]
) -> list[int]:
    """Return the token ids that follow an assistant's turn: the answers of tools, and the next generation prompt.

    They are the difference between two renderings of a dummy conversation, with the answers and without. The turn's
    own tokens are never rendered or tokenized again. (TRL's `GRPOTrainer._get_tool_suffix_ids`.)

    Args:
        tool_messages: messages of role `tool`, at least one.
        tokenizer: from `prepare_tool_tokenizer`.
        kwargs: arguments of the chat template.
    """
    # Some templates derive the header of the answer from the name in the call.
    call = {"type": "function", "function": {"name": tool_messages[0]["name"], "arguments": {}}}
    dummy: list[Mapping[str, Any]] = [
        {"role": "user", "content": "dummy"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]

    def render(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> list[int]:
        options = {**kwargs, "tokenize": True, "return_dict": True, "add_generation_prompt": add_generation_prompt}
        return tokenizer.apply_chat_template(fit_content(messages, tokenizer), **options)["input_ids"]

    prefix, full = render(dummy, False), render([*dummy, *tool_messages], True)
    # After EOS a template may add a line break, which the policy did not sample: it is part of the suffix.
    eos = [position for position, token in enumerate(prefix) if token == tokenizer.eos_token_id]
    prefix = prefix[: eos[-1] + 1] if eos else prefix
    if full[: len(prefix)] != prefix:
        raise ValueError(
            "The tokens of a conversation change when the answer of a tool follows. Make the chat template "
            "prefix-preserving: processing_class.chat_template."
        )
    return full[len(prefix) :]

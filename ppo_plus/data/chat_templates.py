"""Chat messages and their template: keys that Arrow added are dropped, text parts joined, errors name the row."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from datasets import Features, Json, LargeList, List
from transformers import PreTrainedTokenizerBase

# Columns that the chat template reads.
TEMPLATE_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
# Text that no template alters; its place in a rendered conversation shows how the template treats a message.
PROBE = "probe"
# A last tag of a generation prompt; one with a bar (DeepSeek's is the full-width bar) is a header, not an opening.
OPENS_TAG = re.compile(r"<[^<>/|\uff5c]+>\s*$")
CLOSES_TAG = re.compile(r"(</[^<>]+>|<[^<>|]+\|>)\s*$")


def is_conversational(prompt: object) -> bool:
    """Whether a prompt is a list of messages with a role each."""
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, Mapping) and "role" in m for m in prompt)


def shorten(value: object) -> str:
    """Return the value's repr in at most 80 characters, for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# Null keys


def drop_null_keys(value: Any) -> Any:
    """Drop the keys whose value is None at every depth; None inside a list stays.

    In an Arrow struct column each value has the keys of all rows, and None for the keys that its row lacks. (TRL's
    `remove_none_values` does the same.) A message keeps its keys `role` and `content`: chat templates (DeepSeek) test
    whether the content is None beside `tool_calls`.
    """
    if isinstance(value, Mapping):
        is_message = "role" in value
        return {
            key: drop_null_keys(part)
            for key, part in value.items()
            if part is not None or (is_message and key in ("role", "content"))
        }
    return [drop_null_keys(part) for part in value] if isinstance(value, list) else value


def struct_columns(features: Mapping[str, Any] | None, columns: Sequence[str]) -> list[str]:
    """List the columns of messages, tools or template arguments that Arrow holds as structs, with keys filled in.

    A `Json` column keeps the keys of each value: None in it is the user's own. Streams without declared features may
    hold either, and their columns are taken for structs.
    """
    if features is None:
        return [name for name in columns if name in TEMPLATE_COLUMNS]
    return [name for name, feature in features.items() if _is_chat_struct(name, feature)]


def _is_chat_struct(name: str, feature: Any) -> bool:
    inner = _element(feature)
    return isinstance(inner, dict) and (name in TEMPLATE_COLUMNS or {"role", "content"} <= inner.keys())


def _element(feature: Any) -> Any:
    if isinstance(feature, List | LargeList):
        return feature.feature
    return feature[0] if isinstance(feature, list) else feature


def as_json_features(features: Features, columns: Sequence[str]) -> Features:
    """Return the features with these struct columns as `Json`, in which each value keeps its own keys."""
    changed = {name: Json() if isinstance(features[name], dict) else List(Json()) for name in columns}
    return Features({**features, **changed})


# Arguments of the template


def parse_tools(tools: Any) -> dict[str, Any]:
    """Return the template argument `tools` of a row's column (a list, or its JSON text); empty where there are none."""
    try:
        parsed = json.loads(tools) if isinstance(tools, str) and tools else tools
    except json.JSONDecodeError as error:
        raise ValueError(f"tools is {shorten(tools)}; it must be a list of tools, or one as JSON ({error}).") from error
    return {"tools": parsed} if parsed else {}


def merge_template_kwargs(run: Mapping[str, Any] | None, row: Mapping[str, Any], where: str = "prompt") -> dict:
    """Merge the template arguments of the run and of a row (columns `tools`, `chat_template_kwargs`); the row's win."""
    own = row.get("chat_template_kwargs")
    if isinstance(own, str) and own.strip():
        with contextlib.suppress(json.JSONDecodeError):  # refused below, with the row
            own = json.loads(own)
    if own and not isinstance(own, Mapping):
        raise ValueError(f"{where}: chat_template_kwargs is {shorten(own)}; it must be a dict, or one as JSON text.")
    try:
        tools = parse_tools(row.get("tools"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return {**tools, **(run or {}), **(own or {})}


# Messages


def check_messages(messages: Sequence[Mapping[str, Any]], where: str) -> None:
    """Refuse what a chat template would render as the word None, as nothing, or without its images."""
    for index, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        if not isinstance(role, str) or not role:
            raise ValueError(f"{where}: message {index} has the role {role!r}; it must be text such as 'user'.")
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            raise ValueError(f"{where}: message {index} has the content {shorten(content)}; it must be text.")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text":
                raise ValueError(
                    f"{where}: message {index} has a part of type {kind!r}, but ppo_plus trains on text only. Drop "
                    "such rows with dataset.filter, or keep the parts of type 'text'."
                )
            if not isinstance(part.get("text"), str):
                raise ValueError(f"{where}: message {index} has a part without text: {shorten(part)}.")


def fit_content(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[Mapping[str, Any]]:
    """Return the messages with their content in the form that the tokenizer's chat template reads: text, or parts.

    A template for text prints a list of parts as Python's repr of it; a template for parts alone (SmolVLM) prints
    nothing of a text. Parts are joined without a separator, as templates for parts print them.
    """
    as_text = _reads_text(tokenizer, json.dumps(tokenizer.chat_template))
    return [_convert_content(message, as_text) for message in messages]


def _convert_content(message: Mapping[str, Any], as_text: bool) -> Mapping[str, Any]:
    content = message.get("content")
    if as_text and isinstance(content, list):
        return {**message, "content": "".join(part["text"] for part in content)}
    if not as_text and isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    return message


@functools.lru_cache(maxsize=64)
def _reads_text(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether the template prints content that is text, rather than a list of parts alone."""
    if PROBE in _render_probe(tokenizer, PROBE):
        return True
    parts = [{"type": "text", "text": PROBE}]
    printed = _render_probe(tokenizer, parts)
    return PROBE not in printed or str(parts) in printed


def _render_probe(tokenizer: PreTrainedTokenizerBase, content: Any) -> str:
    try:
        return cast(str, tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    except Exception:  # a template may raise anything; the row's own messages then show the error with their place
        return ""


# The generation prompt


def find_generation_opening(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]
) -> str:
    """Return the part of the answer that the generation prompt has begun already, such as `<think>`; "" for none.

    It is what the generation prompt has beyond the header that the template writes before an assistant's message. A
    template that rewrites the beginning of an answer (DeepSeek-V3.1 closes the tag there) is read by the tag that the
    generation prompt ends in. An opening that the template has closed again leaves nothing for the answer to continue.

    Args:
        messages: the prompt, as the chat template gets it; the last message is not the assistant's.
        tokenizer: of the policy.
        kwargs: arguments of the chat template.
    """
    asked = render_chat(messages, tokenizer, {**kwargs, "add_generation_prompt": True})
    answered = render_chat([*messages, {"role": "assistant", "content": PROBE}], tokenizer, kwargs)
    header, printed, _ = answered.rpartition(PROBE)
    if printed and asked.startswith(header):
        opening = asked[len(header) :]
    else:
        tag = OPENS_TAG.search(asked.removeprefix(render_chat(messages, tokenizer, kwargs)))
        opening = tag[0] if tag else ""
    return "" if CLOSES_TAG.search(opening) else opening


def find_opening_ids(prompt_ids: Sequence[int], opening: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the last token ids of a prompt, as few as spell the opening of the answer; empty for no opening."""
    if not opening:
        return []
    counts = range(1, min(len(prompt_ids), len(opening.encode()) + 1) + 1)
    suffixes = (list(prompt_ids[-count:]) for count in counts)
    return next((ids for ids in suffixes if opening.strip() in cast(str, tokenizer.decode(ids))), [])


def render_chat(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, kwargs: Mapping) -> str:
    """Render messages as text by the chat template; "" where the template refuses them."""
    try:
        fitted = fit_content(messages, tokenizer)
        return cast(str, tokenizer.apply_chat_template(fitted, **{**kwargs, "tokenize": False}))
    except Exception:  # a template that takes no answer here has no header to compare with
        return ""

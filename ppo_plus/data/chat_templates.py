"""Chat messages and templates: remove keys added by Arrow, join text parts, raise errors that name the row."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from datasets import Features, Json, LargeList, List
from transformers import PreTrainedTokenizerBase

# Columns that the chat template reads.
TEMPLATE_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
# Text that no template changes; its position in a rendered conversation shows how the template formats a message.
PROBE = "probe"
# The last tag of a generation prompt; a tag with a bar (DeepSeek's is the full-width bar) is a header, not an opening.
OPENING_TAG = re.compile(r"<[^<>/|\uff5c]+>\s*$")
CLOSING_TAG = re.compile(r"(</[^<>]+>|<[^<>|]+\|>)\s*$")


def is_conversational(prompt: object) -> bool:
    """Return whether a prompt is a non-empty list of messages that each have a role."""
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, Mapping) and "role" in m for m in prompt)


def shorten(value: object) -> str:
    """Return the value's repr, truncated to 80 characters, for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# Null keys


def drop_null_keys(value: Any) -> Any:
    """Drop keys whose value is None at every depth; keep None inside lists.

    In an Arrow struct column each value has the keys of all rows, with None for the keys that its row lacks. (TRL's
    `remove_none_values` does the same.) A message keeps its keys `role` and `content`: some chat templates (DeepSeek)
    test whether the content is None when `tool_calls` is set.
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
    """List the columns of messages, tools or template arguments that Arrow stores as structs with added keys.

    A `Json` column keeps the keys of each value, so its None values come from the user. Streams without declared
    features may contain either; their columns are treated as structs.
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
    """Return the features with these struct columns as `Json`, which stores the keys of each value separately."""
    changed = {name: Json() if isinstance(features[name], dict) else List(Json()) for name in columns}
    return Features({**features, **changed})


# Arguments of the template


def parse_tools(tools: Any) -> dict[str, Any]:
    """Parse a row's `tools` (a list, or its JSON text) into template arguments; empty without tools."""
    try:
        parsed = json.loads(tools) if isinstance(tools, str) and tools else tools
    except json.JSONDecodeError as error:
        raise ValueError(
            f"tools is {shorten(tools)}; it must be a list of tools, or a list as JSON text ({error})."
        ) from error
    return {"tools": parsed} if parsed else {}


def merge_template_kwargs(run: Mapping[str, Any] | None, row: Mapping[str, Any], where: str = "prompt") -> dict:
    """Merge the run's template arguments with a row's `tools` and `chat_template_kwargs`, which take precedence."""
    row_kwargs = row.get("chat_template_kwargs")
    if isinstance(row_kwargs, str) and row_kwargs.strip():
        with contextlib.suppress(json.JSONDecodeError):  # refused below, with the row
            row_kwargs = json.loads(row_kwargs)
    if row_kwargs and not isinstance(row_kwargs, Mapping):
        raise ValueError(
            f"{where}: chat_template_kwargs is {shorten(row_kwargs)}; it must be a dict, or a dict as JSON text."
        )
    try:
        tools = parse_tools(row.get("tools"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    check_json([tools, row_kwargs], f"{where}: tools or chat_template_kwargs")
    merged = {**tools, **(run or {}), **(row_kwargs or {})}
    if fixed := sorted({"tokenize", "return_dict", "return_tensors"} & merged.keys()):
        raise ValueError(f"{where}: chat_template_kwargs has {fixed[0]!r}, which ppo_plus sets itself. Leave it out.")
    return merged


# Messages


def check_messages(messages: Sequence[Mapping[str, Any]], where: str) -> None:
    """Refuse messages that a chat template would render as "None", as empty text, or without their images."""
    for index, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        if not isinstance(role, str) or not role:
            raise ValueError(f"{where}: message {index} has the role {role!r}; it must be text such as 'user'.")
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            raise ValueError(f"{where}: message {index} has the content {shorten(content)}; it must be text.")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, str):
                raise ValueError(
                    f"{where}: message {index} has the part {shorten(part)}; a part must be a dict such as "
                    "{'type': 'text', 'text': '...'}. Or make the content one text."
                )
            kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text":
                raise ValueError(
                    f"{where}: message {index} has a part of type {kind!r}, but ppo_plus trains on text only. Remove "
                    "such rows with dataset.filter, or keep only the parts of type 'text'."
                )
            if not isinstance(part.get("text"), str):
                raise ValueError(f"{where}: message {index} has a part without text: {shorten(part)}.")
        check_json(message, f"{where}: message {index}")


def check_json(value: Any, where: str) -> None:
    """Refuse values that JSON lacks, such as dates: transformers (5.24) gives a template the name of their type.

    See findings/transformers_template_renders_a_date_as_its_type.sh.
    """
    if isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            check_json(part, where)
    elif not isinstance(value, str | int | float | np.generic | None):
        raise ValueError(
            f"{where} has {shorten(value)}, of a type that JSON lacks, so the chat template would render "
            f"'<{type(value).__name__}>'. Convert it to text first: dataset.map(...)."
        )


def fit_content(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[Mapping[str, Any]]:
    """Convert message contents to the form that the chat template expects: text or a list of parts.

    A template for text renders a list of parts as its Python repr; a template for parts (SmolVLM) renders nothing for
    text. Parts are joined without a separator, as templates for parts do.
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
    """Return whether the template renders content given as text, instead of only as a list of parts."""
    if PROBE in _render_probe(tokenizer, PROBE):
        return True
    parts = [{"type": "text", "text": PROBE}]
    rendered = _render_probe(tokenizer, parts)
    return PROBE not in rendered or str(parts) in rendered


def _render_probe(tokenizer: PreTrainedTokenizerBase, content: Any) -> str:
    try:
        return cast(str, tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    except Exception:  # a template may raise any exception; tokenizing the row raises it again and names the row
        return ""


def find_rendered_content(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the start of a conversation with which a message's content begins; "" for none.

    Such a content was rendered by the template before, which would add BOS and roles a second time.
    """
    start = _conversation_start(tokenizer, json.dumps(tokenizer.chat_template))
    contents = (message.get("content") or "" for message in messages)
    texts = (c if isinstance(c, str) else "".join(part["text"] for part in c) for c in contents)
    return start if start and any(text.lstrip().startswith(start) for text in texts) else ""


@functools.lru_cache(maxsize=64)
def _conversation_start(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Return the special token with which the template begins a conversation, or else all before a first message."""
    content: Any = PROBE if _reads_text(tokenizer, template) else [{"type": "text", "text": PROBE}]
    start = _render_probe(tokenizer, content).partition(PROBE)[0].strip()
    added = (str(token) for token in tokenizer.added_tokens_decoder.values())
    return max((token for token in added if start.startswith(token)), key=len, default=start)


def find_final_end(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return EOS, or what the chat template writes after an answer, if a text ends with it; "" for none.

    EOS alone is a prompt for unconditional samples of models whose BOS it is (GPT-2).
    """
    text = text.strip()
    ends = (str(tokenizer.eos_token or ""), _answer_end(tokenizer, json.dumps(tokenizer.chat_template)))
    return next((end for end in ends if end and text.endswith(end) and text != end), "")


@functools.lru_cache(maxsize=64)
def _answer_end(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Return the special tokens that the template writes after an answer, which need not be EOS (Gemma)."""
    if tokenizer.chat_template is None:
        return ""
    rendered = render_chat([{"role": role, "content": PROBE} for role in ("user", "assistant")], tokenizer, {})
    end = rendered.rpartition(PROBE)[2].strip()
    return end if any(str(token) in end for token in tokenizer.added_tokens_decoder.values()) else ""


# The generation prompt


def find_generation_opening(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]
) -> str:
    """Return the start of the answer that the generation prompt contains, such as `<think>`; "" for none.

    It is the text of the generation prompt after the header that the template writes before an assistant's message. If
    a template rewrites the start of an answer (DeepSeek-V3.1 closes the tag there), it is the last tag of the
    generation prompt. If the template also closes the tag, there is nothing for the answer to continue. The last of
    the messages must not be the assistant's.
    """
    prompt_text = render_chat(messages, tokenizer, {**kwargs, "add_generation_prompt": True})
    full_text = render_chat([*messages, {"role": "assistant", "content": PROBE}], tokenizer, kwargs)
    header, has_probe, _ = full_text.rpartition(PROBE)
    if has_probe and prompt_text.startswith(header):
        opening = prompt_text[len(header) :]
    else:
        tag = OPENING_TAG.search(prompt_text.removeprefix(render_chat(messages, tokenizer, kwargs)))
        opening = tag[0] if tag else ""
    return "" if CLOSING_TAG.search(opening) else opening


def find_opening_ids(prompt_ids: Sequence[int], opening: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the shortest suffix of the prompt's token ids that decodes to the opening; empty for none.

    Also empty if the prompt does not end with it: `rollout_func` may render prompts in its own way.
    """
    if not opening:
        return []
    counts = range(1, min(len(prompt_ids), len(opening.encode()) + 1) + 1)
    suffixes = (list(prompt_ids[-count:]) for count in counts)
    text = opening.strip()
    return next((ids for ids in suffixes if cast(str, tokenizer.decode(ids)).strip().endswith(text)), [])


def render_chat(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, kwargs: Mapping) -> str:
    """Render messages as text with the chat template; "" if the template raises."""
    try:
        fitted = fit_content(messages, tokenizer)
        return cast(str, tokenizer.apply_chat_template(fitted, **{**kwargs, "tokenize": False}))
    except Exception:  # a template that refuses an answer after these messages has no header to compare with
        return ""

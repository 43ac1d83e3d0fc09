"""Tokenization and validation of prompts (text, messages or token ids); errors name the row."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from .chat_templates import (
    PROBE,
    as_json_features,
    check_messages,
    drop_null_keys,
    find_final_end,
    find_rendered_content,
    fit_content,
    is_conversational,
    merge_template_kwargs,
    render_chat,
    shorten,
    struct_columns,
)

Row = dict[str, Any]
MAX_END_TOKENS = 8  # last tokens of a prompt that is given as ids, among which an end is looked for
# Roles of answers in other formats (Gemma, ShareGPT), in lower case.
ANSWER_ROLES = ("assistant", "model", "gpt", "chatgpt", "bot", "ai")


def column_names(dataset: Any) -> list[str]:
    """Return the columns of a dataset; those of the first row if a stream does not declare them."""
    return list(dataset.column_names or next(iter(dataset), {}))


def reset_format(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """Reset the format of a dataset (`set_format("torch")`), so that rows hold text, numbers and lists."""
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            f"{name} has a transform (set_transform), which would be applied again to the tokenized rows. Apply it "
            "once: dataset.map(...)."
        )
    return dataset.with_format(None)


def tokenize_prompts(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | Callable[[Row], Mapping[str, Any]] | None = None,
    name: str = "train_dataset",
) -> Any:
    """Add `input_ids` to a dataset of prompts; keep all other columns for reward functions.

    Args:
        dataset: has a column `prompt` (text or messages) or, as in TRL 1.12, `input_ids`. A stream is tokenized while
            it is read. The columns `tools` and `chat_template_kwargs` are passed to the chat template of messages.
        tokenizer: tokenizes text directly, and messages after its chat template has rendered them.
        max_prompt_length: maximum tokens; a longer prompt keeps its BOS, if it has one, and its last tokens.
        chat_template_kwargs: passed to `apply_chat_template`, or a function that returns them for a row; those of a row
            take precedence.
        name: name of the dataset in errors.

    Raises:
        ValueError: no usable column, no rows, a transform, or a row that is not a prompt; the message names the row.
    """
    dataset = reset_format(dataset, name)
    check_prompt_columns(dataset, name)
    structs = struct_columns(dataset.features, column_names(dataset))
    warn = WarnOnce()

    def encode(row: Row, index: int) -> Row:
        where = f"{name}[{index}]"
        changed = {column: drop_null_keys(row[column]) for column in structs if column in row}
        ids = _encode_row(
            {**row, **changed}, tokenizer, _template_kwargs_of(row, chat_template_kwargs, where), where, warn
        )
        return {**changed, "input_ids": truncate_prompt(ids, max_prompt_length, tokenizer.bos_token_id)}

    if isinstance(dataset, IterableDataset):
        return dataset.map(encode, with_indices=True)
    features = Features({**as_json_features(dataset.features, structs), "input_ids": List(Value("int64"))})
    return dataset.map(
        encode, with_indices=True, features=features, desc=f"Tokenizing {name}", load_from_cache_file=False
    )


def _template_kwargs_of(row: Row, kwargs: Any, where: str) -> Mapping[str, Any] | None:
    try:
        return kwargs(row) if callable(kwargs) else kwargs
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _encode_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None, where: str, warn: WarnOnce
) -> list[int]:
    """Return the token ids of a row's prompt, or its own `input_ids`; raise a ValueError if there are none."""
    if "prompt" in row:
        prompt, conversational = row["prompt"], is_conversational(row["prompt"])
        kwargs = merge_template_kwargs(template_kwargs, row, where) if conversational else {}
        ids = encode_prompt(prompt, tokenizer, kwargs, where)
        warn_of_prompt(prompt, where, tokenizer, kwargs, warn)
    else:
        ids = _validate_input_ids(row, tokenizer, where)
        if [tokenizer.bos_token_id] * 2 == ids[:2]:
            warn("BOS", f"{where} begins with two BOS tokens: tokenize rendered text with add_special_tokens=False.")
        warn_of_final_end(cast(str, tokenizer.decode(ids[-MAX_END_TOKENS:])), where, tokenizer, warn)
    if not ids:
        raise ValueError(
            f"{where} has no tokens: the tokenizer removes every character. Remove such rows with dataset.filter."
        )
    return ids


class WarnOnce:
    """Emit at most one warning per kind of row, for the first such row."""

    def __init__(self) -> None:
        self._kinds: set[str] = set()

    def is_first(self, kind: str) -> bool:
        """Return whether this is the first call with this kind."""
        known = kind in self._kinds
        self._kinds.add(kind)
        return not known

    def __call__(self, kind: str, message: str) -> None:
        """Emit the warning if it is the first of its kind."""
        if self.is_first(kind):
            warnings.warn(message, stacklevel=2)


def warn_of_prompt(
    prompt: Any, where: str, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], warn: WarnOnce
) -> None:
    """Warn of a prompt that is rendered already, ends with an answer, or gets no generation prompt."""
    if isinstance(prompt, str):
        warn_of_written_conversation(prompt, where, "prompt", warn)
        warn_of_final_end(prompt, where, tokenizer, warn)
        return
    warn_of_rendered_content(
        prompt, where, tokenizer, "dataset.map(lambda row: {'prompt': row['prompt'][0]['content']})", warn
    )
    role = prompt[-1]["role"]
    if role != "assistant" and role.lower() in ANSWER_ROLES:
        warn(
            "finished",
            f"{where} ends with a message of the role {role!r}, {shorten(prompt[-1].get('content'))}, so each response "
            "would be a second answer after it. Remove the message, or give it the role 'assistant' if responses "
            "should continue it.",
        )
    elif role == "assistant":
        warn(
            "finished",
            f"{where} ends with an assistant's message, {shorten(prompt[-1].get('content'))}, which each response "
            "continues. If the message is complete, remove it: "
            "dataset.map(lambda row: {'prompt': row['prompt'][:-1]}).",
        )
    elif warn.is_first("generation prompt") and (header := _missing_header(prompt, tokenizer, kwargs)):
        warn(
            "header",
            f"{where} gets no generation prompt from the chat template, which begins assistant messages with "
            f"{header!r}, so responses would start without it. Add {{% if add_generation_prompt %}} to the template.",
        )


def warn_of_final_end(text: str, where: str, tokenizer: PreTrainedTokenizerBase, warn: WarnOnce) -> None:
    """Warn of a prompt that ends as an answer does, as a rendered conversation without a generation prompt."""
    if end := find_final_end(text, tokenizer):
        warn(
            "EOS",
            f"{where} ends with {end!r}, which ends answers, so each response would begin after the end of a text. End "
            "a rendered conversation with its generation prompt (apply_chat_template(..., "
            "add_generation_prompt=True)), without the answer.",
        )


def warn_of_written_conversation(text: str, where: str, column: str, warn: WarnOnce) -> None:
    """Warn of a conversation that is written as text: JSON, or Python's repr."""
    if _is_written_conversation(text):
        warn(
            "written",
            f"{where} is a conversation written as text, so it is tokenized as plain text, without the chat "
            "template. Parse it into a list of messages with 'role' and 'content' first: dataset.map(lambda row: "
            f"{{'{column}': json.loads(row['{column}'])}}).",
        )


def warn_of_rendered_content(
    messages: Any, where: str, tokenizer: PreTrainedTokenizerBase, fix: str, warn: WarnOnce
) -> None:
    """Warn if a message contains a conversation that the chat template has rendered already."""
    if start := find_rendered_content(messages, tokenizer):
        warn(
            "rendered",
            f"{where}: a message begins with {start!r}, as a rendered conversation does, and the chat template renders "
            f"it again, with a second start and second roles. Pass rendered text as text: {fix}.",
        )


def _is_written_conversation(text: str) -> bool:
    if not text.lstrip().startswith(("[", "{")) or not any(key in text for key in ("role", "from")):
        return False
    for parse in (json.loads, ast.literal_eval):  # JSON, or Python's repr as written to CSV files
        try:
            return _holds_messages(parse(text.strip()))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return False


def _holds_messages(value: Any) -> bool:
    """Return whether a value is a message, messages (also in ShareGPT's keys), or a dict with a list of them."""
    if isinstance(value, Mapping):
        is_message = {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()
        return is_message or any(_holds_messages(part) for part in value.values() if isinstance(part, list))
    return isinstance(value, list) and bool(value) and all(map(_holds_messages, value))


def _missing_header(messages: Any, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> str:
    prompt_text = render_chat(messages, tokenizer, {"add_generation_prompt": True, **kwargs})
    full_text = render_chat([*messages, {"role": "assistant", "content": PROBE}], tokenizer, kwargs)
    header, has_probe, _ = full_text.rpartition(PROBE)
    no_generation_prompt = prompt_text == render_chat(messages, tokenizer, kwargs)
    is_missing = bool(has_probe) and no_generation_prompt and header.startswith(prompt_text)
    return header[len(prompt_text) :].strip() if is_missing else ""


def check_prompt_columns(dataset: Any, name: str) -> None:
    """Refuse a dataset without rows or prompts, with an error that names the call that adds the column."""
    columns = column_names(dataset)
    if not columns or (not isinstance(dataset, IterableDataset) and len(dataset) == 0):
        raise ValueError(f"{name} is empty: it has no rows. Check how it was loaded or filtered.")
    if "prompt" in columns or "input_ids" in columns:
        return
    fix = "Rename its column: dataset.rename_column('...', 'prompt')."
    if "messages" in columns:
        messages = next(iter(dataset))["messages"]
        finished = is_conversational(messages) and messages[-1]["role"] == "assistant"
        fix = "Rename it: dataset.rename_column('messages', 'prompt')."
        if finished:
            fix = (
                f"{name}[0] ends with the assistant's answer, so use the messages before it: "
                "dataset.map(lambda row: {'prompt': row['messages'][:-1]})."
            )
    elif "conversations" in columns:
        fix = "If its messages have roles, rename it: dataset.rename_column('conversations', 'prompt')."
        if not is_conversational(next(iter(dataset))["conversations"]):
            fix = (
                "Convert 'conversations' to messages, without the answer: dataset.map(lambda row: {'prompt': [{'role': "
                "{'human': 'user', 'gpt': 'assistant'}.get(m['from'], m['from']), 'content': m['value']} for m in "
                "row['conversations'][:-1]]})."
            )
    elif {"chosen", "rejected"} <= set(columns):
        fix = "Extract the text that both answers share: dataset.map(trl.extract_prompt)."
    raise ValueError(f"{name} has no column 'prompt' (it has {columns}). {fix}")


def truncate_prompt(ids: list[int], max_length: int | None, bos: int | None) -> list[int]:
    """Keep the last tokens of a prompt, and its BOS, if it has one; None keeps all."""
    if max_length is None or len(ids) <= max_length:
        return ids
    first = ids[:1] if ids[0] == bos and max_length > 1 else []
    return first + ids[len(ids) - max_length + len(first) :]


def tokenize_datasets(datasets: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **options: Any) -> dict[str, Any]:
    """Tokenize datasets of prompts by name; the options are those of `tokenize_prompts`."""
    return {name: tokenize_prompts(dataset, tokenizer, name=name, **options) for name, dataset in datasets.items()}


def encode_prompt(
    prompt: object, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any], where: str = "prompt"
) -> list[int]:
    """Tokenize one prompt, given as text or messages."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{where} is empty; remove such rows with dataset.filter.")
        return _strip_eos(tokenize_text(prompt, tokenizer), prompt, tokenizer)
    if not is_conversational(prompt):
        raise ValueError(
            f"{where} is {shorten(prompt)}; a prompt must be text, or a list of messages such as "
            "[{'role': 'user', 'content': '...'}]."
        )
    messages = cast(list, prompt)
    # If the last message is the assistant's, the response continues it.
    option = "continue_final_message" if messages[-1]["role"] == "assistant" else "add_generation_prompt"
    return tokenize_chat(messages, tokenizer, {option: True, **chat_template_kwargs}, where)


def tokenize_chat(
    messages: list[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], where: str
) -> list[int]:
    """Render messages, without the keys that Arrow adds, with the chat template and return their token ids.

    Errors name the row by `where`; `kwargs` are arguments of the template.
    """
    check_messages(messages, where)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where} is a conversation, but the tokenizer {tokenizer.name_or_path!r} has no chat template. "
            "Set processing_class.chat_template, or pass prompts as text."
        )
    try:
        fitted = fit_content(messages, tokenizer)
        return tokenizer.apply_chat_template(fitted, tokenize=True, return_dict=True, **kwargs)["input_ids"]
    except Exception as error:
        raise ValueError(f"{where}: the chat template cannot render {shorten(messages)}: {error}") from error


def tokenize_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize text with special tokens, without a second BOS if the text already begins with one."""
    ids = tokenizer(text)["input_ids"]
    return ids[1:] if starts_twice(ids, text, tokenizer) else ids


def starts_twice(ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer added a special token (BOS, CLS) that the text begins with, after any whitespace."""
    if len(ids) < 2 or ids[0] not in tokenizer.all_special_ids:
        return False
    if ids[0] != ids[1] and not text.lstrip().startswith(cast(str, tokenizer.convert_ids_to_tokens(ids[0]))):
        return False
    as_written = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[: len(as_written)] != as_written and ids[1 : len(as_written) + 1] == as_written


def _strip_eos(ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Remove an EOS that the tokenizer appended to the prompt (`add_eos_token`)."""
    if ids[-1:] != [tokenizer.eos_token_id]:
        return ids
    as_written = tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = ids[-len(as_written) - 1 :] == [*as_written, tokenizer.eos_token_id]
    return ids[:-1] if ends else ids


def _validate_input_ids(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    ids = row["input_ids"]
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
        raise ValueError(f"{where}: input_ids is {shorten(ids)}; it must be a non-empty list of token ids.")
    if "attention_mask" in row:
        mask = row["attention_mask"]
        if len(mask) != len(ids) or not any(mask):
            raise ValueError(
                f"{where}: attention_mask has {len(mask)} entries, {sum(map(bool, mask))} of them nonzero, for "
                f"{len(ids)} input_ids; it must have one entry per id, at least one of them nonzero. Drop the column "
                "if unsure."
            )
        ids = [i for i, real in zip(ids, mask, strict=True) if real]
    unknown = [i for i in ids if not 0 <= i < len(tokenizer)]
    if unknown:
        raise ValueError(
            f"{where}: input_ids has id {unknown[0]}, but the vocabulary has {len(tokenizer)} tokens. Tokenize with "
            "the tokenizer passed as processing_class."
        )
    return ids


def validate_prompts(dataset: Any, response_length: int, context: int | None, num_embeddings: int, name: str) -> Any:
    """Check lengths and ids of tokenized prompts against the model; those of a stream while it is read."""
    if context is not None and response_length >= context:
        raise ValueError(
            f"response_length={response_length} leaves no room for a prompt in the model's context of {context} "
            "tokens. Lower response_length."
        )

    def check(row: Row, index: int) -> Row:
        check_ids(row["input_ids"], response_length, context, num_embeddings, f"{name}[{index}]")
        return row

    if isinstance(dataset, IterableDataset):
        return dataset.map(check, with_indices=True)
    for index, ids in enumerate(dataset["input_ids"]):
        check({"input_ids": ids}, index)
    return dataset


def check_ids(ids: Sequence[int], response_length: int, context: int | None, num_embeddings: int, where: str) -> None:
    """Refuse a prompt that exceeds the context with a full response, or has ids without an embedding."""
    if context is not None and len(ids) + response_length > context:
        raise ValueError(
            f"{where} has {len(ids)} tokens; with response_length={response_length} it exceeds the model's context of "
            f"{context} tokens. Set max_prompt_length={context - response_length}, or remove such rows with "
            "dataset.filter."
        )
    if max(ids) >= num_embeddings:
        raise ValueError(
            f"{where} has token id {max(ids)}, but the model has embeddings for {num_embeddings} tokens. Pass the "
            "model's tokenizer, or call model.resize_token_embeddings(len(tokenizer)) first."
        )


def to_columns(rows: Sequence[Row], exclude: Iterable[str] = ("input_ids", "attention_mask")) -> dict[str, list]:
    """Convert rows to lists by column, the form in which reward functions receive them."""
    return {name: [row[name] for row in rows] for name in rows[0] if name not in set(exclude)}

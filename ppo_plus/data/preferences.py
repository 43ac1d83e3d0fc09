"""Tokenization of preference pairs; errors name the row, and pairs without a training signal are dropped."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, cast

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .chat_templates import drop_null_keys, is_conversational, merge_template_kwargs, shorten, struct_columns
from .prompts import (
    Row,
    WarnOnce,
    column_names,
    reset_format,
    tokenize_chat,
    tokenize_text,
    warn_of_rendered_content,
    warn_of_written_conversation,
)

# Names of the token id columns in TRL versions; `ID_COLUMNS` are the current names.
ID_COLUMNS = ("chosen_ids", "rejected_ids")
OLD_ID_COLUMNS = (("input_ids_chosen", "input_ids_rejected"), ("chosen_input_ids", "rejected_input_ids"))
MAX_COMPARED_ROWS = 256  # rows checked for whether answers repeat the text of their prompt

MAX_MARGIN = 1e15  # reward units; beyond it float32 scores cannot change the loss


def tokenize_pairs(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    num_proc: int | None = None,
    name: str = "train_dataset",
    num_embeddings: int | None = None,
) -> Any:
    """Add `chosen_ids` and `rejected_ids` to preference pairs, and drop pairs without a training signal.

    Args:
        dataset: columns `chosen` and `rejected` as text or messages, and optionally `prompt`, which is not repeated if
            both answers begin with it; or token ids in `chosen_ids` and `rejected_ids`. Columns `tools` and
            `chat_template_kwargs` are passed to the chat template, `margin` to the loss.
        tokenizer: its EOS is appended to plain text; its chat template renders messages.
        max_length: maximum tokens; a pair with a longer answer is dropped. None means no limit.
        num_proc: number of processes for tokenization.
        name: name of the dataset in errors.
        num_embeddings: number of token embeddings of the model; None if unknown.

    Raises:
        ValueError: no usable column, no rows, no remaining pair, a row that is not a pair, or one with a token that the
            model does not embed; the error names the row.
    """
    dataset = reset_format(dataset, name)
    dataset = check_pair_columns(dataset, name)
    columns = column_names(dataset)
    if not set(ID_COLUMNS) <= set(columns):
        structs = struct_columns(dataset.features, columns)
        repeated, warn = _repeats_prompt(dataset, name), WarnOnce()

        def encode(row: Row, index: int) -> Row:
            where = f"{name}[{index}]"
            cleaned = {**row, **{column: drop_null_keys(row[column]) for column in structs if column in row}}
            return _encode_pair(cleaned, tokenizer, repeated, where, warn)

        dataset = _map_rows(dataset, encode, num_proc, f"Tokenizing {name}")
    check_row = functools.partial(_find_drop_reason, tokenizer, num_embeddings, max_length)
    return _drop_unusable(dataset, check_row, name)


def check_pair_columns(dataset: Any, name: str) -> Any:
    """Rename token id columns to their current names; refuse a dataset without rows or without pairs."""
    columns = column_names(dataset)
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"{name} is empty: it has no pairs. Check how it was loaded or filtered.")
    for old in OLD_ID_COLUMNS:
        if set(old) <= set(columns) and not set(ID_COLUMNS) <= set(columns):
            dataset = dataset.rename_columns(dict(zip(old, ID_COLUMNS, strict=True)))
            columns = column_names(dataset)
    if not set(ID_COLUMNS) <= set(columns) and not {"chosen", "rejected"} <= set(columns):
        raise ValueError(
            f"{name} has no columns 'chosen' and 'rejected' (it has {columns}). Rename its columns: "
            "dataset.rename_columns({'...': 'chosen', '...': 'rejected'})."
        )
    return dataset


def _map_rows(dataset: Any, function: Any, num_proc: int | None, desc: str) -> Any:
    if isinstance(dataset, IterableDataset):
        return dataset.map(function, with_indices=True)
    return dataset.map(function, with_indices=True, num_proc=num_proc, desc=desc, load_from_cache_file=False)


# One pair


def _encode_pair(row: Row, tokenizer: PreTrainedTokenizerBase, repeated: bool, where: str, warn: WarnOnce) -> Row:
    check_pair(row, where)
    answers = {column: row[column] for column in ("chosen", "rejected")}
    prompt = None if repeated and _begin_with_prompt(row) else row.get("prompt")
    if isinstance(row["chosen"], str):
        for column, answer in answers.items():
            warn_of_written_conversation(answer, f"{where}: {column}", column, warn)
        end = cast(str, tokenizer.eos_token)
        texts = {column: ((prompt or "") + answer).removesuffix(end) + end for column, answer in answers.items()}
        return {f"{column}_ids": tokenize_text(text, tokenizer) for column, text in texts.items()}
    kwargs, ids = merge_template_kwargs(None, row, where), {}
    for column, answer in answers.items():
        messages = _join_conversation(prompt, answer, f"{where}: {column}")
        ids[f"{column}_ids"] = tokenize_chat(messages, tokenizer, kwargs, f"{where}: {column}")
        last = prompt[-1] if isinstance(prompt, list) and len(messages) > len(answer) else None
        if last is not None and _is_answer(last) and _is_answer(answer[0]):
            warn(
                "two answers",
                f"{where}: prompt ends with an assistant's message, {shorten(_message_text(last))}, and {column} "
                "begins with one, so the reward model reads two answers in a row. Remove the message from prompt, or "
                "ignore this warning if both belong to the conversation.",
            )
        if messages[-1]["role"] == "user":
            warn(
                "user",
                f"{where}: {column} ends with a message of the user, but a reward model scores answers. Remove that "
                "message, or ignore this warning if it is the answer.",
            )
        fix = f"dataset.map(lambda row: {{'{column}': row['{column}'][0]['content']}})"
        warn_of_rendered_content(messages, f"{where}: {column}", tokenizer, fix, warn)
    return ids


def check_pair(row: Row, where: str) -> None:
    """Refuse a pair with an empty part, with both text and messages, or with an invalid margin."""
    for column in ("chosen", "rejected", *(("prompt",) if "prompt" in row else ())):
        value = row[column]
        filled = bool(value.strip()) if isinstance(value, str) else is_conversational(value)
        if not filled and not (column == "prompt" and value == ""):
            raise ValueError(
                f"{where}: {column} is {shorten(value)}; it must be non-empty text, or a list of messages. Remove "
                "such rows with dataset.filter."
            )
    kinds = {column: "text" if isinstance(row[column], str) else "messages" for column in ("chosen", "rejected")}
    if kinds["chosen"] != kinds["rejected"]:
        raise ValueError(
            f"{where}: chosen is {kinds['chosen']} and rejected is {kinds['rejected']}, so the reward model could "
            "distinguish them by the chat template. Make both text, or both messages."
        )
    if kinds["chosen"] == "text" and row.get("prompt") and not isinstance(row["prompt"], str):
        raise ValueError(
            f"{where}: prompt is messages and chosen is text. Make the answers messages too: "
            "[{'role': 'assistant', 'content': row['chosen']}]."
        )
    check_margin(row, where)


def check_margin(row: Row, where: str) -> None:
    """Refuse a margin that is missing, not finite or beyond `MAX_MARGIN`, with which no pair would train the model."""
    margin = row.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) <= MAX_MARGIN:  # or NaN
        raise ValueError(
            f"{where}: margin is {shorten(margin)}; it must be a number of at most {MAX_MARGIN:.0e} in size. "
            "Set 0.0 for pairs without a margin, or drop the column: dataset.remove_columns('margin')."
        )


def _join_conversation(prompt: Any, answer: list, where: str) -> list:
    """Join the messages of prompt and answer, without repeating a prompt that the answer begins with."""
    if not prompt:
        return answer
    if isinstance(prompt, str):
        question = next((_message_text(message) for message in answer if message["role"] == "user"), None)
        if question is None or question.strip() != prompt.strip():
            raise ValueError(
                f"{where}: prompt is the text {shorten(prompt)}, but the user's first message is {shorten(question)}. "
                "Drop the column 'prompt' if chosen and rejected contain whole conversations, or make it messages: "
                "[{'role': 'user', 'content': row['prompt']}]."
            )
        return answer
    start = answer[: len(prompt)]
    if len(answer) > len(prompt) and [_message_key(m) for m in start] == [_message_key(m) for m in prompt]:
        return answer
    return prompt + answer


def _is_answer(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and not message.get("tool_calls")


def _message_text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _message_key(message: Mapping[str, Any]) -> tuple:
    return message["role"], _message_text(message), message.get("tool_calls") or None


def _repeats_prompt(dataset: Any, name: str) -> bool:
    """Return whether both answers begin with the text of `prompt` in all compared rows; warn if so."""
    if "prompt" not in column_names(dataset):
        return False
    rows = list(islice(iter(dataset), MAX_COMPARED_ROWS))
    if not all(map(_begin_with_prompt, rows)):
        return False
    warnings.warn(
        f"{name}: chosen and rejected begin with the text of prompt in each of the first {len(rows)} rows, so the "
        "prompt is not repeated. Drop the column 'prompt' to silence this warning.",
        stacklevel=2,
    )
    return True


def _begin_with_prompt(row: Row) -> bool:
    prompt, answers = row["prompt"], (row["chosen"], row["rejected"])
    if not isinstance(prompt, str) or not prompt.strip():
        return False
    return all(isinstance(answer, str) and answer.startswith(prompt) for answer in answers)


# Pairs without a training signal


def _drop_unusable(dataset: Any, check_row: Callable[[Row, str], str | None], name: str) -> Any:
    """Drop pairs without a training signal, and warn with their number per reason."""
    if isinstance(dataset, IterableDataset):
        return _drop_from_stream(dataset, check_row, name)
    columns = [c for c in (*ID_COLUMNS, "margin") if c in dataset.column_names]
    dropped: dict[str, list[int]] = {}
    for index, row in enumerate(dataset.select_columns(columns)):
        if reason := check_row(row, f"{name}[{index}]"):
            dropped.setdefault(reason, []).append(index)
    if not dropped:
        return dataset
    summary = "; ".join(
        f"{len(rows)} of {len(dataset)} pairs {reason}, the first is {name}[{rows[0]}]"
        for reason, rows in dropped.items()
    )
    dropped_rows = {row for rows in dropped.values() for row in rows}
    if len(dropped_rows) == len(dataset):
        raise ValueError(
            f"{name} has no usable pair: {summary}. Add pairs with two different answers, or raise max_length."
        )
    warnings.warn(f"{name}: dropped pairs: {summary}.", stacklevel=2)
    return dataset.select([row for row in range(len(dataset)) if row not in dropped_rows])


def _drop_from_stream(
    dataset: IterableDataset, check_row: Callable[[Row, str], str | None], name: str
) -> IterableDataset:
    warn = WarnOnce()

    def is_useful(row: Row, index: int) -> bool:
        reason = check_row(row, f"{name}[{index}]")
        if reason:
            warn(reason, f"{name}: dropped pairs that {reason}, the first is {name}[{index}].")
        return reason is None

    return dataset.filter(is_useful, with_indices=True)


def _find_drop_reason(
    tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None, max_length: int | None, row: Row, where: str
) -> str | None:
    check_margin(row, where)
    for column in ID_COLUMNS:
        ids = row[column]
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and 0 <= i < len(tokenizer) for i in ids):
            raise ValueError(
                f"{where}: {column} is {shorten(ids)}; it must be a non-empty list of token ids, each below "
                f"{len(tokenizer)}, the size of the tokenizer's vocabulary."
            )
        if num_embeddings is not None and max(ids) >= num_embeddings:
            raise ValueError(
                f"{where}: {column} has the token {tokenizer.convert_ids_to_tokens(max(ids))!r} (id {max(ids)}), but "
                f"the model has embeddings for {num_embeddings} tokens. Pass the model's tokenizer, or call "
                "model.resize_token_embeddings(len(tokenizer)) and pass the model."
            )
    if max_length is not None and max(len(row[column]) for column in ID_COLUMNS) > max_length:
        return f"have more than max_length={max_length} tokens"
    return "have two equal answers" if row["chosen_ids"] == row["rejected_ids"] else None

"""Prompts to token ids: text, messages, or ids that were made elsewhere; every mistake is named by its row."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from .chat_templates import (
    PROBE,
    as_json_features,
    check_messages,
    drop_null_keys,
    fit_content,
    is_conversational,
    merge_template_kwargs,
    render_chat,
    shorten,
    struct_columns,
)

Row = dict[str, Any]


def column_names(dataset: Any) -> list[str]:
    """The columns of a dataset; those of the first row where a stream does not declare them."""
    return list(dataset.column_names or next(iter(dataset), {}))


def reset_format(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """A dataset that gives text, numbers and lists, whatever format was set (`set_format("torch")`)."""
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            f"{name} has a transform (set_transform), which would be applied anew to what is made of its rows here. "
            "Apply it once: dataset.map(...)."
        )
    return dataset.with_format(None)


def tokenize_prompts(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    name: str = "train_dataset",
) -> Any:
    """Add `input_ids` to a dataset of prompts; all other columns stay, for reward functions to use.

    Args:
        dataset: has a column `prompt` (text or messages) or, as TRL 1.12 took it, `input_ids`. A stream is tokenized
            as it is read. The columns `tools` and `chat_template_kwargs` go to the chat template with messages.
        tokenizer: applied to text as it is; messages go through its chat template first.
        max_prompt_length: tokens that are kept of a longer prompt: the BOS that it begins with, and the last ones.
        chat_template_kwargs: passed to `apply_chat_template`; those of a row's own column come before them.
        name: how errors call the dataset.

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
        row = {**row, **changed}
        if "prompt" in row:
            prompt, conversational = row["prompt"], is_conversational(row["prompt"])
            kwargs = merge_template_kwargs(chat_template_kwargs, row, where) if conversational else {}
            ids = encode_prompt(prompt, tokenizer, kwargs, where)
            warn_of_prompt(prompt, where, tokenizer, kwargs, warn)
        else:
            ids = _validate_input_ids(row, tokenizer, where)
            if [tokenizer.bos_token_id] * 2 == ids[:2]:
                warn(
                    "BOS", f"{where} begins with two BOS tokens: tokenize rendered text with add_special_tokens=False."
                )
        if not ids:
            raise ValueError(f"{where} has no tokens: the tokenizer drops every character of it. Filter such rows out.")
        return {**changed, "input_ids": _truncate_prompt(ids, max_prompt_length, tokenizer.bos_token_id)}

    if isinstance(dataset, IterableDataset):
        return dataset.map(encode, with_indices=True)
    features = Features({**as_json_features(dataset.features, structs), "input_ids": List(Value("int64"))})
    return dataset.map(
        encode, with_indices=True, features=features, desc=f"Tokenizing {name}", load_from_cache_file=False
    )


class WarnOnce:
    """Warns of each kind of row once, with the place of the first such row."""

    def __init__(self) -> None:
        self._kinds: set[str] = set()

    def is_first(self, kind: str) -> bool:
        """Whether nothing was asked of this kind before."""
        known = kind in self._kinds
        self._kinds.add(kind)
        return not known

    def __call__(self, kind: str, sentence: str) -> None:
        """Warn, unless a row of this kind was named before."""
        if self.is_first(kind):
            warnings.warn(sentence, stacklevel=2)


def warn_of_prompt(
    prompt: Any, where: str, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], warn: WarnOnce
) -> None:
    """Warn of a prompt that looks finished, is a conversation written as text, or gets no generation prompt."""
    if isinstance(prompt, str):
        if _is_written_conversation(prompt):
            warn(
                "written",
                f"{where} is a conversation written as text, which is tokenized as plain text and not by the chat "
                "template. Parse it first: dataset.map(lambda row: {'prompt': json.loads(row['prompt'])}).",
            )
    elif prompt[-1]["role"] == "assistant":
        warn(
            "finished",
            f"{where} ends in an assistant's message, {shorten(prompt[-1].get('content'))}, which each response "
            "continues. If it is finished, drop it: dataset.map(lambda row: {'prompt': row['prompt'][:-1]}).",
        )
    elif warn.is_first("generation prompt") and (header := _missing_header(prompt, tokenizer, kwargs)):
        warn(
            "header",
            f"{where} gets no generation prompt from the chat template, which begins an assistant's message with "
            f"{header!r}: responses would begin without it. Add {{% if add_generation_prompt %}} to the template.",
        )


def _is_written_conversation(text: str) -> bool:
    if not text.lstrip().startswith("[") or "role" not in text:
        return False
    for parse in (json.loads, ast.literal_eval):  # JSON, or Python's repr as a CSV holds it
        try:
            return is_conversational(parse(text.strip()))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return False


def _missing_header(messages: Any, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> str:
    asked = render_chat(messages, tokenizer, {"add_generation_prompt": True, **kwargs})
    answered = render_chat([*messages, {"role": "assistant", "content": PROBE}], tokenizer, kwargs)
    header, printed, _ = answered.rpartition(PROBE)
    follows = bool(printed) and asked == render_chat(messages, tokenizer, kwargs) and header.startswith(asked)
    return header[len(asked) :].strip() if follows else ""


def check_prompt_columns(dataset: Any, name: str) -> None:
    """Refuse a dataset without rows or without prompts, and name the call that makes the column."""
    columns = column_names(dataset)
    if not columns or (not isinstance(dataset, IterableDataset) and len(dataset) == 0):
        raise ValueError(f"{name} is empty: it has no rows. Look at how it was loaded or filtered.")
    if "prompt" in columns or "input_ids" in columns:
        return
    fix = "Rename yours: dataset.rename_column('...', 'prompt')."
    if "messages" in columns:
        messages = next(iter(dataset))["messages"]
        finished = is_conversational(messages) and messages[-1]["role"] == "assistant"
        fix = "Rename it: dataset.rename_column('messages', 'prompt')."
        if finished:
            fix = (
                f"{name}[0] ends in the assistant's answer, so take what comes before it: "
                "dataset.map(lambda row: {'prompt': row['messages'][:-1]})."
            )
    elif "conversations" in columns:
        fix = "If its messages have roles, rename it: dataset.rename_column('conversations', 'prompt')."
        if not is_conversational(next(iter(dataset))["conversations"]):
            fix = (
                "Make messages of 'conversations', without the answer: dataset.map(lambda row: {'prompt': [{'role': "
                "{'human': 'user', 'gpt': 'assistant'}.get(m['from'], m['from']), 'content': m['value']} for m in "
                "row['conversations'][:-1]]})."
            )
    elif {"chosen", "rejected"} <= set(columns):
        fix = "Take what both answers share: dataset.map(trl.extract_prompt)."
    raise ValueError(f"{name} has no column 'prompt' (it has {columns}). {fix}")


def _truncate_prompt(ids: list[int], longest: int | None, bos: int | None) -> list[int]:
    if longest is None or len(ids) <= longest:
        return ids
    first = ids[:1] if ids[0] == bos and longest > 1 else []
    return first + ids[len(ids) - longest + len(first) :]


def tokenize_datasets(datasets: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **options: Any) -> dict[str, Any]:
    """Datasets of prompts with their token ids; the options are those of `tokenize_prompts`."""
    return {name: tokenize_prompts(dataset, tokenizer, name=name, **options) for name, dataset in datasets.items()}


def encode_prompt(
    prompt: object, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any], where: str = "prompt"
) -> list[int]:
    """Token ids of one prompt, text or messages."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{where} is empty; drop such rows with dataset.filter.")
        return _strip_eos(tokenize_text(prompt, tokenizer), prompt, tokenizer)
    if not is_conversational(prompt):
        raise ValueError(
            f"{where} is {shorten(prompt)}; a prompt is text, or a list of messages such as "
            "[{'role': 'user', 'content': '...'}]."
        )
    messages = cast(list, prompt)
    # An assistant's last message is a reply begun, to be continued rather than answered.
    last = "continue_final_message" if messages[-1]["role"] == "assistant" else "add_generation_prompt"
    return tokenize_chat(messages, tokenizer, {last: True, **chat_template_kwargs}, where)


def tokenize_chat(
    messages: list[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], where: str
) -> list[int]:
    """Render messages by the chat template and return their token ids; an error names the row.

    Args:
        messages: without the keys that Arrow filled in.
        tokenizer: whose template reads them.
        kwargs: arguments of the template.
        where: the row, for errors.
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
        raise ValueError(f"{where}: the chat template does not take {shorten(messages)}: {error}") from error


def tokenize_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize text with the tokenizer's special tokens; a BOS that the text begins with is not added again."""
    ids = tokenizer(text)["input_ids"]
    return ids[1:] if starts_twice(ids, text, tokenizer) else ids


def starts_twice(ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer added the special token (BOS, CLS) with which the text begins already."""
    if len(ids) < 2 or ids[0] != ids[1] or ids[0] not in tokenizer.all_special_ids:
        return False
    as_written = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[: len(as_written)] != as_written and ids[1 : len(as_written) + 1] == as_written


def _strip_eos(ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids without an EOS that the tokenizer put behind the text (`add_eos_token`): no answer could follow it."""
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
                f"{where}: attention_mask has {len(mask)} entries, {sum(map(bool, mask))} of them real, for {len(ids)} "
                "input_ids; it must have one each, and at least one that is not 0. Drop the column if unsure."
            )
        ids = [i for i, real in zip(ids, mask, strict=True) if real]
    wrong = [i for i in ids if not 0 <= i < len(tokenizer)]
    if wrong:
        raise ValueError(
            f"{where}: input_ids has id {wrong[0]}, but the vocabulary has {len(tokenizer)} tokens. Tokenize with "
            "the tokenizer that is passed as processing_class."
        )
    return ids


def validate_prompts(dataset: Any, response_length: int, context: int | None, embeddings: int, name: str) -> Any:
    """A tokenized dataset whose prompts the model can answer; those of a stream are looked at as they are read."""
    if context is not None and response_length >= context:
        raise ValueError(
            f"response_length={response_length} leaves no room for a prompt in the model's context of {context}. "
            "Lower response_length."
        )

    def check(row: Row, index: int) -> Row:
        check_ids(row["input_ids"], response_length, context, embeddings, f"{name}[{index}]")
        return row

    if isinstance(dataset, IterableDataset):
        return dataset.map(check, with_indices=True)
    for index, ids in enumerate(dataset["input_ids"]):
        check({"input_ids": ids}, index)
    return dataset


def check_ids(ids: Sequence[int], response_length: int, context: int | None, embeddings: int, where: str) -> None:
    """Refuse a prompt that, with a full response, would not fit the context, or that has ids without an embedding."""
    if context is not None and len(ids) + response_length > context:
        raise ValueError(
            f"{where} has {len(ids)} tokens; with response_length={response_length} that exceeds the model's context "
            f"of {context}. Set max_prompt_length={context - response_length} or filter."
        )
    if max(ids) >= embeddings:
        raise ValueError(
            f"{where} has token id {max(ids)}, but the model has embeddings for {embeddings} tokens. Pass the model's "
            "own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) first."
        )


def to_columns(rows: Sequence[Row], exclude: Iterable[str] = ("input_ids", "attention_mask")) -> dict[str, list]:
    """Rows of a dataset as lists by column, the way reward functions take them."""
    return {name: [row[name] for row in rows] for name in rows[0] if name not in set(exclude)}

"""Completions to score, the protocol of rewards, and validation of their scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.chat_templates import fit_content, is_conversational, merge_template_kwargs, shorten

FLOAT32_MAX = torch.finfo(torch.float32).max  # reward units: bound on the size of one score


TEMPLATE_FIX = (
    "Set chat_template on the tokenizer and pass the tokenizer in reward_processing_classes, or remove such rows."
)


@dataclass
class Completions:
    """N prompts with their completions, and the other columns of the dataset.

    Attributes:
        prompts: text or messages, as in the dataset.
        completions: text, or a list of messages if the prompt is messages: the assistant's, and those of tools.
        completion_ids: token ids, without padding.
        columns: other columns of the dataset, by name.
        context: `trainer_state`, `log_extra` and `log_metric`, passed to functions.
        prompt_ids: token ids, if the dataset has them instead of text; `prompts` are then their decoded text.
        openings: start of each answer that the generation prompt contains (`<think>`), "" for none. The policy's prompt
            ends with it, and `completions` do not contain it.
        opening_ids: token ids of the opening, which are the last ids of the prompt.
        turn_ends: index in `completion_ids` of the last token of each turn of the policy; None for one turn.
        schemas: tools of the run that each prompt shows; None without any.
    """

    prompts: list
    completions: list
    completion_ids: list[list[int]]
    columns: dict[str, list] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    prompt_ids: list[list[int]] | None = None
    openings: list[str] | None = None
    opening_ids: list[list[int]] | None = None
    turn_ends: list[list[int]] | None = None
    schemas: list[list[dict[str, Any]]] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def texts(
        self, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any], suffix: str = ""
    ) -> list[str]:
        """Join each prompt and completion to one text; messages by the chat template, plain text with a suffix.

        The template receives the run's tools, or the column `tools`, and `chat_template_kwargs`, as for the policy. An
        answer begins with the part in the generation prompt (`openings`).

        Raises:
            ValueError: the template cannot render a conversation; the error names the prompt.
        """
        return [
            self._render(row, tokenizer, chat_template_kwargs)
            if is_conversational(prompt)
            else (prompt + completion).removesuffix(suffix) + suffix
            for row, (prompt, completion) in enumerate(zip(self.prompts, self.completions, strict=True))
        ]

    def _render(self, row: int, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any]) -> str:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path!r} has no chat template, but the prompt is a conversation, "
                f"{shorten(self.prompts[row])}. {TEMPLATE_FIX}"
            )
        row_columns: dict[str, Any] = {
            name: self.columns[name][row] for name in ("tools", "chat_template_kwargs") if name in self.columns
        }
        tools = {"tools": self.schemas[row]} if self.schemas is not None and self.schemas[row] else {}
        kwargs = {**merge_template_kwargs({**(chat_template_kwargs or {}), **tools}, row_columns), "tokenize": False}
        messages = self._conversation(row)
        try:
            return cast(str, tokenizer.apply_chat_template(fit_content(messages, tokenizer), **kwargs))
        except Exception as error:  # a template may raise any exception
            raise ValueError(
                f"The chat template of the tokenizer {tokenizer.name_or_path!r} cannot render {shorten(messages)}: "
                f"{error}. {TEMPLATE_FIX}"
            ) from error

    def _conversation(self, row: int) -> list:
        opening = "" if self.openings is None else self.openings[row]
        answer, *rest = self.completions[row]
        return join_messages(self.prompts[row], [{**answer, "content": opening + answer["content"]}, *rest])

    def pairs(self) -> list[tuple[str, str]]:
        """Return question and answer as text pairs; the question of a conversation has one message per line."""
        return [
            ("\n".join(message_texts(messages[:-1])), "\n".join(message_texts(messages[-1:])))
            for messages in (
                self._conversation(row) if is_conversational(prompt) else [{"content": prompt}, {"content": completion}]
                for row, (prompt, completion) in enumerate(zip(self.prompts, self.completions, strict=True))
            )
        ]


def join_messages(prompt: list, completion: list) -> list:
    """Join the messages of prompt and completion; merge an assistant's message that the completion continues."""
    last, (answer, *others) = prompt[-1], completion
    if last["role"] != "assistant":
        return prompt + completion
    first, rest = last.get("content") or "", answer["content"]
    content = first + rest if isinstance(first, str) else [*first, {"type": "text", "text": rest}]
    return [*prompt[:-1], {**last, "content": content}, *others]


def message_texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the text of each message; parts that are not text (images) are skipped."""
    contents = [message.get("content") or "" for message in messages]
    parts = [[{"text": c}] if isinstance(c, str) else c for c in contents]
    return [" ".join(part.get("text") or "" for part in message) for message in parts]


# Reward of a response: a score, one number per token, or None (not applicable). Functions may also return {"turn":
# numbers}, one per turn of the policy, each of which is paid at the last token of its turn.
Score = float | list[float] | None


class Reward(Protocol):
    """Protocol of rewards: score completions, with None where the reward does not apply."""

    name: str

    def __call__(self, batch: Completions) -> Sequence[Score]:
        """Return for each completion a score, or a list of one number per token, reward units."""
        ...


def validate_scores(scores: Any, batch: Completions, name: str) -> list[Score]:
    """Validate scores: finite floats, lists of them, or None; errors name the prompt."""
    if isinstance(scores, Tensor):
        scores = scores.tolist()
    is_list = hasattr(scores, "__len__") and getattr(scores, "ndim", 1) > 0
    if not is_list or isinstance(scores, str | bytes | Mapping | Set):
        raise ValueError(
            f"The reward function {name!r} returned {scores!r}; it must return a list with one number per completion."
        )
    if len(scores) != len(batch):
        raise ValueError(
            f"The reward function {name!r} returned {len(scores)} rewards for {len(batch)} completions; return one per "
            "completion."
        )
    result: list[Score] = []
    for row, value in enumerate(scores):
        value = turns_to_tokens(value, batch, row, name) if isinstance(value, Mapping) else value
        per_token = isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0
        if per_token and len(value) != len(batch.completion_ids[row]):
            raise ValueError(
                f"The reward function {name!r} returned {len(value)} numbers for prompt {batch.prompts[row]!r}, whose "
                f"completion has {len(batch.completion_ids[row])} tokens; return one number, or one per token of "
                "completion_ids."
            )
        numbers = [_finite(v) for v in (value if per_token else [0.0 if value is None else value])]
        if None in numbers:
            raise ValueError(
                f"The reward function {name!r} returned {shorten(value)} for prompt {batch.prompts[row]!r} with "
                f"completion {batch.completions[row]!r}; return a finite number, or None if the reward does not apply."
            )
        finite = cast(list[float], numbers)
        result.append(None if value is None else finite if per_token else finite[0])
    return result


def turns_to_tokens(value: Mapping[str, Any], batch: Completions, row: int, name: str) -> list[Any]:
    """Convert rewards per turn, `{"turn": numbers}`, to one number per token of the completion."""
    numbers, length = value.get("turn"), len(batch.completion_ids[row])
    ends = [length - 1] if batch.turn_ends is None else batch.turn_ends[row]
    if set(value) != {"turn"} or not isinstance(numbers, list | tuple) or len(numbers) != len(ends):
        raise ValueError(
            f"The reward function {name!r} returned {dict(value)!r} for prompt {batch.prompts[row]!r}, whose "
            f"completion has {len(ends)} turns; rewards per turn are {{'turn': [...]}} with one number for each."
        )
    by_end = dict(zip(ends, numbers, strict=True))
    return [by_end.get(token, 0.0) for token in range(length)]


def _finite(value: Any) -> float | None:
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):  # a whole number beyond float
        return None
    return number if abs(number) <= FLOAT32_MAX else None  # also None for NaN

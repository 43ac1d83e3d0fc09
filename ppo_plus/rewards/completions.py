"""The contract: what is scored, and what a score may be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.chat_templates import fit_content, is_conversational, merge_template_kwargs, shorten

FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass
class Completions:
    """What is scored: N prompts with their completions, and the other columns of the dataset.

    Attributes:
        prompts: text or messages, as in the dataset.
        completions: text, or one assistant message in a list where the prompt is messages.
        completion_ids: token ids, without padding.
        columns: further columns of the dataset, by name.
        context: `trainer_state`, `log_extra` and `log_metric`, handed to functions.
        prompt_ids: token ids, where that is what the dataset gave; `prompts` are then their text.
        openings: what the generation prompt began of each answer (`<think>`), "" for nothing. The policy's prompt ends
            in it, and `completions` do not contain it.
        opening_ids: its token ids, the last of the prompt's.
    """

    prompts: list
    completions: list
    completion_ids: list[list[int]]
    columns: dict[str, list] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    prompt_ids: list[list[int]] | None = None
    openings: list[str] | None = None
    opening_ids: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def texts(
        self, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any], end: str = ""
    ) -> list[str]:
        """Prompt and completion as one text: messages through the chat template, plain text with this at its end.

        The template gets the columns `tools` and `chat_template_kwargs`, where there are any, as it did for the policy.
        An answer begins with what the generation prompt began of it (`openings`).

        Raises:
            ValueError: the template does not render a conversation; its prompt is named.
        """
        return [
            self._render(row, tokenizer, chat_template_kwargs)
            if is_conversational(prompt)
            else (prompt + completion).removesuffix(end) + end
            for row, (prompt, completion) in enumerate(zip(self.prompts, self.completions, strict=True))
        ]

    def _render(self, row: int, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any]) -> str:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path!r} has no chat template, and the prompt is a conversation, "
                f"{shorten(self.prompts[row])}."
            )
        own: dict[str, Any] = {
            name: self.columns[name][row] for name in ("tools", "chat_template_kwargs") if name in self.columns
        }
        kwargs = {**merge_template_kwargs(chat_template_kwargs, own), "tokenize": False}
        messages = self._conversation(row)
        try:
            return cast(str, tokenizer.apply_chat_template(fit_content(messages, tokenizer), **kwargs))
        except Exception as error:  # whatever a template raises
            raise ValueError(
                f"The chat template of the tokenizer {tokenizer.name_or_path!r} does not take {shorten(messages)}: "
                f"{error}."
            ) from error

    def _conversation(self, row: int) -> list:
        opening = "" if self.openings is None else self.openings[row]
        (answer,) = self.completions[row]
        return join_messages(self.prompts[row], [{**answer, "content": opening + answer["content"]}])

    def pairs(self) -> list[tuple[str, str]]:
        """Question and answer as two texts; of a conversation, what was said before the answer, by lines."""
        return [
            ("\n".join(message_texts(messages[:-1])), "\n".join(message_texts(messages[-1:])))
            for messages in (
                self._conversation(row) if is_conversational(prompt) else [{"content": prompt}, {"content": completion}]
                for row, (prompt, completion) in enumerate(zip(self.prompts, self.completions, strict=True))
            )
        ]


def join_messages(prompt: list, completion: list) -> list:
    """Prompt and completion as messages: an assistant's message that the prompt begins and the completion ends is one.

    Args:
        prompt: messages.
        completion: one message of an assistant.
    """
    begun, (ended,) = prompt[-1], completion
    if begun["role"] != "assistant":
        return prompt + completion
    first, rest = begun.get("content") or "", ended["content"]
    whole = first + rest if isinstance(first, str) else [*first, {"type": "text", "text": rest}]
    return [*prompt[:-1], {**begun, "content": whole}]


def message_texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The text of each message that has one; parts that are no text (images) are left out."""
    contents = [message.get("content") or "" for message in messages]
    parts = [[{"text": c}] if isinstance(c, str) else c for c in contents]
    return [" ".join(part.get("text") or "" for part in message) for message in parts]


# What a reward gives a response: a score, one number per token, or nothing.
Score = float | list[float] | None


class Reward(Protocol):
    """Scores completions; `None` where a reward does not apply."""

    name: str

    def __call__(self, batch: Completions) -> Sequence[Score]:
        """One score per completion, or a list of one per token of it; reward units."""
        ...


def validate_scores(scores: Any, batch: Completions, name: str) -> list[Score]:
    """Scores as a list of finite floats, lists of them, or None; anything else is named with its prompt."""
    if isinstance(scores, Tensor):
        scores = scores.tolist()
    listed = hasattr(scores, "__len__") and getattr(scores, "ndim", 1) > 0
    if not listed or isinstance(scores, str | bytes | Mapping | Set):
        raise ValueError(
            f"The reward function {name!r} returned {scores!r}; it must return a list with one number each."
        )
    if len(scores) != len(batch):
        raise ValueError(f"The reward function {name!r} returned {len(scores)} rewards for {len(batch)} completions.")
    result: list[Score] = []
    for row, value in enumerate(scores):
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
                f"The reward function {name!r} returned {value!r} for prompt {batch.prompts[row]!r} with completion "
                f"{batch.completions[row]!r}; return a finite number, or None where the reward does not apply."
            )
        finite = cast(list[float], numbers)
        result.append(None if value is None else finite if per_token else finite[0])
    return result


def _finite(value: Any) -> float | None:
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) <= FLOAT32_MAX else None  # of NaN, too

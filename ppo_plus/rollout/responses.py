"""Responses before they are scored: those of one turn, and those of several turns with observations between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data.prompts import Row
from ..models.generation import GenerateOutput
from .buffer import response_mask


@dataclass(frozen=True)
class Responses:
    """N responses of at most R tokens.

    Attributes:
        rows: rows of the dataset, with the prompts that were answered: `input_ids` and, where there is one, `prompt`.
        tokens: token ids, `(N, R)` int64, right-padded.
        logprobs: log-probabilities under the distribution that was sampled from, `(N, R)` float32, nats; NaN: unknown.
        mask: True for the tokens of a response, `(N, R)` bool.
        action_mask: True for the tokens that are trained as actions, `(N, R)` bool.
        stopped: whether a response ended in a stop token, `(N,)` bool.
        observation_mask: True for tokens that the policy did not sample, `(N, R)` bool; None if there are none.
        messages: each response as messages; None if its text is still to be decoded.
        environments: the environment of each response; None without environments.
        schemas: the tools that each prompt shows; None without tools.
        tool_counts: tool calls and failed tool calls, `(N, 2)` int64; None without tools.
    """

    rows: Sequence[Row]
    tokens: Tensor
    logprobs: Tensor
    mask: Tensor
    action_mask: Tensor
    stopped: Tensor
    observation_mask: Tensor | None = None
    messages: list[list[dict[str, Any]]] | None = None
    environments: list[Any] | None = None
    schemas: list[list[dict[str, Any]]] | None = None
    tool_counts: Tensor | None = None

    def turn_ends(self) -> list[list[int]]:
        """Return the index of the last token of each turn, by row; a turn is a run of sampled tokens."""
        sampled = self.mask if self.observation_mask is None else self.mask & ~self.observation_mask
        ends = sampled & ~torch.nn.functional.pad(sampled[:, 1:], (0, 1))
        return [row.nonzero()[:, 0].tolist() for row in ends]

    @classmethod
    def from_single_turn(
        cls, rows: Sequence[Row], output: GenerateOutput, stop_ids: Sequence[int], *, train_on_eos: bool
    ) -> Responses:
        """Build the responses of one turn, which ends at its first stop token."""
        mask = response_mask(output.tokens, stop_ids)
        action_mask = response_mask(output.tokens, stop_ids, include_stop=train_on_eos)
        stopped = torch.isin(output.tokens, torch.tensor(list(stop_ids))).any(1)
        return cls(rows, output.tokens, output.logprobs, mask, action_mask, stopped)

    @classmethod
    def from_segments(
        cls, rows: Sequence[Row], segments: Sequence[Segments], stop_ids: Sequence[int], pad_token_id: int, *,
        train_on_eos: bool, **options: Any,
    ) -> Responses:  # fmt: skip
        """Build responses that contain observations; `options` are the attributes from `messages` on.

        Without `train_on_eos`, no stop token is an action, except in a response that has no other sampled token.
        """
        tokens = pad_sequence([torch.tensor(s.ids) for s in segments], batch_first=True, padding_value=pad_token_id)
        logprobs = pad_sequence([torch.tensor(s.logprobs, dtype=torch.float32) for s in segments], batch_first=True)
        sampled = pad_sequence([torch.tensor(s.sampled) for s in segments], batch_first=True)
        mask = torch.arange(tokens.shape[1]) < torch.tensor([len(s.ids) for s in segments])[:, None]
        is_stop = torch.isin(tokens, torch.tensor(list(stop_ids)))
        action_mask = sampled
        if not train_on_eos:
            without_stop = sampled & ~is_stop
            first = sampled & (sampled.cumsum(1) == 1)
            action_mask = torch.where(without_stop.any(1, keepdim=True), without_stop, first)
        stopped = torch.tensor([s.ids[-1] in stop_ids for s in segments])
        observations = mask & ~sampled
        return cls(
            rows, tokens, logprobs, mask, action_mask, stopped, observations if observations.any() else None, **options
        )


@dataclass
class Segments:
    """One response that grows turn by turn.

    Attributes:
        ids: token ids of all turns and of the observations between them; never tokenized again.
        logprobs: nats by token; NaN where it is not known, and for observations 0.
        sampled: False for the tokens of observations.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)

    def add_turn(self, ids: list[int], logprobs: list[float]) -> None:
        """Append tokens that the policy sampled."""
        self.ids += ids
        self.logprobs += logprobs
        self.sampled += [True] * len(ids)

    def add_observation(self, ids: list[int]) -> None:
        """Append tokens that the policy only reads."""
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.sampled += [False] * len(ids)


def check_same_prompts(rows: Sequence[Row], num_generations: int) -> None:
    """Refuse groups of responses whose prompts differ, because their passes read the prompt once."""
    for first in range(0, len(rows), num_generations):
        for row in rows[first + 1 : first + num_generations]:
            if row["input_ids"] != rows[first]["input_ids"]:
                raise ValueError(
                    f"num_generations={num_generations}: the responses to prompt {first // num_generations} of a "
                    "rollout have different prompts. Let `reset` or rollout_func return the same prompt for the same "
                    "row, or set num_generations=1."
                )

"""Responses from a function of the user, in the form of TRL's `rollout_func`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..config import PPOConfig
from ..data.prompts import Row, WarnOnce, check_ids
from ..rewards.functions import REWARD_ARGUMENTS, without_autocast
from ..utils.interrupt import interruptible
from .responses import Responses, Segments

REQUIRED = ("prompt_ids", "completion_ids", "logprobs")
MAX_LOGPROB = 1e-2  # nats: rounding of a probability of 1 in bfloat16


class RolloutFunction:
    """Calls `rollout_func(prompts, trainer)` and checks what it returns.

    Args:
        function: returns a dict with, for each prompt, `prompt_ids`, `completion_ids` and `logprobs` (nats, under the
            distribution that was sampled from; None where unknown), optionally `env_mask` (1 for tokens of the model,
            0 for others), and further keys for reward functions.
        trainer: passed to the function.
        args: `response_length` and `train_on_eos`.
        stop_ids: ids that end a response.
        limits: as of `TurnLoop`.
        pad_token_id: fills the tensors.
    """

    def __init__(
        self, function: Callable, trainer: Any, args: PPOConfig, stop_ids: Sequence[int],
        limits: tuple[int | None, int], pad_token_id: int,
    ) -> None:  # fmt: skip
        self.function, self.trainer, self.args, self.stop_ids = function, trainer, args, list(stop_ids)
        self.limits, self.pad_token_id = limits, pad_token_id
        self._warn = WarnOnce()

    def __call__(self, rows: Sequence[Row]) -> Responses:
        """Return the responses to the prompts of these rows."""
        prompts = [copy.deepcopy(row.get("prompt", row["input_ids"])) for row in rows]
        with without_autocast(), interruptible():
            output = self.function(prompts, self.trainer)
        if not isinstance(output, Mapping):
            raise ValueError(f"rollout_func returned a {type(output).__name__}; it must return a dict.")
        missing = [name for name in REQUIRED if name not in output]
        if missing:
            raise ValueError(f"rollout_func must return {missing}; its dict has the keys {list(output)}.")
        columns = {name: self._column(name, value, len(rows)) for name, value in output.items()}
        self._check_names(columns)
        segments = [self._segments(row, columns) for row in range(len(rows))]
        prompt_ids = [_check_ids(ids, f"rollout_func: prompt_ids[{i}]") for i, ids in enumerate(columns["prompt_ids"])]
        self._warn_of_two_bos(prompt_ids)
        extra = [name for name in columns if name not in (*REQUIRED, "env_mask")]
        answered = [
            {**row, "input_ids": prompt_ids[i], **{name: columns[name][i] for name in extra}}
            for i, row in enumerate(rows)
        ]
        return Responses.from_segments(
            answered, segments, self.stop_ids, self.pad_token_id, train_on_eos=self.args.train_on_eos
        )

    def _warn_of_two_bos(self, prompt_ids: Sequence[list[int]]) -> None:
        bos = self.trainer.processing_class.bos_token_id
        if twice := [i for i, ids in enumerate(prompt_ids) if bos is not None and ids[:2] == [bos, bos]]:
            self._warn(
                "BOS",
                f"rollout_func: prompt_ids[{twice[0]}] begins with two BOS tokens: tokenize rendered text with "
                "add_special_tokens=False.",
            )

    @staticmethod
    def _column(name: str, value: Any, count: int) -> list:
        """Return one value per prompt; what is no list holds for all prompts."""
        if not isinstance(value, list | tuple):
            if name in ("prompt_ids", "completion_ids", "env_mask"):
                raise ValueError(f"rollout_func: {name} is a {type(value).__name__}; it must be a list of lists.")
            return [value] * count
        if len(value) != count:
            raise ValueError(f"rollout_func: {name} has {len(value)} entries for {count} prompts; return one for each.")
        return list(value)

    @staticmethod
    def _check_names(columns: Mapping[str, list]) -> None:
        taken = sorted({*REWARD_ARGUMENTS, "prompt", "input_ids"} & {*columns} - {*REQUIRED})
        if taken:
            raise ValueError(f"rollout_func: the key {taken[0]!r} is an argument of reward functions; rename it.")

    def _segments(self, row: int, columns: Mapping[str, list]) -> Segments:
        """Check the tokens of one response."""
        where, (context, num_embeddings) = f"rollout_func: completion_ids[{row}]", self.limits
        ids, prompt = _check_ids(columns["completion_ids"][row], where), columns["prompt_ids"][row]
        prompt = _check_ids(prompt, f"rollout_func: prompt_ids[{row}]")
        if len(ids) > self.args.response_length:
            raise ValueError(
                f"{where} has {len(ids)} tokens, more than response_length={self.args.response_length}. Cut it, or "
                "raise response_length."
            )
        if context is not None and len(prompt) + len(ids) > context:
            raise ValueError(
                f"{where} and its prompt have {len(prompt) + len(ids)} tokens; the model's context has {context}."
            )
        check_ids([*prompt, *ids], 0, None, num_embeddings, f"rollout_func: prompt_ids and completion_ids [{row}]")
        logprobs, mask = columns["logprobs"][row], columns.get("env_mask", [None] * (row + 1))[row]
        logprobs = [None] * len(ids) if logprobs is None else list(logprobs)
        mask = [1] * len(ids) if mask is None else list(mask)
        for name, values in (("logprobs", logprobs), ("env_mask", mask)):
            if len(values) != len(ids):
                raise ValueError(
                    f"rollout_func: {name}[{row}] has {len(values)} entries for {len(ids)} tokens of completion_ids."
                )
        if bad := [value for value in mask if value not in (0, 1)]:
            raise ValueError(f"rollout_func: env_mask[{row}] has {bad[0]!r}; it must be 1 (model) or 0 (environment).")
        if not any(mask):
            raise ValueError(
                f"rollout_func: env_mask[{row}] is 0 for all tokens, so nothing would be trained; it must be 1 for "
                "those of the model."
            )
        return Segments(ids, [_number(value, row) for value in logprobs], [bool(value) for value in mask])


def _check_ids(ids: Any, where: str) -> list[int]:
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(ids, list | tuple) or not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ValueError(f"{where} is {str(ids)[:80]}; it must be a list of token ids that is not empty.")
    return list(ids)


def _number(value: Any, row: int) -> float:
    """Return a log-probability; NaN for one that is not known."""
    if value is None:
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"rollout_func: logprobs[{row}] has {value!r}; it must hold numbers, in nats.") from error
    if number > MAX_LOGPROB:
        raise ValueError(
            f"rollout_func: logprobs[{row}] has {number!r}, which is no log-probability; pass the logarithm of the "
            "probability, or None if it is not known."
        )
    return number

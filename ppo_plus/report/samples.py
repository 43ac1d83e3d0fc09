"""Responses on the report page: answers to fixed prompts, and tokens with their per-token values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..algo.advantages import shape_rewards
from ..algo.kl import kl_estimate
from ..callbacks.completions import message_lines, messages_to_text
from ..config import PPOConfig
from ..data.prompts import Row

if TYPE_CHECKING:
    from ..rollout.buffer import Rollout
    from ..rollout.experience import Experience

# These limits keep a page below two megabytes for any run and any response length.
MAX_PROMPTS = 6  # fixed prompts
MAX_CANDIDATES = 200  # rows of the dataset among which they are the first ones that differ
MAX_RESPONSES = 8  # responses per rollout
MAX_TOKENS = 400  # tokens per response
MAX_CHARACTERS = 1200  # last characters of each prompt, first characters of each answer
MAX_CALL_CHARACTERS = 200  # first characters of each tool call


def fixed_prompts(train: Dataset | IterableDataset, evaluation: Any) -> list[Row]:
    """Select the fixed prompts, from the evaluation dataset if it has all columns of the training dataset.

    They are rows and not a dataset: Arrow would add the keys of other rows to the messages of a stream, or refuse them.
    """
    stream = list(train.take(MAX_PROMPTS)) if isinstance(train, IterableDataset) else None
    columns = set(train.column_names if stream is None else stream[0])
    held_out = evaluation if isinstance(evaluation, Dataset) else next(iter((evaluation or {}).values()), None)
    if held_out is not None and columns <= set(held_out.column_names):
        candidates = held_out.select(range(min(len(held_out), MAX_CANDIDATES)))
    else:
        candidates = train.select(range(min(len(train), MAX_CANDIDATES))) if stream is None else stream
    rows: dict[tuple[int, ...], Row] = {}
    for row in candidates:  # without duplicates, since the page identifies rows by text
        rows.setdefault(tuple(row["input_ids"]), row)
    return list(rows.values())[:MAX_PROMPTS]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Decode each token to the text it adds; empty if the token is only the first part of a character."""
    texts, start, done = [], 0, 0
    for end in range(1, len(ids) + 1):
        # Decode from a few tokens earlier, since some tokenizers drop a leading space.
        before, after = _decode(tokenizer, ids[start:done]), _decode(tokenizer, ids[start:end])
        if len(after) > len(before) and (not after.endswith("\ufffd") or end == len(ids)):
            texts.append(after[len(before) :])
            start, done = done, end
        else:
            texts.append("")
    return texts


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _truncate_right(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " […]"


def _truncate_left(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else "[…] " + text[-MAX_CHARACTERS:]


def completions_snapshot(samples: Experience, step: int) -> dict[str, Any]:
    """Return the policy's answers to the fixed prompts at a step; `reward` is NaN if they were not scored."""
    kl = ((samples.logprobs - samples.ref_logprobs) * samples.action_mask).sum(1)
    texts = samples.completions
    return {
        "step": step,
        "rows": [
            {
                "prompt": _truncate_left(messages_to_text(texts.prompts[i])),
                **_answer(texts.completions[i]),
                "reward": float(samples.scores[i]),
                "kl": float(kl[i]),
            }
            for i in range(len(samples))
        ],
    }


def _answer(completion: Any) -> dict[str, Any]:
    """Return the text of an answer; with tools also its lines with their kinds, up to the same length."""
    text, lines = _truncate_right(messages_to_text(completion)), message_lines(completion)
    if all(kind in ("", "assistant") for kind, _ in lines):
        return {"answer": text}
    left, parts = MAX_CHARACTERS, []
    for kind, line in lines:
        if left > 0:
            parts.append([kind, line if len(line) <= left else line[:left] + " […]"])
        left -= len(line) + 1
    return {"answer": text, "parts": parts}


def token_view(
    rollout: Rollout,
    samples: Experience,
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
    *,
    kl_coef: float,
    step: int,
) -> dict[str, Any]:
    """Select responses of a rollout, evenly spaced by score, with per-token values.

    Args:
        rollout: the rollout, `(N, R)`.
        samples: texts and token rewards of its responses.
        tokenizer: tokenizer of the policy.
        args: sets where the KL is penalized and its estimator.
        kl_coef: coefficient of the KL penalty, reward units per nat.
        step: step at which the rollout was collected.

    Returns:
        Per response the prompt, the score (reward units), the KL (nats) and, token by token, its text, advantage
        (standard deviations), value, KL (nats), reward (before whitening) and log-probability (nats). With tools
        or observations also its segments.
    """
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, args.kl_estimator) * rollout.action_mask
    mask, token_rewards = rollout.action_mask, samples.token_rewards * rollout.action_mask
    reward_kl_coef = kl_coef if args.kl_penalty_in == "reward" else 0.0
    final_scores = rollout.sequence_scores - token_rewards.sum(1)
    rewards = shape_rewards(final_scores, kl, mask, reward_kl_coef, token_rewards)
    ranked = rollout.sequence_scores.argsort(descending=True, stable=True)
    num_responses = min(MAX_RESPONSES, len(rollout))
    rows = ranked[torch.linspace(0, len(rollout) - 1, num_responses).round().long()]
    per_token = {
        "advantage": rollout.advantages, "value": rollout.values, "kl": kl, "reward": rewards,
        "logprob": rollout.logprobs,
    }  # fmt: skip
    return {
        "step": step,
        "total": len(rollout),
        "responses": [_response(int(row), rollout, samples, tokenizer, per_token) for row in rows],
    }


def _response(
    row: int, rollout: Rollout, samples: Experience, tokenizer: PreTrainedTokenizerBase, per_token: dict[str, Tensor]
) -> dict[str, Any]:
    observed = torch.zeros_like(rollout.action_mask) if rollout.observation_mask is None else rollout.observation_mask
    # Up to the last one: without `train_on_eos`, the stop token of an earlier turn is neither action nor observation.
    length = int((rollout.action_mask | observed)[row].nonzero()[-1]) + 1
    num_tokens = min(length, MAX_TOKENS)
    segments = _segments(observed[row, :num_tokens], samples.completions.completions[row])
    ids = rollout.input_ids[row, rollout.prompt_length :][:num_tokens].tolist()
    return {
        "prompt": _truncate_left(messages_to_text(samples.completions.prompts[row])),
        "score": float(rollout.sequence_scores[row]),
        "total_kl": float(rollout.sequence_kl[row]),
        "length": length,
        "tokens": token_texts(tokenizer, ids),
        **{name: [round(x, 4) for x in numbers[row, :num_tokens].tolist()] for name, numbers in per_token.items()},
        **({"segments": segments} if len(segments) > 1 or segments[0]["calls"] else {}),
    }


def _segments(observed: Tensor, completion: Any) -> list[dict[str, Any]]:
    """Return the turns of a response and the observations between them, as `[start, end)` in tokens.

    A turn has the tool calls of its message as text; a response without messages has none.
    """
    changes = (observed[1:] != observed[:-1]).nonzero()[:, 0] + 1
    bounds = [0, *changes.tolist(), len(observed)]
    messages = [] if isinstance(completion, str) else [m for m in completion if m["role"] == "assistant"]
    segments: list[dict[str, Any]] = []
    for start, end in pairwise(bounds):
        is_observation, calls = bool(observed[start]), []
        if not is_observation and messages:
            calls = [_call_text(call) for call in messages.pop(0).get("tool_calls") or ()]
        segments.append({"start": start, "end": end, "observation": is_observation, "calls": calls})
    return segments


def _call_text(call: Mapping[str, Any]) -> str:
    function = call.get("function", call)
    text = f"{function.get('name')}({function.get('arguments')})"
    return text if len(text) <= MAX_CALL_CHARACTERS else text[:MAX_CALL_CHARACTERS] + " […]"

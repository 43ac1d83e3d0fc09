"""What the page shows of responses: the answers to fixed prompts, and tokens with their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..algo.advantages import shape_rewards
from ..algo.kl import kl_estimate
from ..callbacks.completions import messages_to_text
from ..config import PPOConfig

if TYPE_CHECKING:
    from ..rollout.buffer import Rollout
    from ..rollout.collector import Experience

# What keeps a page below two megabytes, however long the run and its responses.
PROMPTS = 6  # answered again and again
RESPONSES = 8  # of a rollout
TOKENS = 400  # of each response
CHARACTERS = 1200  # of each prompt, its end, and of each answer, its beginning


def fixed_prompts(train: Dataset | IterableDataset, evaluation: Any) -> Dataset:
    """The prompts that are answered again and again: of evaluation if reward functions can score them."""
    if isinstance(train, IterableDataset):
        train = Dataset.from_list(list(train.take(PROMPTS)))
    held_out = evaluation if isinstance(evaluation, Dataset) else next(iter((evaluation or {}).values()), None)
    known = held_out is not None and set(train.column_names) <= set(held_out.column_names)
    dataset: Any = held_out if known else train
    rows: dict[tuple[int, ...], int] = {}
    for row, ids in enumerate(dataset[:200]["input_ids"]):  # different ones, for they are told apart by their text
        rows.setdefault(tuple(ids), row)
    return dataset.select(list(rows.values())[:PROMPTS])


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; empty where a token only begins a character that a later one ends."""
    texts, start, read = [], 0, 0
    for end in range(1, len(ids) + 1):
        # From a few tokens before: some tokenizers drop a leading space of what they decode.
        known, now = _decoded(tokenizer, ids[start:read]), _decoded(tokenizer, ids[start:end])
        if len(now) > len(known) and (not now.endswith("\ufffd") or end == len(ids)):
            texts.append(now[len(known) :])
            start, read = read, end
        else:
            texts.append("")
    return texts


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _beginning(text: str) -> str:
    return text if len(text) <= CHARACTERS else text[:CHARACTERS] + " […]"


def _end(text: str) -> str:
    return text if len(text) <= CHARACTERS else "[…] " + text[-CHARACTERS:]


def answers(samples: Experience, step: int) -> dict[str, Any]:
    """Return the policy's answers to the fixed prompts at a step; `reward` is NaN where they were not scored."""
    kl = ((samples.logprobs - samples.ref_logprobs) * samples.action_mask).sum(1)
    texts = samples.completions
    return {
        "step": step,
        "rows": [
            {
                "prompt": _end(messages_to_text(texts.prompts[i])),
                "answer": _beginning(messages_to_text(texts.completions[i])),
                "reward": float(samples.scores[i]),
                "kl": float(kl[i]),
            }
            for i in range(len(samples))
        ],
    }


def token_view(
    rollout: Rollout,
    samples: Experience,
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
    *,
    kl_coef: float,
    step: int,
) -> dict[str, Any]:
    """The tokens of some responses of a rollout with their numbers, evenly spread over the scores.

    Args:
        rollout: the rollout, `(N, R)`.
        samples: the texts of its responses, and what was paid at single tokens.
        tokenizer: of the policy.
        args: where the KL is penalized and how it is estimated.
        kl_coef: coefficient of the KL penalty, reward units per nat.
        step: at which the rollout was collected.

    Returns:
        Per response the prompt, the score (reward units), the KL (nats) and, token by token, its text, advantage
        (standard deviations), value, KL (nats), reward (before whitening) and log-probability (nats).
    """
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, args.kl_estimator) * rollout.action_mask
    at_tokens = samples.token_rewards * rollout.action_mask
    in_reward = kl_coef if args.kl_penalty_in == "reward" else 0.0
    rewards = shape_rewards(rollout.sequence_scores - at_tokens.sum(1), kl, rollout.action_mask, in_reward, at_tokens)
    ranked = rollout.sequence_scores.argsort(descending=True, stable=True)
    shown = min(RESPONSES, len(rollout))
    rows = ranked[torch.linspace(0, len(rollout) - 1, shown).round().long()]
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
    length = int(rollout.action_mask[row].sum())  # actions come first, padding after them
    kept = min(length, TOKENS)
    ids = rollout.input_ids[row, rollout.prompt_length :][:kept].tolist()
    return {
        "prompt": _end(messages_to_text(samples.completions.prompts[row])),
        "score": float(rollout.sequence_scores[row]),
        "total_kl": float(rollout.sequence_kl[row]),
        "length": length,
        "tokens": token_texts(tokenizer, ids),
        **{name: [round(x, 4) for x in numbers[row, :kept].tolist()] for name, numbers in per_token.items()},
    }

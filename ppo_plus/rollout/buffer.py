"""Rollout buffer, response masks, and the left-padded layout of forward passes.

No function here touches weights. Every seed is a pure function of a position (`data/seeding.py`): a rollout can be
rebuilt from (seed, rollout index), and its minibatches from (seed, rollout index, PPO epoch). Training therefore
resumes to the same bits without a generator state.

Notation: N responses, P prompt tokens (left-padded), R response tokens (right-padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..kernels.packing import SeqLens
from ..kernels.shared_prompts import Prefixes
from ..utils.files import reraise_as_corrupt_file


def response_mask(responses: Tensor, stop_ids: Sequence[int], *, include_stop: bool = True) -> Tensor:
    """Return True for response tokens up to and including the first stop token.

    The padding id may equal EOS (SmolLM2's does), so the mask comes from the first stop token and never from `!= pad`.

    Args:
        responses: sampled token ids, `(N, R)` int64.
        stop_ids: ids that end a response, any number of them.
        include_stop: whether the stop token itself is an action that is learned. If not, a response that consists
            of a stop token alone keeps it, so that every response has a token that carries its score.

    Returns:
        `(N, R)` bool.
    """
    is_stop = torch.isin(responses, torch.tensor(list(stop_ids), dtype=responses.dtype, device=responses.device))
    stops_before = is_stop.cumsum(-1) - is_stop.long()
    mask = stops_before == 0
    if not include_stop:
        mask &= ~is_stop
        mask[:, 0] = True
    return mask


@dataclass(frozen=True)
class Rollout:
    """The tensors of N responses that the learning phase needs; the only container between the phases of PPO.

    Attributes:
        input_ids: prompt and response tokens, `(N, P + R)` int64.
        attention_mask: 1 for real prompt tokens and for response tokens up to the stop token, `(N, P + R)` int64.
        action_mask: True for the response tokens that are actions, `(N, R)` bool.
        logprobs: `log pi_old(a_t | s_t)` at the sampling temperature, `(N, R)` float32, nats.
        ref_logprobs: the same under the reference policy, `(N, R)` float32, nats.
        values: `V_old(s_t)` before token t is emitted, `(N, R)` float32, reward units.
        value_baselines: the part of the values that the critic does not predict, `(N, R)` float32, reward units.
        advantages: whitened GAE advantages, times the importance weights of sampling, `(N, R)` float32.
        returns: GAE advantages (before whitening) plus values, `(N, R)` float32, reward units.
        sequence_scores: sequence score after callbacks and the missing-EOS penalty, `(N,)` float32, reward units.
        sequence_kl: summed estimate of KL(policy || reference) per response, `(N,)` float32, nats.
        frozen_hidden_states: inputs of the lowest layer with an adapter, `(N, P + R - 1, H)`, without the last token;
            None if every pass runs all layers. They are not saved, because they are recomputed from the tokens.
        explained_variance: share of the variance of the Monte Carlo returns that the values predict, over all ranks, a
            float32 scalar. It is not saved, because only the beginning of a rollout needs it.
        observation_mask: True for response tokens that the policy read and did not sample (results of tools),
            `(N, R)` bool; None if there are none. They have no log-probabilities or values.
    """

    input_ids: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    value_baselines: Tensor
    advantages: Tensor
    returns: Tensor
    sequence_scores: Tensor
    sequence_kl: Tensor
    frozen_hidden_states: Tensor | None = None
    explained_variance: Tensor | None = None
    observation_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def response_length(self) -> int:
        """R, in tokens."""
        return self.action_mask.shape[1]

    @property
    def prompt_length(self) -> int:
        """P, in tokens."""
        return self.input_ids.shape[1] - self.response_length

    def lengths(self) -> Tensor:
        """Return the number of real tokens per row, prompt and response, `(N,)` int64."""
        return self.attention_mask.sum(-1)

    def micro_batch(self, rows: Tensor, num_generations: int = 1) -> dict[str, Any]:
        """Return the left-padded micro-batch of these rows; per-token values are 0 outside a response.

        The result is a dict of tensors and the lists `seq_lens` and, with `num_generations` responses to each prompt,
        `prefixes`, because `Trainer` moves dicts to the device and cannot rebuild a NamedTuple.
        """
        # `action_mask` can be one token shorter than the attended response (stop token left out), never longer.
        layout = LeftPaddedLayout.from_attention_mask(
            self.attention_mask[rows], self.response_length, index_rows(self.observation_mask, rows)
        )
        states = self.frozen_hidden_states
        per_token = ("action_mask", "logprobs", "ref_logprobs", "values", "value_baselines", "advantages", "returns")
        return {
            "input_ids": layout.align_tokens(self.input_ids[rows]),
            "attention_mask": layout.align_tokens(self.attention_mask[rows]),
            **{name: layout.align_responses(getattr(self, name)[rows]) for name in per_token},
            "response_mask": layout.response_mask,
            "seq_lens": layout.seq_lens,
            **({} if num_generations == 1 else {"prefixes": layout.prefixes(rows, num_generations)}),
            **({} if states is None else {"frozen_hidden_states": layout.align_states(states[rows])}),
        }

    def select(self, rows: slice) -> Rollout:
        """Return the rollout of these rows, without frozen hidden states, which are recomputed."""
        return Rollout(**{name: getattr(self, name)[rows] for name in self._saved()})

    @classmethod
    def concatenate(cls, rollouts: Sequence[Rollout], pad_token_id: int) -> Rollout:
        """Concatenate rows; prompts are padded on the left and responses on the right to the longest.

        Frozen hidden states are left out, because they are recomputed.
        """
        prompt, response = (
            max(getattr(each, f"{part}_length") for each in rollouts) for part in ("prompt", "response")
        )
        rows: dict[str, list[Tensor]] = {name: [] for each in rollouts for name in each._saved()}
        for rollout in rollouts:
            right = response - rollout.response_length
            for name, tensors in rows.items():
                tensor = getattr(rollout, name)
                if tensor is None:  # only some have observations
                    tensor = torch.zeros_like(rollout.action_mask)
                if tensor.dim() == 2:
                    left = prompt - rollout.prompt_length if name in ("input_ids", "attention_mask") else 0
                    value = pad_token_id if name == "input_ids" else 0
                    tensor = nn.functional.pad(tensor, (left, right), value=value)
                tensors.append(tensor)
        return cls(**{name: torch.cat(tensors) for name, tensors in rows.items()})

    def save(self, path: str | Path) -> None:
        """Write the tensors as safetensors."""
        save_file({name: getattr(self, name).contiguous().cpu() for name in self._saved()}, path)

    @classmethod
    def load(cls, path: str | Path) -> Rollout:
        """Read what `save` wrote."""
        with reraise_as_corrupt_file(path):
            tensors = load_file(path)
        required = [f.name for f in fields(cls) if f.default is MISSING]
        missing = [name for name in required if name not in tensors]
        if missing:
            raise ValueError(f"{path} is not a rollout of this version of ppo_plus: it lacks {missing}.")
        return cls(**{f.name: tensors[f.name] for f in fields(cls) if f.name in tensors})

    def _saved(self) -> list[str]:
        names = [f.name for f in fields(self) if f.name not in ("frozen_hidden_states", "explained_variance")]
        return [name for name in names if getattr(self, name) is not None]


@dataclass(frozen=True)
class LeftPaddedLayout:
    """Left-padded layout of a forward pass: sequences are moved right, so that all padding is on the left.

    A pass is as wide as its longest sequence. (Prompts padded on one side and responses on the other would make it as
    wide as the longest prompt and the longest response together.) The last columns are those of the longest response;
    for a row with a shorter response they contain the end of its prompt.

    Attributes:
        response_length: R of the rollout, in tokens.
        lengths: attended response tokens by row, `(B, 1)` int64.
        width: columns of the pass.
        max_response_len: columns of the longest response, the last ones of the pass.
        seq_lens: (total tokens, response tokens without observations) per row, as Python ints, so that no host sync is
            needed.
        observations: True for response columns that are observations, `(B, max_response_len)` bool; None for none.
    """

    response_length: int
    lengths: Tensor
    width: int
    max_response_len: int
    seq_lens: SeqLens
    observations: Tensor | None = None

    @classmethod
    def from_attention_mask(
        cls, attention_mask: Tensor, response_length: int, observation_mask: Tensor | None = None
    ) -> LeftPaddedLayout:
        """Build the layout of rows with left-padded prompts and right-padded responses, `(B, P + R)`.

        `observation_mask` is that of `Rollout`, `(B, R)` bool.
        """
        lengths = attention_mask[:, -response_length:].sum(1, keepdim=True)
        width, max_response_len = int(attention_mask.sum(1).max()), max(1, int(lengths.max()))
        observations, sampled = None, lengths[:, 0]
        if observation_mask is not None:
            observations = roll_rows(observation_mask, response_length - lengths)[:, -max_response_len:]
            sampled = sampled - observation_mask.sum(1)
        sizes = list(zip(attention_mask.sum(1).tolist(), sampled.tolist(), strict=True))
        return cls(response_length, lengths, width, max_response_len, sizes, observations)

    @property
    def response_mask(self) -> Tensor:
        """True for the response columns that the row's policy sampled, `(B, max_response_len)` bool."""
        mask = torch.arange(self.max_response_len) >= self.max_response_len - self.lengths
        return mask if self.observations is None else mask & ~self.observations

    def prefixes(self, rows: Tensor, num_generations: int) -> Prefixes | None:
        """Return (prompt index, prompt tokens) of these rows of the rollout; None if no prompts are repeated."""
        if num_generations == 1:
            return None
        tokens = torch.tensor([total for total, _ in self.seq_lens]) - self.lengths[:, 0]
        return list(zip((rows // num_generations).tolist(), tokens.tolist(), strict=True))

    def align_tokens(self, columns: Tensor) -> Tensor:
        """Align the columns of a rollout, `(B, P + R)`, with the pass; return `(B, width)`."""
        return roll_rows(columns, self.response_length - self.lengths)[:, -self.width :]

    def align_responses(self, columns: Tensor) -> Tensor:
        """Align response columns, `(B, R)`, with the pass; 0 outside `response_mask`."""
        return roll_rows(columns, self.response_length - self.lengths)[:, -self.max_response_len :].masked_fill(
            ~self.response_mask, 0
        )

    def align_states(self, columns: Tensor) -> Tensor:
        """Align hidden states, `(B, P + R - 1, H)`, with the pass; return `(B, width - 1, H)`."""
        aligned = roll_rows(columns, self.response_length - self.lengths)
        return aligned[:, columns.shape[1] + 1 - self.width :]

    def restore_responses(self, aligned: Tensor) -> Tensor:
        """Move response columns, `(B, max_response_len)`, back to the rollout, `(B, R)`; 0 after a response."""
        columns = nn.functional.pad(aligned, (self.response_length - self.max_response_len, 0))
        padding = torch.arange(self.response_length) >= self.lengths
        return roll_rows(columns, self.lengths - self.response_length).masked_fill(padding, 0)

    def restore_states(self, aligned: Tensor, length: int) -> Tensor:
        """Move hidden states of a pass, `(B, width - 1, H)`, back to the rollout, `(B, length, H)`."""
        columns = nn.functional.pad(aligned, (0, 0, length + 1 - self.width, 0))
        return roll_rows(columns, self.lengths - self.response_length)


def index_rows(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    """Index a tensor that may be None."""
    return None if tensor is None else tensor[rows]


def roll_rows(columns: Tensor, shifts: Tensor) -> Tensor:
    """Roll each row of `(B, C, ...)` to the right by its entry of `(B, 1)`."""
    width = columns.shape[1]
    return columns[torch.arange(len(columns))[:, None], (torch.arange(width) - shifts) % width]

"""What one rollout is: the tensors, who masks what, and every seed as a pure function of position.

Nothing here touches weights. A rollout can be rebuilt from (seed, rollout index), and its minibatches from
(seed, rollout index, PPO epoch); that is why training resumes to the same bits without a generator state.

Notation: N responses, P prompt tokens (left-padded), R response tokens (right-padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..kernels.packing import SeqLens
from ..utils.files import reraise_as_corrupt_file


def response_mask(responses: Tensor, stop_ids: Sequence[int], *, include_stop: bool = True) -> Tensor:
    """1 for response tokens up to and including the first stop token.

    Pad may be the same id as EOS (SmolLM2's is), so the mask comes from the first stop token and never from
    `!= pad`.

    Args:
        responses: sampled token ids, `(N, R)` int64.
        stop_ids: ids that end a response, any number of them.
        include_stop: whether the stop token itself is an action that is learned. If not, a response that is
            nothing but a stop token keeps it, so that every response has a token to carry its score.

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
    """Everything the learning phase needs of N responses; the one container between the phases of PPO.

    Attributes:
        input_ids: prompt and response tokens, `(N, P + R)` int64.
        attention_mask: 1 for real prompt tokens and for response tokens up to the stop token, `(N, P + R)` int64.
        action_mask: True for the response tokens that are actions, `(N, R)` bool.
        logprobs: `log pi_old(a_t | s_t)` at the sampling temperature, `(N, R)` float32, nats.
        ref_logprobs: the same under the reference policy, `(N, R)` float32, nats.
        values: `V_old(s_t)` before token t is emitted, `(N, R)` float32, reward units.
        baselines: the part of the values that is not the critic's, `(N, R)` float32, reward units.
        advantages: whitened GAE advantages, times the importance weights of sampling, `(N, R)` float32.
        returns: GAE advantages (before whitening) plus values, `(N, R)` float32, reward units.
        sequence_scores: sequence score after callbacks and the missing-EOS penalty, `(N,)` float32, reward units.
        sequence_kl: summed estimate of KL(policy || reference) per response, `(N,)` float32, nats.
        frozen_hidden_states: what enters the lowest layer with an adapter, `(N, P + R - 1, H)`, without the last
            token; None where every pass runs all layers. Not saved: it is computed again from the tokens.
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
        """Real tokens per row, prompt and response, `(N,)` int64."""
        return self.attention_mask.sum(-1)

    def micro_batch(self, rows: Tensor) -> dict[str, Any]:
        """Return the micro-batch of these rows, left-padded; per-token values are 0 where a row has no response token.

        It is a dict of tensors and the list `seq_lens`, because `Trainer` moves dicts to the device and cannot rebuild
        a NamedTuple.
        """
        # `action_mask` can be one token shorter than the attended response (stop token left out), never longer.
        layout = LeftPaddedLayout.from_attention_mask(self.attention_mask[rows], self.response_length)
        states = self.frozen_hidden_states
        per_token = ("action_mask", "logprobs", "ref_logprobs", "values", "value_baselines", "advantages", "returns")
        return {
            "input_ids": layout.align_tokens(self.input_ids[rows]),
            "attention_mask": layout.align_tokens(self.attention_mask[rows]),
            **{name: layout.align_responses(getattr(self, name)[rows]) for name in per_token},
            "response_mask": layout.response_mask,
            "seq_lens": layout.seq_lens,
            **({} if states is None else {"frozen_hidden_states": layout.align_states(states[rows])}),
        }

    def save(self, path: str | Path) -> None:
        """Write the tensors as safetensors."""
        save_file({name: getattr(self, name).contiguous().cpu() for name in self._saved()}, path)

    @classmethod
    def load(cls, path: str | Path) -> Rollout:
        """Read what `save` wrote."""
        with reraise_as_corrupt_file(path):
            tensors = load_file(path)
        missing = [name for name in cls._saved() if name not in tensors]
        if missing:
            raise ValueError(f"{path} is not a rollout of this version of ppo_plus: it lacks {missing}.")
        return cls(**{name: tensors[name] for name in cls._saved()})

    @classmethod
    def _saved(cls) -> list[str]:
        return [f.name for f in fields(cls) if f.name != "frozen_hidden_states"]


@dataclass(frozen=True)
class LeftPaddedLayout:
    """How rows stand in a forward pass: whole sequences moved to the right, so that all padding is on the left.

    A pass is as wide as its longest sequence. (Prompts padded on one side and responses on the other would make it as
    wide as the longest prompt and the longest response together.) Its last columns are those of the longest response;
    where a row's own response is shorter they hold the end of its prompt.

    Attributes:
        response_length: R of the rollout, in tokens.
        lengths: attended response tokens by row, `(B, 1)` int64.
        width: columns of the pass.
        max_response_len: how many of them are the response's.
        seq_lens: of each row, its tokens and how many of them are its response.
    """

    response_length: int
    lengths: Tensor
    width: int
    max_response_len: int
    seq_lens: SeqLens

    @classmethod
    def from_attention_mask(cls, attention_mask: Tensor, response_length: int) -> LeftPaddedLayout:
        """For rows whose prompts are padded on the left and responses on the right, `(B, P + R)`."""
        lengths = attention_mask[:, -response_length:].sum(1, keepdim=True)
        sizes = list(zip(attention_mask.sum(1).tolist(), lengths.flatten().tolist(), strict=True))
        return cls(response_length, lengths, max(s for s, _ in sizes), max(1, *(r for _, r in sizes)), sizes)

    @property
    def response_mask(self) -> Tensor:
        """Which of the response's columns are of a row's own response, `(B, max_response_len)` bool."""
        return torch.arange(self.max_response_len) >= self.max_response_len - self.lengths

    def align_tokens(self, columns: Tensor) -> Tensor:
        """Of `(B, P + R)` those of the pass, `(B, width)`."""
        return roll_rows(columns, self.response_length - self.lengths)[:, -self.width :]

    def align_responses(self, columns: Tensor) -> Tensor:
        """Of `(B, R)` those of the pass, `(B, max_response_len)`, 0 where a row has no response token."""
        return roll_rows(columns, self.response_length - self.lengths)[:, -self.max_response_len :].masked_fill(
            ~self.response_mask, 0
        )

    def align_states(self, columns: Tensor) -> Tensor:
        """Of hidden states without those of the last token, `(B, P + R - 1, H)`, those of the pass."""
        moved = roll_rows(columns, self.response_length - self.lengths)
        return moved[:, columns.shape[1] + 1 - self.width :]

    def restore_responses(self, found: Tensor) -> Tensor:
        """Move `(B, max_response_len)` of a pass to its place in the rollout, `(B, R)`; 0 behind a response."""
        columns = nn.functional.pad(found, (self.response_length - self.max_response_len, 0))
        behind = torch.arange(self.response_length) >= self.lengths
        return roll_rows(columns, self.lengths - self.response_length).masked_fill(behind, 0)

    def restore_states(self, found: Tensor, length: int) -> Tensor:
        """Hidden states of a pass, `(B, width - 1, H)`, where they belong among `length` columns."""
        columns = nn.functional.pad(found, (0, 0, length + 1 - self.width, 0))
        return roll_rows(columns, self.lengths - self.response_length)


def roll_rows(columns: Tensor, by: Tensor) -> Tensor:
    """Each row of `(B, C, ...)` moved to the right by its entry of `(B, 1)`; what falls off comes in on the left."""
    width = columns.shape[1]
    return columns[torch.arange(len(columns))[:, None], (torch.arange(width) - by) % width]

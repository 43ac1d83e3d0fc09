"""Log-probabilities and entropy of tokens, from logits that are all in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of the token that follows, under the distribution that sampling drew from.

    Args:
        logits: scores of the next token, `(B, R, V)`, any floating dtype.
        targets: the tokens that were sampled, `(B, R)` int64.
        temperature: the sampling temperature, which divides the logits; above 0.

    Returns:
        Log-probabilities, `(B, R)` float32, nats.
    """
    return logprobs_and_entropy(logits, targets, temperature, with_entropy=False)[0]


def logprobs_and_entropy(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, with_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`token_logprobs` and `entropy` from one softmax; `None` for the entropy where it is not asked for."""
    logprobs = scaled_log_softmax(logits, temperature)
    chosen = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen, entropy_from_logprobs(logprobs) if with_entropy else None


def scaled_log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the whole vocabulary, `(..., V)` float32, nats."""
    scaled = logits.float()
    if temperature != 1:
        # In place where a copy was made just now: these are the largest tensors there are.
        scaled = scaled / temperature if scaled is logits else scaled.div_(temperature)
    return F.log_softmax(scaled, dim=-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of the next-token distribution, `H = -sum_v p_v log p_v` (`S` in Schulman et al. 2017, eq. 9).

    Args:
        logits: scores of the next token, `(B, R, V)`, any floating dtype; `-inf` means impossible.
        temperature: the sampling temperature, which divides the logits; above 0.

    Returns:
        Entropy per position, `(B, R)` float32, nats, between 0 and `log V`.
    """
    return entropy_from_logprobs(scaled_log_softmax(logits, temperature))


def entropy_from_logprobs(logprobs: Tensor) -> Tensor:
    """`entropy` where the log-probabilities `(..., V)` are known already."""
    # The limit of p log p at p = 0 is 0; computed, it is 0 * -inf.
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)

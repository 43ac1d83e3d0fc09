"""Log-probabilities and entropy of tokens, from full logits `(B, R, V)`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute log-probabilities of the target tokens under the temperature-scaled sampling distribution.

    Args:
        logits: logits of the next token, `(B, R, V)`, any floating dtype.
        targets: the sampled tokens, `(B, R)` int64.
        temperature: the sampling temperature, which divides the logits; above 0.

    Returns:
        Log-probabilities, `(B, R)` float32, nats.
    """
    return logprobs_and_entropy(logits, targets, temperature, with_entropy=False)[0]


def logprobs_and_entropy(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, with_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Compute `token_logprobs` and `entropy` from one softmax; the entropy is None without `with_entropy`."""
    logprobs = scaled_log_softmax(logits, temperature)
    chosen = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen, entropy_from_logprobs(logprobs) if with_entropy else None


def scaled_log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute log-probabilities of the whole vocabulary, `(..., V)` float32, nats."""
    scaled = logits.float()
    if temperature != 1:
        # In place where `float()` made a copy: these are the largest tensors of a forward pass.
        scaled = scaled / temperature if scaled is logits else scaled.div_(temperature)
    return F.log_softmax(scaled, dim=-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the entropy of the next-token distribution, `H = -sum_v p_v log p_v`.

    This is `S` in Schulman et al. 2017, eq. 9.

    Args:
        logits: logits of the next token, `(B, R, V)`, any floating dtype; `-inf` excludes a token.
        temperature: the sampling temperature, which divides the logits; above 0.

    Returns:
        Entropy per position, `(B, R)` float32, nats, between 0 and `log V`.
    """
    return entropy_from_logprobs(scaled_log_softmax(logits, temperature))


def entropy_from_logprobs(logprobs: Tensor) -> Tensor:
    """Compute `entropy` from log-probabilities `(..., V)`, nats; returns `(...)`."""
    # The limit of p log p at p = 0 is 0; computed, it is 0 * -inf.
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)

"""Log-probabilities, entropies and sampled tokens from hidden states, with logits for one chunk of tokens at a time.

Notation: B rows, R response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..algo.logprobs import entropy_from_logprobs, logprobs_and_entropy, scaled_log_softmax
from ..utils.devices import float64_device

# Elements of the logits of one chunk, and of a slice of it in fp32; see `chunk_elements`.
CHUNK_ELEMENTS, SLICE_ELEMENTS = 2**24, 2**20  # CPU
GPU_CHUNK_ELEMENTS, GPU_SLICE_ELEMENTS = 2**26, 2**24
VOCAB_GROUP = 256  # tokens of a group in sampling

Head = Callable[[Tensor], Tensor]


def logits_function(model: PreTrainedModel) -> Head:
    """Return the model's map from last hidden states `(..., H)` to logits `(..., V)`, with scaling and soft-capping."""
    config = model.config.get_text_config()
    head = cast(nn.Module, model.get_output_embeddings())
    multiplier = getattr(config, "logit_scale", None) or 1.0  # Cohere
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2

    def logits(hidden: Tensor) -> Tensor:
        out = head(hidden) * (multiplier / divisor) if multiplier != divisor else head(hidden)
        return softcap * torch.tanh(out / softcap) if softcap else out

    return logits


def head_is_frozen(model: PreTrainedModel) -> bool:
    """Return whether all parameters of the language-model head are frozen."""
    return not any(p.requires_grad for p in cast(nn.Module, model.get_output_embeddings()).parameters())


class _ChunkedLogProb(torch.autograd.Function):
    """Log-probabilities and entropies of one chunk of tokens under a frozen head.

    Each output depends on one token's hidden state, so its gradient is a vector of H numbers, computed in the forward
    pass while the logits exist: they are neither kept nor recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Head, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            states = hidden.detach().requires_grad_()
            logits = head(states)
        count = 2 if with_entropy else 1
        outputs = [hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(count)]
        # The first overwrites the logits, slice by slice after they are read: autograd does not save a head's output.
        logit_grads = [logits.detach(), *(torch.empty_like(logits) for _ in range(count - 1))]
        for rows in row_slices(logits):
            logprobs = scaled_log_softmax(logits[rows].detach(), temperature)
            outputs[0][rows] = logprobs.gather(-1, targets[rows, None]).squeeze(-1)
            if with_entropy:
                outputs[1][rows] = entropy_from_logprobs(logprobs)
            parts = negative_logit_grads(logprobs, targets[rows], *(output[rows] for output in outputs[1:]))
            for logit_grad, part in zip(logit_grads, parts, strict=True):
                logit_grad[rows] = part
        gradients = [
            torch.autograd.grad(logits, states, logit_grad, retain_graph=True)[0].div_(-temperature)
            for logit_grad in logit_grads
        ]
        ctx.save_for_backward(*gradients)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = [saved * grad[:, None].to(saved.dtype) for saved, grad in zip(ctx.saved_tensors, grads, strict=True)]
        return sum(parts[1:], parts[0]), None, None, None, None


def chunk_elements(device: torch.device, frozen_head: bool) -> int:
    """Choose the number of vocabulary logits that exist at a time.

    Each chunk reads the whole matrix of the head. With n tokens, that is about n operations per byte in half precision,
    and a GPU needs some hundreds to be compute-bound (A100: 312 TFLOPS at 2.0 TB/s, 156; H100: 989 at 3.35, 295). 2^26
    logits are 441 tokens of a vocabulary of 152,000 and 2,048 of 32,000, and take 128 MB in half precision. In fp32
    they are processed in slices of 2^24: 64 MB for each of up to three temporary tensors, and still thousands of blocks
    for a kernel. A trained head has whole chunks in fp32, so its chunks are as large as a slice.

    A CPU is as fast with chunks of 2^24 logits (32 MB), and slices of 2^20 (4 MB) stay in its caches from one operation
    to the next.

    Args:
        device: device of the hidden states.
        frozen_head: whether all parameters of the head are frozen.
    """
    if device.type == "cpu":
        return CHUNK_ELEMENTS
    return GPU_CHUNK_ELEMENTS if frozen_head else GPU_SLICE_ELEMENTS


def row_slices(logits: Tensor) -> list[slice]:
    """Split the rows of `(n, V)` logits into the slices that are processed in fp32."""
    elements = SLICE_ELEMENTS if logits.device.type == "cpu" else GPU_SLICE_ELEMENTS
    size = max(1, elements // logits.shape[-1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def negative_logit_grads(logprobs: Tensor, targets: Tensor, entropy: Tensor | None = None) -> list[Tensor]:
    """Return the negative gradients of the chosen log-probability and the entropy by logits, at temperature 1.

    `-d log p_c / d z_v = p_v - [v = c]` and `-d H / d z_v = p_v (log p_v + H)`. These tensors are the largest of all,
    so they overwrite each other, and sign and temperature are applied to the smaller gradients of hidden states.

    Args:
        logprobs: of the whole vocabulary, `(n, V)` float32; overwritten.
        targets: c, `(n,)` int64.
        entropy: H, `(n,)` float32, nats.
    """
    entropy_grads = []
    if entropy is None:
        probs = logprobs.exp_()
    else:
        probs = logprobs.exp()
        entropy_grads.append(logprobs.add_(entropy[:, None]).masked_fill_(probs == 0, 0.0).mul_(probs))
    minus_one = probs.new_full((len(targets), 1), -1.0)
    return [probs.scatter_add_(-1, targets[:, None], minus_one), *entropy_grads]


def chunked_logprobs(
    head: Head, hidden: Tensor, targets: Tensor, temperature: float, with_entropy: bool, *,
    frozen_head: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute log-probabilities of `targets`, with vocabulary logits for one chunk of tokens at a time.

    Neither pass ever holds `(B, R, V)`: with a frozen head, gradients are computed in the forward pass; with a trained
    one, the backward pass recomputes each chunk's logits.

    Args:
        head: hidden states to logits.
        hidden: `(B, R, H)`.
        targets: `(B, R)` int64.
        temperature: divides the logits.
        with_entropy: also return the entropy, `(B, R)` float32, nats.
        frozen_head: whether all parameters of `head` are frozen.
    """

    def score(states: Tensor, tokens: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        return logprobs_and_entropy(head(states), tokens, temperature, with_entropy)

    def chunk(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        if (not states.requires_grad and frozen_head) or not torch.is_grad_enabled():
            logits = head(states)
            slices = row_slices(logits)
            return cat_outputs(
                [logprobs_and_entropy(logits[rows], tokens[rows], temperature, with_entropy) for rows in slices]
            )
        if frozen_head:
            outputs = _ChunkedLogProb.apply(states, tokens, head, temperature, with_entropy)
            return outputs if with_entropy else (*outputs, None)
        return checkpoint(score, states, tokens, with_entropy, use_reentrant=False)

    flat_hidden, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    max_size = max(16, chunk_elements(hidden.device, frozen_head) // head(flat_hidden[:1]).shape[-1])
    size = -(-len(flat_hidden) // -(-len(flat_hidden) // max_size))  # chunks of equal size
    pieces = [chunk(h, t) for h, t in zip(flat_hidden.split(size), flat_targets.split(size), strict=True)]
    logprobs, entropy = cat_outputs(pieces)
    return logprobs.view(targets.shape), None if entropy is None else entropy.view(targets.shape)


def cat_outputs(pieces: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Concatenate the log-probabilities of all pieces, and their entropies if they have some."""
    logprobs, entropies = zip(*pieces, strict=True)
    return torch.cat(logprobs), None if entropies[0] is None else torch.cat(entropies)


def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sample by the inverse CDF: the token at which the cumulative probability exceeds a uniform number.

    First a group of tokens is chosen, then a token in it, so the double-precision sums have a few hundred terms per
    row instead of the vocabulary.

    Args:
        logits: `(B, V)` float32.
        uniforms: uniform in [0, 1), `(B,)` float64, on `float64_device` of the logits.

    Returns:
        token ids, `(B,)` int64.
    """
    probs, missing = logits.softmax(-1), -logits.shape[-1] % VOCAB_GROUP
    groups = (nn.functional.pad(probs, (0, missing)) if missing else probs).unflatten(-1, (-1, VOCAB_GROUP))
    group, share = _inverse_cdf(groups.sum(-1).to(uniforms.device), uniforms)
    rows = torch.arange(len(probs), device=probs.device)
    weights = groups[rows, group.to(probs.device)].to(uniforms.device)
    token = group * VOCAB_GROUP + _inverse_cdf(weights, share)[0]
    return token.clamp(max=logits.shape[-1] - 1).to(logits.device)


def top_p_filter(logits: Tensor, top_p: float) -> Tensor:
    """Keep the logits `(B, V)` of the fewest tokens with `top_p` of the probability; the others become -inf.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    """
    ascending, tokens = logits.sort(-1)
    sums = _cumsum64(ascending.softmax(-1).to(float64_device(logits.device)))
    removed = (sums <= 1 - top_p).to(logits.device)
    removed[:, -1] = False
    return logits.masked_fill(removed.scatter(-1, tokens, removed), -torch.inf)


def _cumsum64(weights: Tensor) -> Tensor:
    """Compute the cumulative sums of each row `(B, n)`, float64."""
    if not torch.are_deterministic_algorithms_enabled():
        return weights.cumsum(-1, dtype=torch.float64)
    # CUDA has a deterministic cumulative sum of integers only, so weights become multiples of 2^-40 of the largest.
    unit = weights.amax(-1, keepdim=True).double() * 2.0**-40
    return (weights / unit).round().long().cumsum(-1) * unit


def _inverse_cdf(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index at which the cumulative share of weights `(B, n)` exceeds u, and u's position in that weight."""
    sums = _cumsum64(weights)
    # If u is just under 1, rounding must not raise the level to the total, which no cumulative sum exceeds.
    level = torch.minimum(u * sums[:, -1], sums[:, -1].nextafter(sums.new_zeros(())))[:, None]
    index = torch.searchsorted(sums, level, right=True).clamp(max=sums.shape[-1] - 1)  # past the end if all are NaN
    weight = weights.gather(-1, index).double()
    return index.squeeze(-1), ((level - sums.gather(-1, index) + weight) / weight).squeeze(-1).clamp(0.0, 1.0)

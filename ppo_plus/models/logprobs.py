"""From hidden states to tokens and their log-probabilities, with vocabulary logits for one chunk of tokens at a time.

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

# Numbers of the logits of one chunk, and those of them that are in fp32 at a time; `chunk_elements` says why.
CHUNK_ELEMENTS, SLICE_ELEMENTS = 2**24, 2**20  # CPU
GPU_CHUNK_ELEMENTS, GPU_SLICE_ELEMENTS = 2**26, 2**24
# Tokens of a group in sampling.
VOCAB_GROUP = 256

Head = Callable[[Tensor], Tensor]


def logits_function(model: PreTrainedModel) -> Head:
    """The model's map from last hidden states `(..., H)` to logits `(..., V)`, scaling and soft-capping included."""
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
    """Whether nothing in the map from hidden states to logits is trained."""
    return not any(p.requires_grad for p in cast(nn.Module, model.get_output_embeddings()).parameters())


class _ChunkedLogProb(torch.autograd.Function):
    """Log-probabilities and entropies of one chunk of tokens under a frozen head.

    Each number depends on one token's hidden state, so its gradient is a vector of H numbers that needs nothing from
    the layers above: it is computed while the logits are there, and they are neither kept nor computed a second time.
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
        # Written over the logits, where each group of rows was read before: autograd keeps nothing of a head's output.
        slopes = [logits.detach(), *(torch.empty_like(logits) for _ in range(count - 1))]
        for rows in row_slices(logits):
            logprobs = scaled_log_softmax(logits[rows].detach(), temperature)
            outputs[0][rows] = logprobs.gather(-1, targets[rows, None]).squeeze(-1)
            if with_entropy:
                outputs[1][rows] = entropy_from_logprobs(logprobs)
            falls = negative_logit_grads(logprobs, targets[rows], *(output[rows] for output in outputs[1:]))
            for slope, fall in zip(slopes, falls, strict=True):
                slope[rows] = fall
        gradients = [
            torch.autograd.grad(logits, states, slope, retain_graph=True)[0].div_(-temperature) for slope in slopes
        ]
        ctx.save_for_backward(*gradients)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        parts = [g * up[:, None].to(g.dtype) for g, up in zip(ctx.saved_tensors, upstream, strict=True)]
        return sum(parts[1:], parts[0]), None, None, None, None


def chunk_elements(device: torch.device, frozen_head: bool) -> int:
    """Choose how many numbers of the vocabulary logits exist at a time, by the device and by what is trained.

    Each chunk reads the whole matrix of the head. With n tokens, that is about n operations for each byte in half
    precision, and a GPU is only busy from some hundreds on (A100: 312 TFLOPS at 2.0 TB/s, 156; H100: 989 at 3.35, 295).
    2^26 numbers are 441 tokens of a vocabulary of 152,000 and 2,048 of 32,000, and take 128 MB in half precision.
    What is computed of them in fp32 goes by slices of 2^24 numbers: 64 MB for each temporary tensor, of which
    there are up to three at a time, and still thousands of blocks for a kernel. A head that is trained has its chunks
    whole in fp32, forward and backward, so these are as large as a slice.

    A CPU computes as fast by chunks of 2^24 numbers (32 MB), and slices of 2^20 numbers (4 MB) stay in its caches from
    one operation to the next.

    Args:
        device: of the hidden states.
        frozen_head: whether nothing in the head is trained.
    """
    if device.type == "cpu":
        return CHUNK_ELEMENTS
    return GPU_CHUNK_ELEMENTS if frozen_head else GPU_SLICE_ELEMENTS


def row_slices(logits: Tensor) -> list[slice]:
    """Cut the rows of `(n, V)` logits into the groups that are worked on in fp32."""
    elements = SLICE_ELEMENTS if logits.device.type == "cpu" else GPU_SLICE_ELEMENTS
    size = max(1, elements // logits.shape[-1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def negative_logit_grads(logprobs: Tensor, targets: Tensor, entropy: Tensor | None = None) -> list[Tensor]:
    """How the chosen log-probability, and the entropy if it is given, fall with each logit at temperature 1.

    `-d log p_c / d z_v = p_v - [v = c]` and `-d H / d z_v = p_v (log p_v + H)`. These are the largest tensors there
    are, so they are written over each other, and sign and temperature are left to the gradients they lead to.

    Args:
        logprobs: of the whole vocabulary, `(n, V)` float32; overwritten.
        targets: c, `(n,)` int64.
        entropy: H, `(n,)` float32, nats.
    """
    slopes = []
    if entropy is None:
        probs = logprobs.exp_()
    else:
        probs = logprobs.exp()
        slopes.append(logprobs.add_(entropy[:, None]).masked_fill_(probs == 0, 0.0).mul_(probs))
    minus_one = probs.new_full((len(targets), 1), -1.0)
    return [probs.scatter_add_(-1, targets[:, None], minus_one), *slopes]


def chunked_logprobs(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    with_entropy: bool,
    *,
    frozen_head: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of `targets`, with vocabulary logits for one chunk of tokens at a time.

    Neither pass ever holds `(B, R, V)`: a frozen head gives its gradients in the forward pass, a trained one computes
    each chunk's logits again in the backward pass.

    Args:
        head: hidden states to logits.
        hidden: `(B, R, H)`.
        targets: `(B, R)` int64.
        temperature: divides the logits.
        with_entropy: also return the entropy, `(B, R)` float32, nats.
        frozen_head: nothing in `head` is trained.
    """

    def score(states: Tensor, tokens: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        return logprobs_and_entropy(head(states), tokens, temperature, with_entropy)

    def chunk(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        if (not states.requires_grad and frozen_head) or not torch.is_grad_enabled():
            logits = head(states)
            groups = [
                logprobs_and_entropy(logits[rows], tokens[rows], temperature, with_entropy)
                for rows in row_slices(logits)
            ]
            return cat_outputs(groups)
        if frozen_head:
            outputs = _ChunkedLogProb.apply(states, tokens, head, temperature, with_entropy)
            return outputs if with_entropy else (*outputs, None)
        return checkpoint(score, states, tokens, with_entropy, use_reentrant=False)

    flat_hidden, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    most = max(16, chunk_elements(hidden.device, frozen_head) // head(flat_hidden[:1]).shape[-1])
    size = -(-len(flat_hidden) // -(-len(flat_hidden) // most))  # chunks of equal size
    pieces = [chunk(h, t) for h, t in zip(flat_hidden.split(size), flat_targets.split(size), strict=True)]
    logprobs, entropy = cat_outputs(pieces)
    return logprobs.view(targets.shape), None if entropy is None else entropy.view(targets.shape)


def cat_outputs(pieces: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of all pieces, and entropies if they have them."""
    logprobs, entropies = zip(*pieces, strict=True)
    return torch.cat(logprobs), None if entropies[0] is None else torch.cat(entropies)


def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling: the token at which the cumulative probability passes the noise.

    The group of tokens first, then the token in it: what is summed up in double precision is a few hundred numbers a
    row, and not the vocabulary.

    Args:
        logits: `(B, V)` float32.
        noise: uniform in [0, 1), `(B,)` float64, on `float64_device` of the logits.

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
    """Logits `(B, V)` of the fewest tokens that `top_p` of the probability falls to, -inf for the others.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    """
    ascending, tokens = logits.sort(-1)
    sums = _cumsum64(ascending.softmax(-1).to(float64_device(logits.device)))
    removed = (sums <= 1 - top_p).to(logits.device)
    removed[:, -1] = False
    return logits.masked_fill(removed.scatter(-1, tokens, removed), -torch.inf)


def _cumsum64(weights: Tensor) -> Tensor:
    """Of each row `(B, n)`, from its first weight on, float64."""
    if not torch.are_deterministic_algorithms_enabled():
        return weights.cumsum(-1, dtype=torch.float64)
    # CUDA has no deterministic sum of fractions, but one of whole numbers: 2^40 of them for the largest weight.
    unit = weights.amax(-1, keepdim=True).double() * 2.0**-40
    return (weights / unit).round().long().cumsum(-1) * unit


def _inverse_cdf(weights: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum of weights `(B, n)` passes this share of their total, and the share of the weight there."""
    sums = _cumsum64(weights)
    # Rounding must not carry a share of just under 1 to the total, behind which nothing is left.
    level = torch.minimum(share * sums[:, -1], sums[:, -1].nextafter(sums.new_zeros(())))[:, None]
    index = torch.searchsorted(sums, level, right=True).clamp(max=sums.shape[-1] - 1)  # past the end where all is NaN
    weight = weights.gather(-1, index).double()
    return index.squeeze(-1), ((level - sums.gather(-1, index) + weight) / weight).squeeze(-1).clamp(0.0, 1.0)

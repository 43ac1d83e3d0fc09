"""Attention as plain matrix products, for short sequences in half precision on CPUs.

There the fused kernel takes twice as long as the products it consists of. For key and value heads that several query
heads share (Ainslie et al. 2023, grouped-query attention), the queries of a group are stacked into one product, so keys
and values are not repeated.

Measured (benchmarks/kernel_speed.py, bf16, a CPU with AVX512): without it, a pass over rows of 112 tokens takes 1.19
times the time to learn, 1.03 to score and 1.14 to decode; with prompts of 256 tokens, 1.15 to learn and 1.05 to score.
Where prompts of 512 tokens are read once for 4 responses (3 layers), `sdpa` takes 1.14 times the time to learn.
It keeps the weights, so learning takes 1.07 times the activations of `sdpa`, with prompts of 256 tokens 1.22 times.
GPUs use `sdpa`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from .prompt_cache import ATTRIBUTE, attend_to_prompts

SDPA, EAGER_GQA, PACKED = "sdpa", "ppo_plus_plain", "ppo_plus_packed"
EAGER, PACKED_EAGER = "eager", "ppo_plus_packed_eager"
SHORT_SEQUENCE = 384  # keys per query
CAUSAL_BLOCK = 128  # queries


def eager_gqa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of `sdpa` as matrix products.

    PyTorch sums the softmax in fp32 whatever its dtype, so an fp32 copy of the weights would only take time and memory.

    Args:
        module: the attention layer; not read.
        query: `(B, heads, Q, D)`.
        key: `(B, key heads, K, D)`; the heads are a multiple of the key heads.
        value: `(B, key heads, K, D')`.
        attention_mask: added to the scores, `(B, 1, Q, K)`.
        dropout: probability with which weights are dropped.
        scaling: factor of the scores; `1 / sqrt(D)` by default.
        kwargs: with `position_bias` or `cache`, `sdpa` computes the attention.

    Returns:
        `(B, Q, heads, D')`, and None for the attention weights, as `sdpa`.
    """
    if (prompts := getattr(key, ATTRIBUTE, None)) is not None:
        return attend_to_prompts(query, key, value, cast(Tensor, attention_mask), scaling, prompts), None
    if attention_mask is None or any(kwargs.get(name) is not None for name in ("position_bias", "cache")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    (rows, heads, length, size), key_heads = query.shape, key.shape[1]
    scaling = size**-0.5 if scaling is None else scaling
    queries = query.reshape(rows, key_heads, heads // key_heads * length, size)
    scores = (queries @ key.transpose(2, 3)).view(rows, heads, length, -1)
    weights = torch.add(attention_mask, scores, alpha=scaling).softmax(-1).to(query.dtype)
    if dropout > 0:
        weights = nn.functional.dropout(weights, dropout)
    attn_output = weights.view(rows, key_heads, -1, key.shape[2]) @ value
    return attn_output.view(rows, heads, length, -1).transpose(1, 2).contiguous(), None


def mean_causal_keys(length: int) -> int:
    """Return for how many keys `causal_gqa_attention` computes weights, in the mean of its queries."""
    blocks = -(-length // CAUSAL_BLOCK)
    return sum(min(length, (block + 1) * CAUSAL_BLOCK) for block in range(blocks)) // blocks


def causal_gqa_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute causal attention by blocks of queries, without products for the keys after a block.

    Arguments are those of `eager_gqa_attention`, with as many keys as queries and without a mask.
    """
    outputs = []
    for start in range(0, query.shape[2], CAUSAL_BLOCK):
        queries = query[:, :, start : start + CAUSAL_BLOCK]
        end = start + queries.shape[2]
        later = query.new_full((1, 1, end - start, end), torch.finfo(query.dtype).min).triu(start + 1)
        outputs.append(eager_gqa_attention(module, queries, key[:, :, :end], value[:, :, :end], later, **kwargs)[0])
    return torch.cat(outputs, 1), None


AttentionInterface.register(EAGER_GQA, eager_gqa_attention)
AttentionMaskInterface.register(EAGER_GQA, eager_mask)


def prefer_eager(device: torch.device, dtype: torch.dtype, queries: int, keys: int) -> bool:
    """Return whether plain products are faster than `sdpa`.

    Args:
        device: device of the model.
        dtype: dtype of its weights.
        queries: number of input tokens per row.
        keys: largest number of tokens that one of them attends to.
    """
    half = dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    return device.type == "cpu" and half and (queries == 1 or keys <= SHORT_SEQUENCE)


def select_attention(backbone: PreTrainedModel, queries: int, keys: int, packed: bool = False) -> None:
    """Select the fastest attention for the next pass over a model that was loaded with `sdpa`.

    The choice outlasts the pass, so that activation checkpointing recomputes with the same attention.

    Args:
        backbone: the model that is called next.
        queries: number of input tokens per row.
        keys: largest number of tokens that one of them attends to.
        packed: whether the real tokens of all rows are packed into one row.
    """
    config = backbone.config.get_text_config()
    eager = prefer_eager(backbone.device, backbone.dtype, queries, keys)
    implementation = PACKED if packed else EAGER_GQA if eager else SDPA
    if config._attn_implementation != implementation:
        config._attn_implementation = implementation

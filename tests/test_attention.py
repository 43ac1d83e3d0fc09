"""Plain products in place of the fused attention kernel: the same attention, and only where they are faster."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import lora, make_model
from peft import get_peft_model
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ppo_plus.kernels import cpu_attention as attention
from ppo_plus.kernels.cpu_attention import EAGER_GQA, eager_gqa_attention, select_attention
from ppo_plus.models.actor_critic import ActorCritic
from ppo_plus.models.value_head import ValueHead


def pieces(key_heads: int, heads: int = 6, queries: int = 3, keys: int = 5, dtype=torch.float64):
    """Random queries, keys, values, and a causal mask whose first row also ignores its first two (padded) keys."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, queries, 4), (2, key_heads, keys, 4), (2, key_heads, keys, 4))
    tensors = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    seen = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    seen = seen.expand(2, 1, queries, keys).clone()
    seen[0, :, :, :2] = False
    return tensors, torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min), seen


class Layer(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def slow_attention(query, key, value, seen, scaling):
    """One query of one head of one row at a time."""
    out = torch.zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3], dtype=query.dtype)
    group = query.shape[1] // key.shape[1]
    for row, head, q in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        visible = seen[row, 0, q].nonzero().squeeze(-1)
        scores = torch.stack([query[row, head, q] @ key[row, head // group, k] * scaling for k in visible])
        weights = scores.float().exp() / scores.float().exp().sum()
        out[row, q, head] = sum(w * value[row, head // group, k] for w, k in zip(weights, visible, strict=True))
    return out


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("queries", [1, 3])
def test_it_is_attention(key_heads, queries):
    (query, key, value), mask, seen = pieces(key_heads, queries=queries)
    found, weights = eager_gqa_attention(Layer(6 // key_heads), query, key, value, mask, scaling=0.3)
    assert weights is None and found.shape == (2, queries, 6, 4)
    torch.testing.assert_close(found, slow_attention(query, key, value, seen, 0.3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_numbers_and_gradients_are_those_of_sdpa(key_heads, scaling):
    results = []
    for function in (eager_gqa_attention, sdpa_attention_forward):
        tensors, mask, _ = pieces(key_heads, dtype=torch.float32)
        out, _ = function(Layer(6 // key_heads), *tensors, mask, scaling=scaling)
        out.square().sum().backward()
        results.append([out.detach(), *(t.grad for t in tensors)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_bias_on_the_scores_is_left_to_sdpa():
    (query, key, value), mask, _ = pieces(2, dtype=torch.float32)
    bias = torch.randn(2, 6, 3, 5)
    found, _ = eager_gqa_attention(Layer(3), query, key, value, mask, position_bias=bias)
    without, _ = eager_gqa_attention(Layer(3), query, key, value, mask)
    expected, _ = sdpa_attention_forward(Layer(3), query, key, value, mask, position_bias=bias)
    assert torch.equal(found, expected) and not torch.allclose(found, without, atol=1e-2)


def test_without_a_mask_it_is_causal():
    (query, key, value), mask, _ = pieces(2, queries=5, dtype=torch.float32)
    mask[0] = mask[1]  # no padding
    masked, _ = eager_gqa_attention(Layer(3), query, key, value, mask)
    found, _ = eager_gqa_attention(Layer(3), query, key, value, None)
    torch.testing.assert_close(found, masked, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 4, 5, 8])
def test_blocks_of_queries_give_causal_attention(monkeypatch, length):
    monkeypatch.setattr(attention, "CAUSAL_BLOCK", 4)
    results, widths, real = [], [], attention.eager_gqa_attention
    monkeypatch.setattr(
        attention,
        "eager_gqa_attention",
        lambda *args, **kwargs: widths.append(args[2].shape[2]) or real(*args, **kwargs),
    )
    for function in (attention.causal_gqa_attention, sdpa_attention_forward):
        tensors, _, _ = pieces(2, queries=length, keys=length, dtype=torch.float32)
        out, _ = function(Layer(3), *tensors, None, scaling=0.5)
        out.square().sum().backward()
        results.append([out.detach(), *(t.grad for t in tensors)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert widths == {1: [1], 4: [4], 5: [4, 5], 8: [4, 8]}[length]


def test_the_mean_number_of_keys_decides_on_causal_rows(monkeypatch):
    """By hand, with blocks of 128 queries: 128, then 256 keys for the second block, and so on."""
    lengths = (1, 128, 129, 256, 512, 640, 641)
    assert [attention.mean_causal_keys(n) for n in lengths] == [1, 128, 128, 192, 320, 384, 426]
    device = torch.device("cpu")
    chosen = [attention.prefer_eager(device, torch.bfloat16, n, attention.mean_causal_keys(n)) for n in lengths]
    assert chosen == [True] * 6 + [False]


def test_dropout_drops_weights_and_keeps_their_mean():
    (query, key, value), mask, _ = pieces(6)
    torch.manual_seed(0)
    whole, _ = eager_gqa_attention(Layer(1), query, key, value, mask)
    dropped = torch.stack([eager_gqa_attention(Layer(1), query, key, value, mask, dropout=0.5)[0] for _ in range(3000)])
    assert not torch.allclose(dropped[0], whole)
    standard_error = dropped.std(0) / len(dropped) ** 0.5
    assert ((dropped.mean(0) - whole).abs() < 5 * standard_error).all()


def actor_critic(dtype, implementation="sdpa"):
    model = make_model().to(dtype)
    model.set_attn_implementation(implementation)
    policy = get_peft_model(model, lora())
    return ActorCritic(policy, ValueHead(policy.config.hidden_size)).eval()


ROWS = torch.randint(4, 40, (3, 12), generator=torch.Generator().manual_seed(0)), torch.ones(3, 12, dtype=torch.long)


@torch.no_grad()
def test_on_a_cpu_in_half_precision_short_sequences_take_plain_products_and_the_numbers_stay():
    actor = actor_critic(torch.bfloat16)
    ROWS[1][0, :3] = 0  # padded on the left
    plain = actor(*ROWS, 6).logprobs
    assert actor.config._attn_implementation == EAGER_GQA
    actor.runner.sdpa_models.clear()
    actor.config._attn_implementation = "sdpa"
    fused = actor(*ROWS, 6).logprobs
    assert not torch.equal(plain, fused) and (plain - fused).abs().max() < 0.1
    exact = actor_critic(torch.float32)
    exact(*ROWS, 6)
    assert exact.config._attn_implementation == "sdpa"


def test_only_short_sequences_and_single_queries_do():
    backbone = make_model().to(torch.bfloat16).model
    chosen = []
    for queries, keys in ((384, 384), (385, 385), (1, 5000), (2, 5000)):
        select_attention(backbone, queries, keys)
        chosen.append(backbone.config._attn_implementation)
    assert chosen == [EAGER_GQA, "sdpa", EAGER_GQA, "sdpa"]


@torch.no_grad()
def test_an_attention_that_the_user_chose_stays(monkeypatch):
    monkeypatch.setattr(attention, "SHORT_SEQUENCE", 8)
    actor = actor_critic(torch.bfloat16, "eager")
    actor(*ROWS, 6)
    assert actor.config._attn_implementation == "eager"


@torch.no_grad()
def test_it_is_not_written_into_the_files_of_a_model(tmp_path):
    actor = actor_critic(torch.bfloat16)
    actor(*ROWS, 6)
    actor.language_model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert EAGER_GQA not in json.dumps(saved)

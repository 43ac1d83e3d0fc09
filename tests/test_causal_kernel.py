"""Packed passes hand sdpa no mask where a layer is causal: the kernel that needs none is the fast one."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from peft import get_peft_model
from test_architectures import build
from test_modeling import adapted
from test_packing import ROWS, actor_critic, lora, numbers, ragged_rows, right_aligned
from torch import nn

from ppo_plus.kernels import packing
from ppo_plus.models.actor_critic import ActorCritic
from ppo_plus.models.score_heads import make_score_head
from ppo_plus.models.value_head import ValueHead


@pytest.fixture
def masks(monkeypatch):
    """Watch what sdpa is given: of each call the mask, and whether it is causal."""
    given, real = [], nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, is_causal=False, **kwargs):
        given.append((attn_mask, is_causal))
        return real(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    return given


EQUAL = ragged_rows(prompts=(5, 3, 6), responses=(4, 6, 3))  # 9 tokens each, padded on both sides


@pytest.mark.parametrize("rows", [EQUAL, ROWS], ids=["equal length", "unequal length"])
@torch.no_grad()
def test_no_mask_is_built_and_the_numbers_stay(masks, rows):
    actor = actor_critic(adapted())
    *inputs, real = right_aligned(rows)
    masks.clear()
    found = numbers(actor, inputs, **real)
    if rows is ROWS:  # those of equal length have no padding once they are right-aligned
        assert actor.config._attn_implementation == packing.PACKED
    assert masks and all(mask is None and causal for mask, causal in masks)
    masks.clear()
    expected = numbers(actor, inputs) * real["response_mask"]
    assert any(mask is not None for mask, _ in masks) == (rows is ROWS)  # negative control: padded rows need one
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_of_equal_length_within_wider_ones_are_packed_without_a_mask(masks):
    """As a reward model's texts may come, padded further than they need to be."""
    policy = adapted()
    policy.add_adapter("reward", lora())
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    actor, head = actor_critic(policy), make_score_head({"weight": weight})
    ids = torch.randint(4, 40, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < 7).long().expand(3, -1)
    masks.clear()
    found = actor.prefix_rewards("reward", head, ids, mask, [7, 7, 7])
    assert masks and all(given is None and causal for given, causal in masks)
    alone = torch.cat([actor.prefix_rewards("reward", head, row[None, :7], mask[:1, :7]) for row in ids])
    torch.testing.assert_close(found[:, :7], alone, rtol=1e-4, atol=1e-5)


def test_gradients_without_a_mask_are_those_with_one(masks, monkeypatch):
    actor, results = actor_critic(adapted()).train(), []
    *inputs, real = right_aligned(ROWS)
    with_mask = packing.sdpa_mask
    for skip in (True, False):
        if not skip:
            monkeypatch.setattr(packing, "sdpa_mask", lambda **kw: with_mask(**{**kw, "allow_is_causal_skip": False}))
        masks.clear()
        out = numbers(actor, inputs, **real)
        (out * torch.arange(out.numel()).view(out.shape).sin()).sum().backward()
        assert all((mask is None) == skip for mask, _ in masks)
        results.append([p.grad.clone() for p in actor.parameters() if p.grad is not None])
        actor.zero_grad()
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_a_sliding_window_keeps_its_mask(masks):
    actor = actor_critic(build("Mistral"))
    *inputs, real = right_aligned(ROWS)
    window = actor.config.sliding_window
    masks.clear()
    found = numbers(actor, inputs, **real)
    assert window < max(tokens for tokens, _ in real["seq_lens"])
    assert any(mask is not None for mask, _ in masks)
    torch.testing.assert_close(found, numbers(actor, inputs) * real["response_mask"], rtol=2e-4, atol=2e-5)


@torch.no_grad()
def test_a_pass_without_padding_builds_no_mask(masks):
    """transformers finds out that there is no padding; only where it is asked for does a padded pass get a mask."""
    policy = get_peft_model(make_model(), lora())
    actor = ActorCritic(policy, ValueHead(32)).eval()
    ids = torch.randint(4, 40, (3, 12), generator=torch.Generator().manual_seed(0))
    for padding in (0, 3):
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        masks.clear()
        actor(ids, mask, 4)
        assert masks and all((given is None) == (padding == 0) for given, _ in masks)

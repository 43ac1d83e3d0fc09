"""How a backbone is called is found out by a trial, whatever its cache is called and whatever its forward swallows."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import make_model
from transformers import DynamicCache

from ppo_plus import ActorCritic, ValueHead
from ppo_plus.models.backbone import CACHE_NAMES, backbone_interface


def renamed(name: str | None, forget: bool = False):
    """A Llama whose backbone takes its cache under this name alone, and swallows what it does not know."""
    model = make_model().eval()
    forward, real = model.model.forward, backbone_interface(make_model()).cache_name

    def swallowing(input_ids, attention_mask=None, position_ids=None, use_cache=False, **kwargs):
        cache = kwargs.get(name)
        if cache is None and attention_mask is not None:  # a step without its past
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
        if cache is not None and forget:
            for layer in cache.layers:
                layer.values.zero_()
        return forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache,
            **{real: cache},
        )  # fmt: skip

    model.model.forward = swallowing
    return model


def actor_of(model) -> ActorCritic:
    return ActorCritic(model, ValueHead(32), ref_model=make_model())


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_cache_is_handed_over_under_the_name_that_is_taken(name):
    model = renamed(name)
    assert backbone_interface(model).cache_name == name
    ids, mask = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.ones(2, 3, dtype=torch.int64)
    noise = torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (
            actor_of(m).eval().sample(ids, mask, noise, stop_ids=[2], pad_token_id=0) for m in (model, make_model())
        )
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.logprobs, expected.logprobs)


def test_a_backbone_that_swallows_its_cache_under_every_name_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM returns no cache"):
        actor_of(renamed(None))


def test_quite_other_numbers_with_the_cache_than_without_are_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM computes other hidden states with its cache"):
        actor_of(renamed(CACHE_NAMES[0], forget=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actor_of(renamed(CACHE_NAMES[0]))


def test_the_trial_leaves_the_model_in_its_mode():
    model = make_model().train()
    backbone_interface(model)
    assert all(module.training for module in model.modules())


def test_the_installed_transformers_takes_one_of_the_names_without_a_deprecation():
    model = make_model().eval()
    name = backbone_interface(model).cache_name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = DynamicCache(config=model.config)
        model.model(input_ids=torch.tensor([[1]]), use_cache=True, **{name: cache})
    assert cache.get_seq_length() == 1

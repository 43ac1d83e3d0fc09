"""Adapters keep all their weights on architectures whose published checkpoints have other names than their modules.

PEFT (0.21) renames the tensors of an adapter as transformers renames those of such checkpoints.
"""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ppo_plus.data.padding import unpad
from ppo_plus.models import adapter_loading, loading
from ppo_plus.models.classifier import load_classifier
from ppo_plus.models.loading import CriticSpec, build_actor_critic, load_adapter_onto, load_policy
from ppo_plus.models.saving import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import architectures

IDS = torch.tensor([architectures.PROMPTS[1]])
LINEAR = {"r": 2, "target_modules": "all-linear"}


def adapted(base, **options):
    """The base with random adapters on all its linear layers."""
    config = LoraConfig(**{**LINEAR, "init_lora_weights": False, **options})
    return get_peft_model(copy.deepcopy(base), config).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def without_copying(monkeypatch) -> None:
    for module in (adapter_loading, loading):
        monkeypatch.setattr(module, "copy_lora_weights", lambda *args: False)


@pytest.mark.parametrize("kind", ["laguna", "inkling2_text"])
def test_a_saved_policy_is_read_back_whole(kind, tmp_path, monkeypatch):
    base = architectures.tiny_model(kind)
    policy = adapted(base)
    policy.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        assert torch.equal(logits(load_adapter_onto(copy.deepcopy(base), tmp_path)), logits(policy))
    resumed = get_peft_model(copy.deepcopy(base), LoraConfig(**LINEAR))
    load_model(resumed, tmp_path)
    assert torch.equal(logits(resumed), logits(policy))

    without_copying(monkeypatch)  # negative control: PEFT by itself leaves out what it renames
    lossy = load_adapter_onto(copy.deepcopy(base), tmp_path)
    assert (logits(lossy) - logits(policy)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="does not fit this model"):
        load_model(get_peft_model(copy.deepcopy(base), LoraConfig(**LINEAR)), tmp_path)


def reward_adapter(kind, folder, **options):
    """A language model's folder, a reward adapter on it, and the scores of two rows by the classifier itself."""
    architectures.tiny_model(kind).save_pretrained(folder)
    torch.manual_seed(4)
    classifier, _ = load_classifier(str(folder), torch.float32)
    classifier.score.weight.data.normal_()
    reward = adapted(classifier, task_type="SEQ_CLS", modules_to_save=["score"], **options)
    reward.save_pretrained(folder / "reward")
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    mask = (ids != 0).long()
    with torch.no_grad():
        expected = torch.stack([reward(input_ids=torch.tensor([row])).logits[0, 0] for row in unpad(ids, mask)])
    return ids, mask, expected


def actor(folder, **options):
    policy = load_policy(str(folder), peft_config=LoraConfig(**{**LINEAR, **options}), frozen_dtype=torch.float32)
    return build_actor_critic(policy, critic=CriticSpec()).eval()


@pytest.mark.parametrize(("kind", "options"), [("laguna", {}), ("longcat_flash", {"exclude_modules": ["classifier"]})])
def test_a_reward_adapter_scores_as_its_classifier(kind, options, tmp_path):
    ids, mask, expected = reward_adapter(kind, tmp_path)
    model = actor(tmp_path, **options)
    head = model.load_reward_adapter("reward_0", tmp_path / "reward")
    with torch.no_grad():
        scores = model.reward_scores("reward_0", head, ids, mask, 0)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


def test_a_copied_module_that_the_actors_adapter_adapts_is_named(tmp_path):
    """PEFT trains a classifier's `classifier` whole, and the router of LongCat's experts has that name."""
    reward_adapter("longcat_flash", tmp_path)
    with pytest.raises(ValueError, match=r"exclude_modules=\['classifier'\] in peft_config"):
        actor(tmp_path).load_reward_adapter("reward_0", tmp_path / "reward")


SHARED = [f"shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")]


@pytest.mark.parametrize(
    ("kind", "targets", "first"),
    [
        ("qwen3_next", SHARED, "model.layers.0.mlp.shared_expert.gate_proj"),
        ("qwen3_next", r".*shared_expert\.(gate|up|down)_proj", "model.layers.0.mlp.shared_expert.gate_proj"),
        ("qwen3_next", "all-linear", "model.layers.0.mlp.shared_expert.gate_proj"),
        ("qwen3_next", ["q_proj"], None),
        ("qwen3_moe", "all-linear", None),  # all of its layers have routed experts, and no shared one
        ("qwen2_moe", SHARED, None),  # which PEFT does not take for others
    ],
)
def test_linear_layers_that_are_named_and_left_out_are_warned_of(kind, targets, first):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy = load_policy(architectures.tiny_model(kind), peft_config=LoraConfig(r=2, target_modules=targets))
    said = [str(w.message) for w in caught if "get no adapter" in str(w.message)]
    assert len(said) == (first is not None)
    assert first is None or f"the first is {first})" in said[0]
    adapted_names = {name.partition(".lora_A")[0] for name, _ in policy.named_parameters() if ".lora_A" in name}
    assert first is None or not any("shared_expert." in name for name in adapted_names)

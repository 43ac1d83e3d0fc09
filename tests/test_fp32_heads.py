"""Scores and values are fp32 numbers, whatever the backbone's dtype and autocast: texts that differ do not tie."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import LETTERS, SIZES, classifier, lora, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from ppo_plus import RewardConfig, RewardTrainer
from ppo_plus.kernels.fp32_heads import apply_head, compute_heads_in_fp32
from ppo_plus.models.actor_critic import ActorCritic
from ppo_plus.models.value_head import ValueHead
from ppo_plus.rewards import Completions
from ppo_plus.rewards.classifiers import ClassifierReward

WORDS = [a + b for a in LETTERS[:20] for b in LETTERS[:20]]
IDS = torch.randint(4, 40, (1000, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
AUTOCAST = pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=["off", "bf16", "fp16"])


def autocast_to(dtype):
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


def wide(model):
    """Scores between about -4 and 4, where bf16 has steps of 1/64 and fp16 of 1/512."""
    for name, parameter in model.named_parameters():
        if "score" in name or "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.4)
    return model


def distinct(scores):
    return len(set(torch.as_tensor(scores).flatten().float().tolist()))


@pytest.fixture(scope="module")
def half_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    make_model().to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_one_head_against_a_loop_in_fp32():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=generator) for n in (300, 1))
    bias = torch.tensor([0.3])
    for dtype in (torch.bfloat16, torch.float16):
        low = hidden.to(dtype)
        expected = torch.stack([sum(a * b for a, b in zip(h, weight[0], strict=True)) for h in low.float()]) + bias
        with autocast_to(dtype):
            found = apply_head(low, weight, bias)
            rounded = nn.functional.linear(low, weight, bias)
        torch.testing.assert_close(found, expected[:, None], rtol=1e-5, atol=1e-5)
        assert rounded.dtype == dtype and distinct(rounded) < distinct(found)  # negative control


@AUTOCAST
def test_a_mounted_reward_adapter_and_its_prefix_scores(half_base, tmp_path, autocast):
    config = lora(task_type="SEQ_CLS", modules_to_save=["score"])
    wide(get_peft_model(classifier(half_base), config)).save_pretrained(tmp_path / "reward")
    trainer = make_trainer(tmp_path / "out", model=str(half_base), reward_funcs=str(tmp_path / "reward"))
    reward = trainer.collector.rewards.rewards[0]
    with autocast_to(autocast):
        scores = reward(Completions(["the sea "] * 400, WORDS, [[4]] * 400))
    assert distinct(scores) > 350
    assert distinct(torch.tensor(scores).bfloat16()) < 250  # negative control: as they would be rounded
    prefixes = reward.prefix_scores([[4, 5, 6, n] for n in range(4, 40)])
    assert distinct(torch.cat(prefixes)[3::4]) == 36


@AUTOCAST
def test_a_classifier_that_is_loaded_in_half_precision(half_base, autocast):
    model = wide(classifier(half_base)).to(torch.bfloat16)
    plain = copy.deepcopy(model)
    reward = ClassifierReward(model, make_tokenizer(), "judge", batch_size=64, chat_template_kwargs={})
    with autocast_to(autocast):
        scores = reward(Completions(["the sea "] * 400, WORDS, [[4]] * 400))
        with torch.no_grad():
            hidden = plain.model(IDS).last_hidden_state[:, -1]
            found, rounded = model(IDS).logits[:, 0], plain(IDS).logits[:, 0]
    assert distinct(scores) > 350
    torch.testing.assert_close(found, hidden.float() @ plain.score.weight.float()[0], rtol=1e-5, atol=1e-5)
    assert distinct(rounded) < 950 < 990 < distinct(found)
    assert model.score.weight.dtype == torch.bfloat16  # a model of the user's keeps its weights


ENCODERS = {
    "BERT": (BertForSequenceClassification, BertConfig, {}),
    "RoBERTa": (RobertaForSequenceClassification, RobertaConfig, {"max_position_embeddings": 140}),
    "ModernBERT": (ModernBertForSequenceClassification, ModernBertConfig, {"sep_token_id": 2, "cls_token_id": 1}),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_every_layer_above_an_encoder(name):
    """Poolers, norms and dense layers too; the oracle is the same model in fp32 over the same hidden states."""
    kind, config, options = ENCODERS[name]
    torch.manual_seed(0)
    model = kind(config(**{**SIZES, **options, "num_labels": 1})).eval().to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = torch.randn(parameter.shape).bfloat16() * 0.2
    exact, rounded = copy.deepcopy(model).float(), model(IDS, attention_mask=MASK).logits
    compute_heads_in_fp32(model)
    with torch.no_grad(), autocast_to(torch.bfloat16):
        found, outputs = model(IDS, attention_mask=MASK).logits, model.base_model(IDS, attention_mask=MASK)
    head = copy.deepcopy(exact)
    head.base_model.forward = lambda *args, **kwargs: type(outputs)(
        **{k: v.float() for k, v in outputs.items() if isinstance(v, torch.Tensor)}
    )
    with torch.no_grad():
        expected = head(IDS, attention_mask=MASK).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert distinct(rounded) < distinct(found)


@AUTOCAST
@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "whole model"])
def test_a_reward_trainer_compares_fp32_scores(half_base, tmp_path, adapter, autocast):
    args = RewardConfig(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", bf16=False, per_device_train_batch_size=2,
        disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    pairs = Dataset.from_dict({"chosen": ["good", "fine"] * 2, "rejected": ["bad", "awful"] * 2})
    model = wide(classifier(half_base)).to(torch.bfloat16)
    trainer = RewardTrainer(
        model, args, train_dataset=pairs, processing_class=make_tokenizer(), peft_config=lora() if adapter else None
    )
    wide(trainer.model)
    for training in (True, False):
        trainer.model.train(training)
        with autocast_to(autocast):
            scores = trainer.model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
        assert scores.dtype == torch.float32 and distinct(scores) > 990
        assert distinct(scores.bfloat16()) < 700
    scores.sum().backward()
    head = next(p for n, p in trainer.model.named_parameters() if "score" in n and p.requires_grad)
    # d sum(w h) / d w is the sum of the hidden states.
    states = []
    base = trainer.model.get_base_model() if adapter else trainer.model
    hook = base.model.register_forward_hook(lambda m, a, out: states.append(out.last_hidden_state[:, -1].float()))
    with torch.no_grad(), autocast_to(autocast):
        trainer.model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    hook.remove()
    tolerance = 1e-4 if head.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(head.grad.float()[0], states[0].sum(0), rtol=tolerance, atol=tolerance * 10)


@AUTOCAST
@pytest.mark.parametrize("critic", ["shared", "adapter", "separate"])
def test_values_of_every_critic(autocast, critic):
    policy = get_peft_model(make_model().to(torch.bfloat16), lora())
    options = {"value_model": make_model(seed=1).to(torch.bfloat16)} if critic == "separate" else {}
    if critic == "adapter":
        policy.add_adapter("critic", lora())
    actor = ActorCritic(policy, ValueHead(32), critic=critic, **options).eval()
    nn.init.normal_(actor.value_head.layers[0].weight, std=0.4)
    with torch.no_grad(), autocast_to(autocast):
        values = actor(IDS, MASK, 1, with_logprobs=False).values
    assert values.dtype == torch.float32 and distinct(values) > 990 > 700 > distinct(values.bfloat16())

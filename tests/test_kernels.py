"""One switch for all kernels: with it off, other libraries' forwards run, and a run learns the same up to rounding."""

from __future__ import annotations

import pytest
import torch
from conftest import SIZES, lora, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from peft import get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from test_fp32_heads import distinct, wide
from transformers import LlamaConfig, LlamaForSequenceClassification

from ppo_plus import RewardConfig, RewardTrainer
from ppo_plus.kernels.cpu_attention import EAGER_GQA
from ppo_plus.kernels.switch import VARIABLE
from ppo_plus.models.actor_critic import ActorCritic
from ppo_plus.models.value_head import ValueHead
from ppo_plus.rewards import Completions
from ppo_plus.rewards.classifiers import ClassifierReward

PAIRS = Dataset.from_dict({"prompt": ["a b"] * 8, "chosen": [" eee"] * 8, "rejected": [" xyz"] * 8})


def classifier() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1))


def replaced(model) -> set[str]:
    """Kinds of modules with a forward of their own in place of their class's."""
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


def trained(folder, **config):
    """A trainer after two rollouts of uneven length, and its weights."""
    settings = {"max_steps": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, **config}
    trainer = make_trainer(folder, config=settings)
    trainer.train()
    return trainer, torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        "start": trained(folder / "start", learning_rate=0.0, value_head_learning_rate=0.0),
        "on": trained(folder / "on"),
        "off": trained(folder / "off", use_ppo_plus_kernels=False),
    }


def test_a_run_without_kernels_learns_the_same_up_to_rounding(runs):
    start, on, off = (weights for _, weights in runs.values())
    assert (on - off).abs().max() < 1e-5 < 1e-3 < (on - start).abs().max()
    assert not torch.equal(on, off)  # control: other forwards ran


def test_no_forward_is_replaced_without_kernels(runs):
    on, off = runs["on"][0].model, runs["off"][0].model
    assert {"Linear", "LlamaRMSNorm"} <= replaced(on) and len(on.runner.packable_models) == 1
    assert replaced(off) == set() and off.runner.sdpa_models == off.runner.packable_models == []
    assert off.config._attn_implementation == "sdpa"


def test_the_environment_turns_them_off_too(runs, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "0")
    trainer, weights = trained(tmp_path)
    assert torch.equal(weights, runs["off"][1]) and not trainer.model.use_kernels
    monkeypatch.setenv(VARIABLE, "1")
    assert make_trainer(tmp_path).model.use_kernels
    assert not make_trainer(tmp_path, config={"use_ppo_plus_kernels": False}).model.use_kernels


@pytest.mark.parametrize("use_kernels", [True, False])
def test_short_sequences_in_half_precision(use_kernels):
    policy = get_peft_model(make_model().to(torch.bfloat16), lora())
    actor = ActorCritic(policy, ValueHead(32), use_kernels=use_kernels).eval()
    ids = torch.arange(4, 16)[None]
    with torch.no_grad():
        actor(ids, torch.ones_like(ids), 4)
    assert actor.config._attn_implementation == (EAGER_GQA if use_kernels else "sdpa")


@pytest.mark.parametrize("use_kernels", [True, False])
def test_a_reward_adapter_that_is_loaded_later(tmp_path, use_kernels):
    """It reaches layers that the actor's adapter does not."""
    scorer = get_peft_model(classifier(), lora(task_type="SEQ_CLS", target_modules=["q_proj", "k_proj"]))
    scorer.save_pretrained(tmp_path)
    policy = get_peft_model(make_model(), lora(target_modules=["q_proj"]))
    actor = ActorCritic(policy, ValueHead(32), use_kernels=use_kernels)
    actor.load_reward_adapter("judge", tmp_path)
    layers = [module for module in policy.modules() if isinstance(module, LoraLinear)]
    assert len(layers) == 4 and all(("forward" in vars(layer)) == use_kernels for layer in layers)


@pytest.mark.parametrize("use_kernels", [True, False])
def test_reward_trainer(tmp_path, use_kernels):
    args = RewardConfig(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", bf16=False, disable_tqdm=True,
        save_strategy="no", dataloader_pin_memory=False, use_ppo_plus_kernels=use_kernels,
    )  # fmt: skip
    config = lora(task_type="SEQ_CLS", modules_to_save=["score"])
    trainer = RewardTrainer(
        classifier(), args, train_dataset=PAIRS, processing_class=make_tokenizer(), peft_config=config
    )
    trainer.train()
    assert bool(replaced(trainer.model)) == use_kernels


def test_scores_of_a_classifier_in_half_precision():
    """Without the fp32 head, they round to the classifier's dtype, and texts tie."""
    texts = [f" {a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    batch = Completions(["a"] * len(texts), texts, [[4]] * len(texts), {}, {})
    found = {}
    for use_kernels in (True, False):
        model = wide(classifier()).to(torch.bfloat16)
        reward = ClassifierReward(
            model, make_tokenizer(), "judge", batch_size=100, chat_template_kwargs={}, use_kernels=use_kernels
        )
        found[use_kernels] = torch.tensor(reward(batch))
    assert (found[True] - found[False]).abs().max() < 0.05
    assert torch.equal(found[False], found[False].bfloat16().float())
    assert distinct(found[False]) < distinct(found[True])

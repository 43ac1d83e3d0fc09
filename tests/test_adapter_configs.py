"""Adapters are trained for the trainer's task, whatever the configuration or the model that they come with says."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import classifier, lora, make_model, make_prompts, make_tokenizer, make_trainer
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

from ppo_plus import RewardConfig, RewardTrainer
from ppo_plus.models.loading import config_to_train

SHORT = {"max_steps": 1}
PAIRS = Dataset.from_dict({"chosen": ["see"] * 8, "rejected": ["xx"] * 8})


def reward_trainer(tmp_path, model, **given):
    args = RewardConfig(
        output_dir=str(tmp_path / "rm"), max_steps=1, learning_rate=1e-2, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, per_device_train_batch_size=2,
    )  # fmt: skip
    return RewardTrainer(model, args, train_dataset=PAIRS, processing_class=make_tokenizer(), **given)


def moved_by_training(trainer, model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.fixture
def saved(tmp_path):
    """The configuration that PEFT wrote beside a trained adapter."""
    get_peft_model(make_model(), lora()).save_pretrained(tmp_path / "old")
    config = LoraConfig.from_pretrained(tmp_path / "old")
    assert config.inference_mode  # what makes the difference
    return config


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_a_configuration_read_from_a_saved_adapter_is_trained(tmp_path, saved, critic):
    before = saved.to_dict()
    trainer = make_trainer(tmp_path / "out", peft_config=saved, config={"max_steps": 2, "critic": critic})
    moved = moved_by_training(trainer, trainer.model.policy)
    assert len([name for name in moved if "lora_B.default" in name]) == 14  # 2 layers of 7 products
    assert any("lora_B.critic" in name for name in moved) == (critic == "adapter")
    assert saved.to_dict() == before


def test_a_reward_adapter_is_trained_from_a_saved_configuration(tmp_path, base, saved):
    before = saved.to_dict()
    trainer = reward_trainer(tmp_path, str(base), peft_config=saved)
    moved = moved_by_training(trainer, trainer.model)
    assert any("lora_B" in name for name in moved) and any("score.modules_to_save" in name for name in moved)
    assert saved.to_dict() == before


def test_a_peft_model_that_came_frozen_is_trained(tmp_path, base):
    config = lora(task_type="SEQ_CLS", target_modules=["q_proj"])
    get_peft_model(classifier(base), config).save_pretrained(tmp_path / "old")
    frozen = PeftModel.from_pretrained(classifier(base), tmp_path / "old")
    assert not any(p.requires_grad for p in frozen.parameters())
    moved = moved_by_training(reward_trainer(tmp_path, frozen), frozen)
    assert all(".default." in name for name in moved)
    assert any("lora_B" in name for name in moved) and any("score" in name for name in moved)


def test_a_value_model_whose_adapter_came_frozen_is_trained(tmp_path, base):
    get_peft_model(classifier(base), lora(task_type="SEQ_CLS")).save_pretrained(tmp_path / "old")
    frozen = PeftModel.from_pretrained(classifier(base), tmp_path / "old")
    trainer = make_trainer(tmp_path / "out", value_model=frozen, config=SHORT)
    assert any("lora_B" in name for name in moved_by_training(trainer, trainer.model.value_model))


@pytest.mark.parametrize("task", [None, *TaskType])
def test_the_policys_adapter_is_for_language_modeling(tmp_path, base, task):
    given = lora(task_type=task)
    before = given.to_dict()
    trainer = make_trainer(tmp_path / "out", peft_config=given, model=str(base), config=SHORT)
    assert trainer.model.policy.peft_config["default"].task_type == "CAUSAL_LM"
    assert given.to_dict() == before
    if task == "SEQ_CLS":
        trainer.save_model()
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["task_type"] == "CAUSAL_LM" and config["modules_to_save"] is None
        second = make_trainer(tmp_path / "two", model=str(tmp_path / "out"), peft_config=None, config=SHORT)
        assert second.model.actor_parameters()


def test_the_reward_models_adapter_is_for_sequence_classification(tmp_path, base):
    given = lora(modules_to_save=["norm"])
    trainer = reward_trainer(tmp_path, str(base), peft_config=given)
    config = trainer.model.peft_config["default"]
    assert config.task_type == "SEQ_CLS" and {*config.modules_to_save} >= {"norm", "score"}
    assert given.task_type == "CAUSAL_LM" and given.modules_to_save == ["norm"]


def test_a_reward_adapters_configuration_loses_its_head_and_nothing_else():
    config = config_to_train(lora(task_type="SEQ_CLS", modules_to_save=["score", "norm"]), TaskType.CAUSAL_LM)
    assert config.modules_to_save == ["norm"]
    kept = config_to_train(lora(modules_to_save=["lm_head"]), TaskType.CAUSAL_LM)
    assert kept.modules_to_save == ["lm_head"]


def test_adapters_of_another_task_are_refused_before_they_are_trained(tmp_path, base):
    policy = PeftModel(make_model(), lora(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="SEQ_CLS"):
        make_trainer(tmp_path / "out", model=policy, peft_config=None)
    headless = get_peft_model(classifier(base), lora(task_type=None))
    with pytest.raises(ValueError, match="task_type=None"):
        reward_trainer(tmp_path, headless)
    with_head = get_peft_model(classifier(base), lora(task_type=None, modules_to_save=["score"]))
    assert reward_trainer(tmp_path, with_head).train().global_step == 1


def test_prompts_are_answered_by_the_adapter_that_was_read_from_disk(tmp_path, base):
    """Control: a PeftModel with a frozen adapter of the policy, which PEFT gives by default, is trained too."""
    get_peft_model(make_model(), lora()).save_pretrained(tmp_path / "old")
    frozen = PeftModel.from_pretrained(make_model(), tmp_path / "old")
    trainer = make_trainer(tmp_path / "out", model=frozen, peft_config=None, config=SHORT, train_dataset=make_prompts())
    moved = moved_by_training(trainer, trainer.model.policy)
    assert moved and all(".default." in name for name in moved)

"""Trained weights are saved whatever the generation config says, and it is saved as it is."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import classifier, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from transformers import AutoModelForCausalLM, GenerationConfig

from ppo_plus import RewardConfig, RewardTrainer
from ppo_plus.integrations.trl_legacy import export_with_value_head

MISTAKES = {
    "temperature alone": {"temperature": 0.6},
    "greedy with top_p": {"do_sample": False, "top_p": 0.9, "top_k": 20},
    "beams": {"early_stopping": True, "length_penalty": 0.5},
}


def faulty_model(options):
    model = make_model()
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    return model


def without_version(file):
    return {key: value for key, value in json.loads(file.read_text()).items() if key != "transformers_version"}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_checkpoints_and_the_last_model_are_written(tmp_path, mistake):
    model = faulty_model(MISTAKES[mistake])
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):  # control: what transformers does
        model.save_pretrained(tmp_path / "control")
    config = model.generation_config
    trainer = make_trainer(
        tmp_path / "out",
        model=model,
        peft_config=None,
        config={"max_steps": 2, "save_strategy": "steps", "save_steps": 1},
    )
    trainer.train()
    trainer.save_model()
    assert model.generation_config is config
    for folder in (tmp_path / "out" / "checkpoint-1", tmp_path / "out"):
        saved = without_version(folder / "generation_config.json")
        assert {name: saved[name] for name in MISTAKES[mistake]} == MISTAKES[mistake]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_model_without_a_generation_config_is_saved(tmp_path):
    model = make_model()
    model.generation_config = None
    with pytest.raises(AttributeError, match="save_pretrained"):  # control: what transformers does
        model.save_pretrained(tmp_path / "control")
    config = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path / "out", model=model, peft_config=None, config=config)
    trainer.train()
    assert model.generation_config is None
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-1")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_base_whose_own_file_has_the_mistake_is_trained_resumed_and_trained_again(tmp_path):
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    file = base / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": 0.6}))
    # Trainer aligns the padding token, after which transformers takes the config for one of the user's.
    given = {"model": str(base), "peft_config": None, "processing_class": make_tokenizer(pad_token="<eos>")}
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path / "out", config=config, **given)
    trainer.train()
    weights = [p.clone() for p in trainer.model.parameters()]
    resumed = make_trainer(tmp_path / "out", config=config, **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed.model.parameters(), strict=True))
    resumed.save_model()
    assert without_version(tmp_path / "out" / "generation_config.json")["temperature"] == 0.6
    second = make_trainer(tmp_path / "two", **{**given, "model": str(tmp_path / "out")}, config={"max_steps": 1})
    second.train()
    second.save_model()
    assert GenerationConfig.from_pretrained(tmp_path / "two").temperature == 0.6


def test_generation_parameters_in_the_models_own_configuration_lose_nothing(tmp_path, base):
    """`model.config.max_length = 50` of an old script, on the policy, a critic and a reward model."""
    model, critic = make_model(), classifier(base)
    for each in (model, critic):
        each.config.max_length, each.config.top_p = 50, 0.9
    with pytest.raises(ValueError, match="generation parameters are set in the model config"):  # control
        model.save_pretrained(tmp_path / "control")
    trainer = make_trainer(tmp_path, model=model, value_model=critic, peft_config=None, config={"max_steps": 1})
    trainer.train()
    trainer.save_model()
    assert (model.config.max_length, model.config.top_p, critic.config.max_length) == (50, 0.9, 50)
    for folder in (tmp_path, tmp_path / "value_model"):
        saved = json.loads((folder / "config.json").read_text())
        assert "top_p" not in saved and saved["hidden_size"] == 32
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_reward_model_with_generation_parameters_is_saved(tmp_path, base):
    model = classifier(base)
    model.config.max_length = 50
    pairs = Dataset.from_dict({"chosen": ["see"] * 8, "rejected": ["xx"] * 8})
    args = RewardConfig(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    trainer = RewardTrainer(model, args, train_dataset=pairs, processing_class=make_tokenizer())
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "model.safetensors").is_file() and model.config.max_length == 50


def test_an_export_for_older_tools_is_written(tmp_path):
    trainer = make_trainer(tmp_path / "out", model=faulty_model({"temperature": 0.6}), peft_config=None)
    export_with_value_head(trainer.model, tmp_path / "exported")
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_a_sound_generation_config_is_saved_unchanged(tmp_path):
    """Control: what transformers writes of a valid one is what is written."""
    model = faulty_model({"do_sample": True, "temperature": 0.6, "max_new_tokens": 5})
    model.save_pretrained(tmp_path / "control")
    make_trainer(tmp_path / "out", model=model, peft_config=None).save_model()
    assert without_version(tmp_path / "out" / "generation_config.json") == without_version(
        tmp_path / "control" / "generation_config.json"
    )

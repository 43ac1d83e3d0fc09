"""A 4-bit backbone, on the CPU: reward model, then PPO with the reward adapter mounted on the same base."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import lora, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from transformers import BitsAndBytesConfig

from ppo_plus import RewardConfig, RewardTrainer


def nf4():
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "reward"
    pairs = Dataset.from_dict({"chosen": ["he sees the sea"] * 16, "rejected": ["a bad plot"] * 16})
    args = RewardConfig(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=4, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = RewardTrainer(
        str(base), args, peft_config=lora(), quantization_config=nf4(), train_dataset=pairs, eval_dataset=pairs,
        processing_class=make_tokenizer(),
    )  # fmt: skip
    before = trainer.model.get_base_model().score.modules_to_save["default"].weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.model.get_base_model().score.modules_to_save["default"].weight, before)
    trainer.save_model()
    return folder


def frozen(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}


def test_ppo_on_a_4_bit_base_with_a_mounted_reward_adapter(base, reward_adapter, tmp_path):
    info = json.loads((reward_adapter / "reward_model.json").read_text())
    assert info["quantization"]["bnb_4bit_quant_type"] == "nf4" and info["base_model"] == str(base)
    trainer = make_trainer(
        tmp_path, model=str(base), reward_funcs=str(reward_adapter), quantization_config=nf4(),
        config={"max_steps": 4, "save_strategy": "steps", "save_steps": 4},
    )  # fmt: skip
    layer = trainer.model.language_model.model.layers[0].self_attn.q_proj.base_layer
    assert type(layer).__name__ == "Linear4bit"
    before = frozen(trainer)
    actor = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = frozen(trainer)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert any(not torch.equal(p, actor[n]) for n, p in trainer.model.named_parameters() if n in actor)
    first = next(row for row in trainer.state.log_history if "ppo/first_ratio_error" in row)
    assert first["ppo/first_ratio_error"] < 1e-4 and abs(first["kl"]) < 1e-3
    saved = {f.name for f in (tmp_path / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved


def test_a_4_bit_base_is_not_trained_in_full(base, tmp_path):
    with pytest.raises(ValueError, match="quantized model cannot be trained in full: pass peft_config"):
        make_trainer(tmp_path, model=str(base), quantization_config=nf4(), peft_config=None)

"""`use_liger_kernel=True` reaches the models inside the actor-critic, or is refused before weights are loaded.

The package stands in here: it needs Triton and a GPU.
"""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from conftest import classifier, count_e, lora, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from transformers import TrainerCallback

import ppo_plus.kernels.liger
import ppo_plus.training.setup
from ppo_plus import RewardConfig, RewardTrainer

LIGER = {"use_liger_kernel": True}
OFF = {"cross_entropy": False, "fused_linear_cross_entropy": False}
PAIRS = Dataset.from_dict({"chosen": ["good film"] * 4, "rejected": ["bad film"] * 4})


def apply_to_llama(
    rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None
):  # fmt: skip
    """The kernels of Llama, as Liger declares them; others are left out without a word."""


@pytest.fixture
def patched(monkeypatch):
    """What Liger was asked to patch, on a CPU that passes for a GPU with the package."""
    calls = []

    def patch(model, **kwargs):
        calls.append((type(model).__name__, kwargs))
        norm = model.model.norm
        norm.forward = types.MethodType(lambda norm, x: type(norm).forward(norm, x) * patch.factor, norm)

    patch.factor = 1.0
    package = types.ModuleType("liger_kernel.transformers")
    package._apply_liger_kernel_to_instance = patch
    table = types.ModuleType("liger_kernel.transformers.monkey_patch")
    table.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_to_llama}
    for module in (types.ModuleType("liger_kernel"), package, table):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(ppo_plus.kernels.liger, "DEVICES", ("cpu",))
    monkeypatch.setattr(ppo_plus.kernels.liger, "is_liger_kernel_available", lambda: True)
    patch.calls = calls
    return patch


@pytest.fixture
def no_weights(monkeypatch):
    """Fail where weights are loaded."""
    monkeypatch.setattr(
        ppo_plus.training.setup, "load_policy", lambda *args, **kwargs: pytest.fail("weights were loaded")
    )


def reward_trainer(folder, model, **config):
    args = RewardConfig(str(folder), use_cpu=True, report_to="none", max_steps=1, **LIGER, **config)
    return RewardTrainer(model, args, train_dataset=PAIRS, processing_class=make_tokenizer(), peft_config=lora())


class Sees(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        self.asked = args.use_liger_kernel


def test_policy_reference_and_critic_are_patched_and_nothing_else(tmp_path, base, patched):
    sees = Sees()
    config = {**LIGER, "max_steps": 1, "liger_kernel_config": {"swiglu": False}}
    trainer = make_trainer(
        tmp_path, config=config, peft_config=None, value_model=classifier(base), callbacks=[sees],
        reward_funcs=[classifier(base), count_e],
    )  # fmt: skip
    names = ["LlamaForCausalLM", "LlamaForCausalLM", "LlamaForSequenceClassification"]
    assert patched.calls == [(name, {"swiglu": False, **OFF}) for name in names]
    trainer.train()
    trainer.save_model()
    assert len(patched.calls) == 3 and sees.asked and trainer.args.use_liger_kernel
    assert trainer.args.liger_kernel_config == {"swiglu": False}
    assert json.loads((tmp_path / "training_args.json").read_text(encoding="utf-8"))["use_liger_kernel"]


def test_a_patched_norm_is_the_one_that_computes(tmp_path, patched):
    """It takes the place of ours, and LoRA layers keep their own forward pass."""
    trainer = make_trainer(tmp_path, config=LIGER)
    model = trainer.model.language_model.model
    assert model.norm.forward.__func__.__name__ == "<lambda>"
    assert model.layers[0].self_attn.q_proj.forward.__func__.__module__ == "ppo_plus.kernels.lora"
    plain = make_trainer(tmp_path)
    assert plain.model.language_model.model.norm.forward.__func__.__module__ == "ppo_plus.kernels.rmsnorm"


def test_a_reward_model_is_patched_once_and_without_losses(tmp_path, base, patched):
    trainer = reward_trainer(tmp_path, str(base))
    trainer.train()
    assert patched.calls == [("LlamaForSequenceClassification", OFF)]
    assert trainer.args.use_liger_kernel


def test_kernels_that_give_other_numbers_are_refused(tmp_path, patched):
    patched.factor = 1.2
    with pytest.raises(ValueError, match=r"use_liger_kernel=True: .* hidden states of LlamaForCausalLM by 20%"):
        make_trainer(tmp_path, config=LIGER)


def test_a_family_without_kernels_is_refused(tmp_path, base, patched, no_weights):
    sys.modules["liger_kernel.transformers.monkey_patch"].MODEL_TYPE_TO_APPLY_LIGER_FN.clear()
    with pytest.raises(ValueError, match="use_liger_kernel=True: .* model_type='llama'"):
        make_trainer(tmp_path, model=str(base), config=LIGER)
    with pytest.raises(ValueError, match="use_liger_kernel=True: .* model_type='llama'"):
        reward_trainer(tmp_path, str(base))


def test_a_loss_of_ligers_is_refused(tmp_path, patched, no_weights):
    config = {**LIGER, "liger_kernel_config": {"fused_linear_cross_entropy": True}}
    with pytest.raises(ValueError, match="PPOConfig: liger_kernel_config.*fused_linear_cross_entropy"):
        make_trainer(tmp_path, config=config)


@pytest.mark.parametrize("kernel", ["rms_norms", "geglu"])  # a typing error, and a kernel of other families
def test_a_kernel_that_the_family_lacks_is_refused(kernel, tmp_path, base, patched, no_weights):
    options = {"liger_kernel_config": {"rope": True, kernel: False}}
    says = f"liger_kernel_config has '{kernel}'.*'llama'.* rms_norm, rope, swiglu"
    with pytest.raises(ValueError, match=says):
        make_trainer(tmp_path, model=str(base), config={**LIGER, **options})
    with pytest.raises(ValueError, match=says):
        reward_trainer(tmp_path, str(base), **options)


def test_a_machine_without_the_package_is_told(tmp_path, base, patched, no_weights, monkeypatch):
    monkeypatch.setattr(ppo_plus.kernels.liger, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ValueError, match="PPOConfig: use_liger_kernel=True .* pip install liger-kernel"):
        make_trainer(tmp_path, config=LIGER)
    with pytest.raises(ValueError, match="RewardConfig: use_liger_kernel=True .* pip install liger-kernel"):
        reward_trainer(tmp_path, str(base))


def test_a_device_without_kernels_is_told(tmp_path, base, no_weights):
    with pytest.raises(ValueError, match="PPOConfig: use_liger_kernel=True needs a GPU .* on 'cpu'"):
        make_trainer(tmp_path, model=str(base), config=LIGER)
    with pytest.raises(ValueError, match="RewardConfig: use_liger_kernel=True needs a GPU .* on 'cpu'"):
        reward_trainer(tmp_path, str(base))


def test_without_the_option_nothing_is_patched(tmp_path, patched):
    """Negative control."""
    make_trainer(tmp_path, model=make_model().to(torch.float32))
    assert patched.calls == []

"""A 4-bit or 8-bit backbone, on the CPU: reward model, then PPO with the reward adapter mounted on the same base."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from conftest import lora, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from packaging.version import Version
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ppo_plus import RewardConfig, RewardTrainer
from ppo_plus.kernels.switch import replace_forwards
from ppo_plus.models.base_weights import encode_samples, sample_model
from ppo_plus.models.loading import load_policy
from ppo_plus.models.weight_checks import is_packed
from ppo_plus.training.checkpoint import weights_digest


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


QUANTIZATIONS = {
    "nf4": (nf4, "Linear4bit", "bnb_4bit_quant_type", "nf4"),
    "int8": (lambda: BitsAndBytesConfig(load_in_8bit=True), "Linear8bitLt", "load_in_8bit", True),
}


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def quantization(request):
    return QUANTIZATIONS[request.param]


@pytest.fixture(scope="module")
def reward_adapter(base, quantization, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "reward"
    pairs = Dataset.from_dict({"chosen": ["he sees the sea"] * 16, "rejected": ["a bad plot"] * 16})
    args = RewardConfig(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=4, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = RewardTrainer(
        str(base), args, peft_config=lora(), quantization_config=quantization[0](), train_dataset=pairs,
        eval_dataset=pairs, processing_class=make_tokenizer(),
    )  # fmt: skip
    before = trainer.model.get_base_model().score.modules_to_save["default"].weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.model.get_base_model().score.modules_to_save["default"].weight, before)
    trainer.save_model()
    return folder


@pytest.mark.skipif(Version(bitsandbytes.__version__) < Version("0.50"), reason="reads uint8 storage alone on CPUs")
def test_the_bytes_of_four_bits_are_no_weights_in_any_dtype_of_their_storage(base, tmp_path):
    """Read as bf16, one in 256 pairs of bytes is NaN, and a sample of them is that of no base."""
    by_storage = []
    for storage in (torch.uint8, torch.bfloat16):
        config = nf4()
        config.bnb_4bit_quant_storage = storage
        model = make_trainer(tmp_path, model=str(base), quantization_config=config).model.language_model
        weight = model.model.layers[0].mlp.up_proj.base_layer.weight
        assert weight.dtype == storage and is_packed(weight)
        assert not is_packed(model.model.norm.weight)  # negative control
        by_storage.append((weights_digest([model]), encode_samples(sample_model(model))))
    assert by_storage[0] == by_storage[1]


def frozen(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}


def test_nothing_frozen_is_upcast(quantization, tmp_path):
    """PEFT's preparation of a k-bit model would turn embeddings, norms and head into fp32: gigabytes at 8B."""
    folder = tmp_path / "tiny-llama"
    make_model(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    pairs = Dataset.from_dict({"chosen": ["he sees the sea"] * 16, "rejected": ["a bad plot"] * 16})
    args = RewardConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    options = {"quantization_config": quantization[0](), "peft_config": lora(), "processing_class": make_tokenizer()}
    ppo = make_trainer(tmp_path, model=str(folder), **options).model.policy
    reward = RewardTrainer(str(folder), args, train_dataset=pairs, **options).model
    for model in (ppo, reward):
        dtypes = {p.dtype for p in model.parameters() if not p.requires_grad}
        assert dtypes == {torch.bfloat16, torch.uint8 if quantization[1] == "Linear4bit" else torch.int8}
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_ppo_on_a_quantized_base_with_a_mounted_reward_adapter_and_an_adapter_critic(
    base, quantization, reward_adapter, tmp_path
):
    config, layer_type, field, value = quantization
    info = json.loads((reward_adapter / "reward_model.json").read_text())
    assert info["quantization"][field] == value and info["base_model"] == str(base)
    trainer = make_trainer(
        tmp_path, model=str(base), reward_funcs=str(reward_adapter), quantization_config=config(),
        config={"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "critic": "adapter"},
    )  # fmt: skip
    layer = trainer.model.language_model.model.layers[0].self_attn.q_proj.base_layer
    assert type(layer).__name__ == layer_type
    before = frozen(trainer)
    trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    trainer.train()
    after = frozen(trainer)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    for part in (".default.", ".critic.", "value_head"):
        assert any(not torch.equal(p, trained[n]) for n, p in trainer.model.named_parameters() if part in n)
    first = next(row for row in trainer.state.log_history if "ppo/initial_ratio_error" in row)
    # On a CPU bitsandbytes multiplies by LLM.int8 weights in one way while training and in another otherwise.
    tolerance = 0.0 if layer_type == "Linear4bit" else 5e-2
    assert first["ppo/initial_ratio_error"] <= tolerance and abs(first["kl"]) <= 10 * tolerance
    saved = {f.name for f in (tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors", "critic"} <= saved and "model.safetensors" not in saved


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_into_a_quantized_base_is_refused(base, quantization, tmp_path, merge):
    trainer = make_trainer(tmp_path, model=str(base), quantization_config=quantization[0]())
    with pytest.raises(ValueError, match="quantized base cannot be merged.*load the base in bf16"):
        getattr(trainer.model.policy, merge)()


def test_merging_into_a_plain_base_works(base, tmp_path):
    """Negative control."""
    trainer = make_trainer(tmp_path, model=str(base))
    trainer.train()
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        expected = trainer.model.eval().policy(ids).logits
        assert torch.allclose(trainer.model.policy.merge_and_unload()(ids).logits, expected, atol=1e-4)


def test_a_4_bit_base_is_not_trained_in_full(base, tmp_path):
    with pytest.raises(ValueError, match="quantized model cannot be trained in full: pass peft_config"):
        make_trainer(tmp_path, model=str(base), quantization_config=nf4(), peft_config=None)


@pytest.mark.parametrize("kernels", [True, False])
def test_gradients_after_an_evaluation_are_those_before_it(base, kernels):
    """bitsandbytes would switch to a kernel without a backward pass, where the CPU has one (AVX512-BF16)."""
    config = nf4()
    config.bnb_4bit_compute_dtype = torch.bfloat16
    policy = load_policy(str(base), peft_config=lora(init_lora_weights=False), quantization_config=config,
                         model_init_kwargs={"dtype": "bfloat16"})  # fmt: skip
    replace_forwards(policy, kernels)
    ids = torch.arange(4, 20)[None]

    def gradient():
        policy.train().zero_grad()
        policy(input_ids=ids).logits.float().logsumexp(-1).sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    before = gradient()
    with torch.no_grad():
        policy.eval()(input_ids=ids)
    assert before.norm() > 0 and torch.equal(gradient(), before)


def mapped(folder):
    """Whether a file of that folder is in this process's memory."""
    gc.collect()
    return any(
        str(folder) in line and "safetensors" in line for line in Path("/proc/self/maps").read_text().splitlines()
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is in memory")
def test_a_quantized_base_does_not_hold_the_file_that_it_came_from(tmp_path, quantization):
    folder = tmp_path / "base"
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization[0]())
    assert mapped(folder)  # negative control: transformers' own loading does
    expected = plain.get_input_embeddings().weight.detach().clone()
    del plain
    trainer = make_trainer(tmp_path, model=str(folder), quantization_config=quantization[0]())
    assert not mapped(folder)
    assert torch.equal(trainer.model.language_model.get_input_embeddings().weight, expected)
    pairs = Dataset.from_dict({"chosen": ["he sees the sea"] * 4, "rejected": ["a bad plot"] * 4})
    reward_trainer = RewardTrainer(
        str(folder), RewardConfig(str(tmp_path / "reward"), use_cpu=True, report_to="none"), peft_config=lora(),
        quantization_config=quantization[0](), train_dataset=pairs, processing_class=make_tokenizer(),
    )  # fmt: skip
    assert not mapped(folder) and reward_trainer.model.is_quantized

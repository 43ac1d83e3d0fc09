"""A model whose weights are offloaded or not finite is refused with the place of the fault, before it trains."""

from __future__ import annotations

import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import classifier, lora, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import ppo_plus.training.setup
from ppo_plus import RewardConfig, RewardTrainer
from ppo_plus.models.weight_checks import check_model_weights, first_not_finite, offloaded_parts
from ppo_plus.training.validation import check_quantized_device

PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


def placed(**elsewhere):
    return {part: "cpu" for part in PARTS} | elsewhere


@pytest.mark.parametrize(
    ("device_map", "parts"),
    [
        ({"": "cpu"}, []),
        ({"": 0}, []),
        ({"a": "cuda:0", "b": 1}, []),
        ({"a": "cpu", "b": "disk"}, ["b to disk"]),
        ({"a": 0, "b": "cpu", "c": torch.device("cpu")}, ["b to cpu", "c to cpu"]),
        ({"": "disk"}, ["the model to disk"]),
    ],
)
def test_parts_that_hooks_would_load_for_each_pass(device_map, parts):
    assert offloaded_parts(device_map) == parts


@pytest.mark.parametrize("part", ["model.layers.1", "lm_head"])
def test_an_offloading_device_map_is_refused_before_weights_are_loaded(tmp_path, base, monkeypatch, part):
    monkeypatch.setattr(
        ppo_plus.training.setup, "load_policy", lambda *args, **kwargs: pytest.fail("weights were loaded")
    )
    kwargs = {"device_map": placed(**{part: "disk"}), "offload_folder": str(tmp_path / "offload")}
    with pytest.raises(ValueError, match=f"device_map offloads {part} to disk"):
        make_trainer(tmp_path, model=str(base), config={"model_init_kwargs": kwargs})
    pairs = Dataset.from_dict({"chosen": ["good"] * 4, "rejected": ["bad"] * 4})
    args = RewardConfig(str(tmp_path), use_cpu=True, report_to="none", model_init_kwargs=kwargs)
    with pytest.raises(ValueError, match=f"device_map offloads {part} to disk"):
        RewardTrainer(str(base), args, train_dataset=pairs, processing_class=make_tokenizer(), peft_config=lora())


def test_a_model_that_was_loaded_with_offloading_is_refused(tmp_path, base):
    device_map = placed(**{"model.layers.1": "disk"})
    model = AutoModelForCausalLM.from_pretrained(base, device_map=device_map, offload_folder=tmp_path / "offload")
    with pytest.raises(ValueError, match=r"^model: device_map offloads model.layers.1 to disk"):
        make_trainer(tmp_path, model=model)
    with pytest.raises(ValueError, match=r"^ref_model: device_map offloads model.layers.1 to disk"):
        make_trainer(tmp_path, ref_model=model)


def test_offloading_that_is_decided_at_loading_is_named(tmp_path, base):
    """As `device_map="auto"` decides where the device is too small: here all of it goes to the disk."""
    kwargs = {"device_map": "auto", "max_memory": {"cpu": 30_000}, "offload_folder": str(tmp_path / "offload")}
    with pytest.raises(ValueError, match="^model: .*offload"):
        make_trainer(tmp_path, model=str(base), config={"model_init_kwargs": kwargs})
    pairs = Dataset.from_dict({"chosen": ["good"] * 4, "rejected": ["bad"] * 4})
    args = RewardConfig(str(tmp_path), use_cpu=True, report_to="none", model_init_kwargs=kwargs)
    with pytest.raises(ValueError, match="^model: .*offload"):
        RewardTrainer(str(base), args, train_dataset=pairs, processing_class=make_tokenizer(), peft_config=lora())
    device_map = placed(**{"model.layers.1": "disk"})
    model = AutoModelForCausalLM.from_pretrained(base, device_map=device_map, offload_folder=tmp_path / "offload")
    with pytest.raises(ValueError, match="^model: .*offload"):
        make_trainer(tmp_path, model=get_peft_model(model, lora()), peft_config=None)


def test_a_map_without_offloading_trains(tmp_path, base):
    """Negative control."""
    config = {"model_init_kwargs": {"device_map": placed()}, "max_steps": 1}
    assert make_trainer(tmp_path, model=str(base), config=config).train().global_step == 1


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_weight_that_is_not_finite_is_named(tmp_path, weight, number):
    """The last row of the embeddings takes part in no probe."""
    model, reference = make_model(), make_model()
    with torch.no_grad():
        for each in (model, reference):
            each.get_parameter(weight)[-1, 3] = number
    with pytest.raises(ValueError, match=f"^model: the weight {weight} has NaN or inf"):
        make_trainer(tmp_path, model=model)
    with pytest.raises(ValueError, match=f"^ref_model: the weight {weight} has NaN or inf"):
        make_trainer(tmp_path, ref_model=reference)


def test_a_weight_of_a_critic_or_reward_model_that_is_not_finite_is_named(tmp_path, base):
    scorer = classifier(base)
    with torch.no_grad():
        scorer.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"^value_model: the weight model.norm.weight has NaN"):
        make_trainer(tmp_path, value_model=scorer)
    with pytest.raises(ValueError, match=r"^The reward model 'tiny-llama': the weight model.norm.weight has NaN"):
        make_trainer(tmp_path, reward_funcs=scorer)
    pairs = Dataset.from_dict({"chosen": ["good"] * 4, "rejected": ["bad"] * 4})
    args = RewardConfig(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=r"^model: the weight .*norm.weight has NaN"):
        RewardTrainer(scorer, args, train_dataset=pairs, processing_class=make_tokenizer())


@pytest.mark.parametrize("part", ["lora_B", "score"])
@pytest.mark.parametrize("role", ["reward_funcs", "value_model"])
def test_a_weight_of_a_reward_adapter_that_is_not_finite_is_named(tmp_path, base, reward_adapter, role, part):
    folder = shutil.copytree(reward_adapter, tmp_path / "reward")
    weights = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in weights if part in key)
    config = {"critic": "adapter"} if role == "value_model" else {}
    make_trainer(tmp_path / "out", model=str(base), **{role: str(folder)}, config=config)  # control
    weights[key].view(-1)[3] = torch.nan
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"reward has NaN or infinite numbers in .*{part}"):
        make_trainer(tmp_path / "out", model=str(base), **{role: str(folder)}, config=config)


def test_logits_that_exceed_the_precision_of_the_model_are_named(tmp_path):
    model = make_model().half()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.sign() * 6e4)
    with pytest.raises(ValueError, match=r"logits of LlamaForCausalLM are NaN or infinite in torch.float16"):
        make_trainer(tmp_path, model=model)


def test_a_quantized_base_is_refused_on_an_apple_gpu(base):
    """transformers would leave it on the CPU."""
    mps, cpu = (SimpleNamespace(device=torch.device(kind), model_init_kwargs=None) for kind in ("mps", "cpu"))
    nf4, instance = BitsAndBytesConfig(load_in_4bit=True), make_model()
    instance.is_quantized = True
    for model, config in ((str(base), nf4), (instance, None)):
        with pytest.raises(ValueError, match="quantized, training is on 'mps'"):
            check_quantized_device(mps, model, config)
        check_quantized_device(cpu, model, config)
    check_quantized_device(mps, str(base), None)
    placed_by_hand = SimpleNamespace(device=mps.device, model_init_kwargs={"device_map": {"": "mps"}})
    check_quantized_device(placed_by_hand, str(base), nf4)


def test_a_quantized_reward_model_is_refused_on_an_apple_gpu(tmp_path, base, monkeypatch):
    args = RewardConfig(str(tmp_path), report_to="none", use_cpu=True)
    nf4, pairs = BitsAndBytesConfig(load_in_4bit=True), Dataset.from_dict({"chosen": ["good"], "rejected": ["bad"]})
    with monkeypatch.context() as apple:
        apple.setattr(RewardConfig, "device", torch.device("mps"))
        with pytest.raises(ValueError, match="quantized, training is on 'mps'.* use_cpu=True in RewardConfig"):
            RewardTrainer(str(base), args, train_dataset=pairs, peft_config=lora(), quantization_config=nf4)


def test_large_and_packed_weights_are_not_taken_for_infinite():
    """Sums of them may exceed fp32, and whole numbers are no weights of their own."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    model[0].weight.data.fill_(3e38)
    model[1].weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    assert first_not_finite(model) is None
    check_model_weights(get_peft_model(make_model(), lora()), "model")


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"device_map": {"": 0}}, "device 0,"),
        ({"device_map": "cuda:1"}, "device 'cuda:1',"),
        ({"device_map": {"model": "cpu", "lm_head": torch.device("cuda", 0)}}, "no accelerator"),
        ({"load_in_8bit": True}, r"load_in_8bit .*BitsAndBytesConfig\(load_in_8bit=True\)"),
        ({"load_in_4bit": False}, "load_in_4bit"),
        ({"device_map": "auto"}, None),
        ({"device_map": {"": "cpu"}}, None),
    ],
)
def test_arguments_of_from_pretrained_that_cannot_work_are_refused_before_loading(tmp_path, base, kwargs, named):
    if torch.accelerator.is_available() and named is not None and "device_map" in kwargs:
        pytest.skip("this machine has an accelerator")
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    if named is None:
        make_trainer(tmp_path, model=str(folder), config={"model_init_kwargs": kwargs})
        return
    (folder / "model.safetensors").unlink()  # what would be loaded
    with pytest.raises(ValueError, match=f"^model_init_kwargs: .*{named}"):
        make_trainer(tmp_path, model=str(folder), config={"model_init_kwargs": kwargs})
    config = RewardConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, model_init_kwargs=kwargs)
    pairs = Dataset.from_list([{"chosen": "so", "rejected": "no"}])
    with pytest.raises(ValueError, match=f"^model_init_kwargs: .*{named}"):
        RewardTrainer(str(folder), config, peft_config=lora(), train_dataset=pairs)


def test_bitsandbytes_logs_a_cast_once(tmp_path, base, caplog):
    config = BitsAndBytesConfig(load_in_8bit=True)
    trainer = make_trainer(tmp_path, model=str(base), quantization_config=config, config={"max_steps": 1})
    trainer.train()
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    for dtype in ("one", "one", "another"):
        logger.warning("inputs will be cast from %s", dtype)
    messages = [record.getMessage() for record in caplog.records if record.name == logger.name]
    assert len(messages) == len(set(messages)) and "inputs will be cast from another" in messages

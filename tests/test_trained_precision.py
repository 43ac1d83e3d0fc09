"""What is trained is held in fp32, so that no update is rounded away, or the user is told."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import classifier, lora, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from ppo_plus import RewardConfig, RewardTrainer

HALF = [torch.bfloat16, torch.float16]
PAIRS = Dataset.from_dict({"chosen": ["see the sea", "eel"] * 4, "rejected": ["xx", "a cat"] * 4})


@pytest.fixture(scope="module", params=HALF, ids=["bf16", "fp16"])
def half_base(request, tmp_path_factory):
    """A base on disk in half precision, and that precision."""
    folder = tmp_path_factory.mktemp("half")
    make_model().to(request.param).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder, request.param


def trained_dtypes(model):
    return {p.dtype for p in model.parameters() if p.requires_grad}


def share_moved(trainer, model):
    def flat():
        return torch.cat([p.detach().float().flatten() for p in model.parameters() if p.requires_grad])

    before = flat()
    trainer.train()
    return (flat() != before).float().mean().item()


def reward_trainer(folder, model, config=None, **given):
    args = RewardConfig(
        output_dir=str(folder), max_steps=1, learning_rate=1e-5, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False, **(config or {}),
    )  # fmt: skip
    return RewardTrainer(model, args, train_dataset=PAIRS, processing_class=make_tokenizer(), **given)


def test_an_instance_learns_as_the_same_model_by_name_does(tmp_path, half_base):
    folder, dtype = half_base
    moved = {}
    for how in ("name", "instance"):
        model = str(folder) if how == "name" else LlamaForCausalLM.from_pretrained(folder)
        trainer = make_trainer(tmp_path, model=model, peft_config=None, config={"learning_rate": 1e-5, "max_steps": 2})
        moved[how] = share_moved(trainer, trainer.model.language_model)
        assert trained_dtypes(trainer.model) == {torch.float32}
        assert {p.dtype for p in trainer.model._ref_model[0].parameters()} == {torch.float32}
    assert LlamaForCausalLM.from_pretrained(folder).dtype == dtype  # what makes the difference
    assert moved["instance"] == moved["name"] > 0.5


@pytest.mark.parametrize("peft", [False, True])
def test_a_value_model_in_half_precision_learns(tmp_path, half_base, peft):
    folder, dtype = half_base
    value_model = classifier(folder).to(dtype)
    if peft:
        value_model = get_peft_model(value_model, lora(task_type="SEQ_CLS"), autocast_adapter_dtype=False)
        assert dtype in trained_dtypes(value_model)
    trainer = make_trainer(
        tmp_path, value_model=value_model, config={"critic_backbone_learning_rate": 1e-5, "max_steps": 3}
    )
    assert trained_dtypes(trainer.model.value_model) == {torch.float32}
    moved = share_moved(trainer, trainer.model.value_model)
    assert moved > (0.2 if peft else 0.5)


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_an_adapter_in_half_precision_is_held_in_fp32(tmp_path, half_base, critic):
    folder, dtype = half_base
    base = LlamaForCausalLM.from_pretrained(folder)
    model = get_peft_model(
        base, lora(modules_to_save=["lm_head", "embed_tokens", "norm"]), autocast_adapter_dtype=False
    )
    assert trained_dtypes(model) == {dtype}
    trainer = make_trainer(
        tmp_path, model=model, peft_config=None, config={"max_steps": 3, "learning_rate": 1e-5, "critic": critic}
    )
    assert trained_dtypes(trainer.model) == {torch.float32}
    assert {p.dtype for name, p in base.named_parameters() if name.endswith("base_layer.weight")} == {dtype}
    weights = {n: p.detach().clone() for n, p in trainer.model.policy.named_parameters()}
    trainer.train()
    assert abs(trainer.state.log_history[0]["kl"]) < 1e-6  # the reference's copies compute in the same precision
    for part in ("lm_head", "norm", "lora_B"):
        own = [n for n in weights if part in n and ".default" in n]
        policy = dict(trainer.model.policy.named_parameters())
        assert own and all((policy[n] != weights[n]).float().mean() > 0.5 for n in own)


def test_modules_that_a_new_adapter_trains_whole_are_held_in_fp32(tmp_path, half_base):
    """PEFT casts LoRA matrices, and leaves `modules_to_save` in the base's precision."""
    folder, _ = half_base
    trainer = make_trainer(
        tmp_path, model=str(folder), peft_config=lora(modules_to_save=["lm_head"]),
        config={"max_steps": 2, "learning_rate": 1e-5},
    )  # fmt: skip
    head = trainer.model.policy.get_output_embeddings().modules_to_save["default"].weight
    before = head.detach().clone()
    trainer.train()
    assert head.dtype == torch.float32 and (head != before).float().mean() > 0.9
    trainer.save_model()
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), tmp_path)
    assert again.get_output_embeddings().modules_to_save["default"].weight.shape == head.shape


@pytest.mark.parametrize("peft", [False, True])
def test_a_reward_model_in_half_precision_learns(tmp_path, half_base, peft):
    folder, dtype = half_base
    model = classifier(folder).to(dtype)
    if peft:
        model = get_peft_model(model, lora(task_type="SEQ_CLS"), autocast_adapter_dtype=False)
        torch.nn.init.normal_(next(p for n, p in model.named_parameters() if "lora_B" in n))
    trainer = reward_trainer(tmp_path, model)
    assert trained_dtypes(trainer.model) == {torch.float32}
    assert share_moved(trainer, trainer.model) > (0.01 if peft else 0.4)
    assert trainer.evaluate(eval_dataset=PAIRS)["eval_loss"] > 0


def test_a_precision_that_was_asked_for_is_kept_and_named(tmp_path, half_base):
    folder, dtype = half_base
    name = str(dtype).removeprefix("torch.")
    for asked in (name, dtype, "auto"):
        config = {"model_init_kwargs": {"dtype": asked}}
        with pytest.warns(UserWarning, match=f"{name}.*learning_rate=0.01"):
            trainer = make_trainer(tmp_path, model=str(folder), peft_config=None, config=config)
        assert trained_dtypes(trainer.model.policy) == {dtype}
    with pytest.warns(UserWarning, match=name):
        reward_trainer(tmp_path, str(folder), config={"model_init_kwargs": {"dtype": name}})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_trainer(tmp_path, model=str(folder), config=config)  # an adapter
        make_trainer(tmp_path, model=str(folder), peft_config=None)


def test_fp16_weights_whose_gradients_cannot_be_unscaled_are_refused(tmp_path, base):
    config = {"model_init_kwargs": {"dtype": "float16"}, "fp16": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fp16=True has no effect on a CPU")
        with pytest.raises(ValueError, match="float16.*fp16=True"):
            make_trainer(tmp_path, model=str(base), peft_config=None, config=config)
        with pytest.raises(ValueError, match="float16.*fp16=True"):
            reward_trainer(tmp_path, str(base), config=config)
        make_trainer(tmp_path, model=str(base), config=config)  # control: an adapter in fp32

"""Score heads with a bias, value heads of LLaMA-Factory, and heads that are none: each counts, or is named."""

from __future__ import annotations

import copy
import json
import shutil
import warnings

import pytest
import torch
from conftest import classifier, lora, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from ppo_plus import RewardConfig, RewardTrainer
from ppo_plus.integrations.trl_legacy import export_with_value_head
from ppo_plus.models.score_heads import read_v_head
from ppo_plus.rewards import Completions

BATCH = Completions(["the sea", "so"], [" is", " x"], [[10, 11, 12], [5]])
TEXTS = ["the sea is<eos>", "so x<eos>"]


def with_bias(base, bias=5.0):
    model = classifier(base)
    model.score = torch.nn.Linear(32, 1)
    torch.nn.init.normal_(model.score.weight)
    torch.nn.init.constant_(model.score.bias, bias)
    return model


def one_by_one(model):
    with torch.no_grad():
        return [
            model.eval()(input_ids=torch.tensor([ids])).logits.item() for ids in make_tokenizer()(TEXTS)["input_ids"]
        ]


def reward_of(tmp_path, base, reward, **overrides):
    trainer = make_trainer(tmp_path / "out", model=str(base), reward_funcs=str(reward), **overrides)
    return trainer, trainer.collector.rewards.rewards[0]


def test_the_bias_of_a_classifier_that_is_loaded_by_name_counts(tmp_path, base):
    model = with_bias(base)
    model.save_pretrained(tmp_path / "reward")
    make_tokenizer().save_pretrained(tmp_path / "reward")
    _, reward = reward_of(tmp_path, base, tmp_path / "reward")
    assert reward(BATCH) == pytest.approx(one_by_one(model), abs=1e-5)
    model.score.bias.data.zero_()
    assert reward(BATCH)[0] - one_by_one(model)[0] == pytest.approx(5.0, abs=1e-5)  # control: it is what differs


@pytest.fixture(scope="module")
def adapter_with_bias(base, tmp_path_factory):
    """What RewardTrainer saves of a head with a bias, and its scores alone."""
    folder = tmp_path_factory.mktemp("bias") / "reward"
    trainer = RewardTrainer(
        with_bias(base), RewardConfig(str(folder), max_steps=1, report_to="none", use_cpu=True), peft_config=lora(),
        train_dataset=Dataset.from_dict({"chosen": ["see"] * 8, "rejected": ["xx"] * 8}),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    plain = PeftModel.from_pretrained(with_bias(base, 0.0), folder)
    return folder, one_by_one(plain)


def test_the_bias_of_a_reward_adapter_counts_in_scores_and_in_the_critic(tmp_path, base, adapter_with_bias):
    folder, alone = adapter_with_bias
    trainer, reward = reward_of(tmp_path, base, folder, config={"critic": "adapter", "reward_weights": [3.0]})
    assert reward(BATCH) == pytest.approx(alone, abs=1e-5) and min(alone) > 1
    ids = make_tokenizer()("the sea is<eos>", return_tensors="pt")["input_ids"]
    padded = torch.cat([ids, ids[:, -1:]], 1)  # the value before the last token is the score of the text before it
    with torch.no_grad():
        value = trainer.model.eval()(padded, torch.ones_like(padded), 1).values.item()
    assert value == pytest.approx(3 * alone[0], abs=1e-4)


@pytest.mark.parametrize("by_name", [True, False])
def test_the_bias_of_a_value_model_starts_the_value_head(tmp_path, base, by_name):
    model = with_bias(base)
    expected = copy.deepcopy(model.score)
    model.save_pretrained(tmp_path / "critic")
    head = make_trainer(tmp_path, value_model=str(tmp_path / "critic") if by_name else model).model.value_head.layers[0]
    assert torch.equal(head.weight, expected.weight) and torch.equal(head.bias, expected.bias)


# LLaMA-Factory


def value_head(folder, form="value_head.safetensors"):
    torch.manual_seed(3)
    head = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.tensor([0.7])}
    if form.endswith("bin"):
        torch.save(head, folder / form)
    elif form == "model.safetensors":
        save_file({**load_file(folder / form), **head}, folder / form, metadata={"format": "pt"})
    else:
        save_file(head, folder / form)
    return head


def v_head_scores(model, head):
    """Scores as LLaMA-Factory computes them: the value at the last attended token, of the last hidden state."""
    scores = []
    for ids in make_tokenizer()(TEXTS)["input_ids"]:
        with torch.no_grad():
            hidden = model.eval()(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        values = torch.nn.functional.linear(hidden, head["v_head.summary.weight"], head["v_head.summary.bias"])
        scores.append(values[0, -1, 0].item())
    return scores


@pytest.mark.parametrize("form", ["value_head.safetensors", "value_head.bin", "pytorch_model.bin"])
def test_a_causal_adapter_with_a_value_head_is_a_reward_model(tmp_path, base, form):
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), lora(init_lora_weights=False))
    model.save_pretrained(tmp_path / "reward")
    make_tokenizer(pad_token="<eos>").save_pretrained(tmp_path / "reward")  # as LLaMA-Factory pads Llama 3
    head = value_head(tmp_path / "reward", form)
    trainer, reward = reward_of(tmp_path, base, tmp_path / "reward", config={"critic": "adapter"})
    assert reward(BATCH) == pytest.approx(v_head_scores(model, head), abs=1e-4)
    start = trainer.model.value_head.layers[0]
    assert torch.equal(start.weight, head["v_head.summary.weight"])
    assert torch.equal(start.bias, head["v_head.summary.bias"])


@pytest.mark.parametrize("form", ["value_head.safetensors", "model.safetensors"])
def test_a_whole_language_model_with_a_value_head_is_a_reward_model(tmp_path, base, form):
    folder = shutil.copytree(base, tmp_path / "reward")
    head = value_head(folder, form)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 2}))  # does not move what is read
    _, reward = reward_of(tmp_path, base, folder)
    assert reward(BATCH) == pytest.approx(v_head_scores(make_model(), head), abs=1e-4)


def test_a_policy_with_a_critic_of_ppo_plus_is_no_reward_model(tmp_path, base):
    trainer = make_trainer(tmp_path / "out", model=str(base))
    trainer.save_model(tmp_path / "policy")
    assert read_v_head(tmp_path / "policy") == {}
    with pytest.raises(ValueError, match=r"score head has shape \[\].*v_head.summary.weight"):
        make_trainer(tmp_path / "out", model=str(base), reward_funcs=str(tmp_path / "policy"))
    export_with_value_head(trainer.model, tmp_path / "exported", "llama_factory")
    assert read_v_head(tmp_path / "exported").keys() == {"weight", "bias"}


# Heads that are none


def changed(folder, tmp_path, change):
    folder = shutil.copytree(folder, tmp_path / "changed")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(change(weights), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def test_names_that_peft_gives_a_trained_copy_are_known(tmp_path, base, reward_adapter):
    def change(weights):
        score = weights.pop("base_model.model.score.weight")
        return {
            **weights,
            "base_model.model.score.modules_to_save.default.weight": score,
            "base_model.model.score.original_module.weight": score + 1,
        }

    _, expected = reward_of(tmp_path, base, reward_adapter)
    _, found = reward_of(tmp_path, base, changed(reward_adapter, tmp_path, change))
    assert found(BATCH) == expected(BATCH)


OTHER_HEADS = {
    "classifier": lambda w: {k.replace("score.", "classifier."): t for k, t in w.items()},
    "two labels": lambda w: {k: torch.ones(2, 32) if "score" in k else t for k, t in w.items()},
    "two biases": lambda w: {**w, "base_model.model.score.bias": torch.ones(2)},
    "none": lambda w: {k: t for k, t in w.items() if "score" not in k},
}


@pytest.mark.parametrize(("kind", "change"), OTHER_HEADS.items(), ids=OTHER_HEADS)
def test_an_adapter_with_another_head_is_named_before_weights_are_loaded(
    tmp_path, base, reward_adapter, monkeypatch, kind, change
):
    folder = changed(reward_adapter, tmp_path, change)
    monkeypatch.setattr("ppo_plus.training.setup.load_policy_from_args", None)
    says = {
        "classifier": r"shape \[\].*classifier.weight",
        "two labels": r"\(2, 32\)",
        "two biases": r"\(2,\)",
        "none": r"\[\]",
    }
    with pytest.raises(ValueError, match=f"changed.*{says[kind]}"):
        reward_of(tmp_path, base, folder)


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_that_further_training_leaves_out_is_named(tmp_path, base, bias):
    (with_bias(base) if bias else classifier(base)).save_pretrained(tmp_path / "judge")
    args = RewardConfig(str(tmp_path / "out"), use_cpu=True, report_to="none")
    pairs = Dataset.from_dict({"chosen": ["good"] * 4, "rejected": ["bad"] * 4})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RewardTrainer(str(tmp_path / "judge"), args, train_dataset=pairs, processing_class=make_tokenizer())
    assert any("bias of the score head" in str(w.message) for w in caught) is bias


@pytest.mark.parametrize("role", ["reward_funcs", "value_model"])
@pytest.mark.parametrize("name", ["value_head", "reward_head", "lm_head"])
def test_a_head_of_another_name_is_not_replaced_by_one_without_training(tmp_path, base, role, name):
    """OpenRLHF writes `value_head` where it is told to; a language model's own head is none for scores."""
    folder = tmp_path / "judge"
    classifier(base).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    make_trainer(tmp_path / "out", **{role: str(folder)})  # control
    weights = load_file(folder / "model.safetensors")
    save_file({f"{name}.weight": weights.pop("score.weight"), **weights}, folder / "model.safetensors")
    if (role, name) == ("value_model", "lm_head"):
        return make_trainer(tmp_path / "out", **{role: str(folder)})  # a critic may start from a language model
    with pytest.raises(ValueError, match="lack score.weight" if name == "lm_head" else rf"head .*\({name}.weight\)"):
        make_trainer(tmp_path / "out", **{role: str(folder)})


def test_a_head_of_several_layers_is_named(tmp_path, base):
    folder = tmp_path / "reward"
    classifier(base).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {**weights, "reward_head.0.weight": torch.ones(4, 32)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match="reward_head.0.weight"):
        reward_of(tmp_path, base, folder)

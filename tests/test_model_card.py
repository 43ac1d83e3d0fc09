"""The README of a saved model: names instead of paths, code that runs, metadata that the Hub takes."""

from __future__ import annotations

import copy
import math
import pickle
import re

import pytest
import torch
import yaml
from conftest import (
    CHAT_TEMPLATE,
    classifier,
    close,
    lora,
    make_model,
    make_prompts,
    make_tokenizer,
    make_trainer,
)  # fmt: skip
from datasets import Dataset
from hub_server import Hub
from huggingface_hub import ModelCard, constants
from peft import IA3Config, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ppo_plus import RewardConfig, RewardTrainer
from ppo_plus.algo.statistics import pairwise_calibration_error
from ppo_plus.models.adapter_files import display_name, hub_name
from ppo_plus.training.model_card import MARK, base_license, describe

PAIRS = Dataset.from_dict({"chosen": ["he sees the sea"] * 8, "rejected": ["a bad plot"] * 8})
EVALUATED = {"eval_strategy": "steps", "eval_steps": 4}


def make_reward_trainer(folder, base, *, tokenizer=None, peft_config="lora", **config):
    defaults = {"report_to": "none", "use_cpu": True, "max_steps": 2, "disable_tqdm": True, "logging_steps": 1,
                "dataloader_pin_memory": False, "per_device_train_batch_size": 4, "save_strategy": "no"}  # fmt: skip
    return RewardTrainer(
        str(base), RewardConfig(str(folder), **{**defaults, **config}), train_dataset=PAIRS, eval_dataset=PAIRS,
        peft_config=lora() if peft_config == "lora" else peft_config, processing_class=tokenizer or make_tokenizer(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """A policy and a reward model, trained with checkpoints and saved next to their base."""
    folder = tmp_path_factory.mktemp("runs")
    saving = {"save_strategy": "steps", "save_steps": 4}
    policy = make_trainer(
        folder / "policy", model=str(base), config=EVALUATED | saving,
        eval_dataset={"easy": make_prompts(4), "hard": make_prompts(8)}, processing_class=make_tokenizer(CHAT_TEMPLATE),
    )  # fmt: skip
    policy.train()
    unsaved = (folder / "policy" / "README.md").read_text()
    policy.save_model()
    reward = make_reward_trainer(folder / "reward", base, save_strategy="steps", save_steps=1)
    reward.train()
    reward.save_model()
    return folder, policy, reward, unsaved


def cards(folder):
    return {file.parent.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("README.md")}


def run_blocks(card, folder, monkeypatch):
    """Run the Python of a card in a folder that holds the model and its base; return the variables."""
    monkeypatch.chdir(folder)
    variables = {}
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(block, variables)
    return variables


def test_every_folder_has_its_card_and_none_has_a_template_or_a_path(runs, base):
    folder = runs[0]
    found = cards(folder)
    assert found.keys() == {
        "policy", "policy/checkpoint-4", "policy/checkpoint-8", "reward", "reward/checkpoint-1", "reward/checkpoint-2",
    }  # fmt: skip
    for where, card in found.items():
        assert "More Information Needed" not in card and str(folder) not in card and str(base.parent) not in card
        assert f'from_pretrained("{where}")' in card and f"`{base.name}`" in card
        assert ("curves.svg" in card) == (folder / where / "curves.svg").is_file()


def test_the_card_of_a_policy_loads_actor_and_critic(runs, base, monkeypatch):
    folder, trainer, *_ = runs
    (folder / base.name).exists() or (folder / base.name).symlink_to(base)
    found = run_blocks((folder / "policy" / "README.md").read_text(), folder, monkeypatch)
    inputs = found["inputs"]
    with torch.no_grad():
        expected = trainer.model.eval().policy(**inputs, output_hidden_states=True)
        values = trainer.model.value_head(expected.hidden_states[-1])
        close(found["model"].eval()(**inputs).logits, expected.logits)
        plain = AutoModelForCausalLM.from_pretrained(base)(**inputs).logits
    close(found["values"][..., 0], values)
    fresh = make_trainer(folder / "fresh", model=str(base))
    fresh.model.load_weights(folder / "policy")  # as the card says
    assert torch.equal(fresh.model.value_head.layers[0].weight, trainer.model.value_head.layers[0].weight)
    assert (plain - expected.logits).abs().max() > 1 and values.abs().max() > 0.01  # controls: the base, a new head


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
@pytest.mark.parametrize("peft_config", ["lora", None])
def test_the_card_of_a_reward_model_scores_as_the_trainer_does(base, tmp_path, monkeypatch, template, peft_config):
    options = {"tokenizer": make_tokenizer(template), "peft_config": peft_config}
    trainer = make_reward_trainer(tmp_path / "reward", base, learning_rate=1e-2, **options)
    trainer.train()
    trainer.save_model()
    (tmp_path / base.name).symlink_to(base)
    found = run_blocks((tmp_path / "reward" / "README.md").read_text(), tmp_path, monkeypatch)
    text = found.get("text", "a bad plot<eos>")
    score = found["pipe"](text, add_special_tokens=False)[0]["score"]
    with torch.no_grad():
        inputs = found["tokenizer"](text, return_tensors="pt", add_special_tokens=False)
        assert abs(score - trainer.model.eval()(**inputs).logits.item()) < 1e-5
        assert abs(score - classifier(base)(**inputs).logits.item()) > 1e-3  # control: an untrained one


def test_the_numbers_of_the_card_are_those_of_the_run(runs):
    folder, policy, reward, _ = runs
    card = (folder / "policy" / "README.md").read_text()
    first = next(row for row in policy.state.log_history if "reward" in row)
    assert f"| {first['step']} | {first['reward']:.3f} | {first['kl']:.3f} |" in card
    for name in ("easy", "hard"):
        last = [row for row in policy.state.log_history if f"eval_{name}_reward" in row][-1]
        assert f"| {name} | 8 | {last[f'eval_{name}_reward']:.3f} | {last[f'eval_{name}_kl']:.3f} | " in card
    for piece in ("| prompts | 16 |", "`count_e` (weight 1)", "| learning_rate | 0.01 |", "LORA, rank 4, alpha 8",
                  "- transformers ", "@article{schulman2017", "ppo-plus merge policy policy-merged"):  # fmt: skip
        assert piece in card, piece
    card, measured = (folder / "reward" / "README.md").read_text(), reward.calibrate()
    for value in (measured["accuracy"], measured["calibration_error"], measured["reward_mean"]):
        assert f" | {value:.4g} |" in card
    assert "calibration" not in (folder / "reward" / "checkpoint-1" / "README.md").read_text()  # not measured there


def test_after_training_the_card_loads_the_newest_checkpoint(runs):
    unsaved = runs[3]
    assert 'from_pretrained(base, "policy/checkpoint-8")' in unsaved and "save_model()" not in unsaved


def test_without_a_checkpoint_the_card_says_that_nothing_is_saved_yet(tmp_path):
    trainer = make_trainer(tmp_path / "run", config={"max_steps": 4})
    trainer.train()
    assert "`trainer.save_model()`" in (tmp_path / "run" / "README.md").read_text()
    trainer.save_model()
    assert "`trainer.save_model()`" not in (tmp_path / "run" / "README.md").read_text()


def test_the_hub_takes_each_card(runs, monkeypatch):
    policy = runs[1]
    policy.create_model_card(license="mit", dataset_name=["me/prompts", "/data/mine"], language="en", tags="mine")
    policy.save_model()  # with the arguments of before
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for where in cards(runs[0]):
            ModelCard.load(runs[0] / where / "README.md").validate()
        card = ModelCard.load(runs[0] / "policy" / "README.md")
        assert card.data.to_dict() == {
            "library_name": "peft", "pipeline_tag": "text-generation", "model_name": "policy", "license": "mit",
            "language": "en", "datasets": ["me/prompts"],
            "tags": ["ppo_plus", "ppo", "generated_from_trainer", "mine", "lora"],
        }  # fmt: skip
        wrong = {"license": "license", "base_model": "/home/me/base", "datasets": ["a b"], "tags": "x"}
        for field, value in wrong.items():
            bad = copy.deepcopy(card)
            bad.data[field] = value
            with pytest.raises(ValueError, match=field):
                bad.validate()


@pytest.mark.parametrize(
    ("name", "on_hub", "shown"),
    [
        ("org/model", "org/model", "org/model"), ("gpt2", "gpt2", "gpt2"), ("", None, ""),
        ("/home/me/.cache/huggingface/hub/models--org--a.b-1/snapshots/0f3c", "org/a.b-1", "org/a.b-1"),
        ("/data/org/model", None, "model"), ("./model", None, "model"),
    ],
)  # fmt: skip
def test_a_base_is_named_as_on_the_hub(name, on_hub, shown):
    assert (hub_name(name), display_name(name)) == (on_hub, shown)


def test_a_folder_that_reads_as_a_name_of_the_hub_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name("org/model") == "org/model"
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert hub_name("org/model") is None and display_name("org/model") == "model"


def test_the_license_is_that_of_the_base(tmp_path):
    assert base_license(str(tmp_path)) == {"license": "unknown"}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n# Base\n")
    assert base_license(str(tmp_path)) == {"license": "other", "license_name": "mine"}


def test_an_adapter_is_described_by_the_sizes_that_it_has():
    assert describe(lora()) == "LORA, rank 4, alpha 8"
    assert describe(VeraConfig(r=16)) == "VERA, rank 16" and describe(IA3Config()) == "IA3" and describe(None) == ""


def test_a_card_that_was_edited_is_kept(tmp_path):
    trainer = make_trainer(tmp_path / "run", config={"max_steps": 4})
    file = tmp_path / "run" / "README.md"
    trainer.save_model()
    written = file.read_text()
    file.write_text(written.replace("# run", "# Mine"))
    trainer.save_model()
    assert file.read_text() == written  # its mark is there: written again
    file.write_text("# Mine")
    with pytest.warns(UserWarning, match=r"README\.md"):
        trainer.save_model()
    assert file.read_text() == "# Mine" and MARK not in file.read_text()
    file.write_text("# Model Card for Model ID\n")  # PEFT's, of another run
    trainer.save_model()
    assert file.read_text() == written


def test_peft_itself_writes_no_template(runs, base, tmp_path):
    _, policy, reward, _ = runs
    policy.model.save_pretrained(tmp_path / "actor_critic")
    policy.model.policy.save_pretrained(tmp_path / "policy")
    reward.model.save_pretrained(tmp_path / "reward")
    copied = copy.deepcopy(policy.model.policy)
    copied.save_pretrained(tmp_path / "copy")
    assert pickle.dumps(copied.create_or_update_model_card)
    assert not [*tmp_path.rglob("README.md")]
    plain = get_peft_model(make_model(), lora())
    plain.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / "README.md").is_file()  # control


def test_the_header_has_no_placeholder(runs):
    header = yaml.safe_load((runs[0] / "reward" / "README.md").read_text().split("---\n")[1])
    assert header["license"] == "unknown" and header["pipeline_tag"] == "text-classification"
    assert "base_model" not in header


# Calibration


def test_the_calibration_error_by_hand():
    third = math.log(2)  # sigmoid(log 2) = 2/3
    # One bin: 3 pairs with p = 2/3, of which 2 are in the right order. Calibrated.
    assert abs(pairwise_calibration_error(torch.tensor([third, third, -third]))) < 1e-6
    # All right: the share is 1, the mean of p is 2/3.
    assert abs(pairwise_calibration_error(torch.tensor([third] * 3)) - 1 / 3) < 1e-6
    # Two bins of ten: (1 * |0 - 2/3| + 1 * |1 - 0.9|) / 2.
    assert abs(pairwise_calibration_error(torch.tensor([-third, math.log(9)])) - (2 / 3 + 0.1) / 2) < 1e-6
    assert pairwise_calibration_error(torch.zeros(4)) == 0.0  # ties are predicted as ties
    assert pairwise_calibration_error(torch.tensor([-1e9, 1e9])) == 0.5  # sure, and wrong half of the time
    assert math.isnan(pairwise_calibration_error(torch.zeros(0)))


def test_scores_of_the_right_scale_are_calibrated():
    generator = torch.Generator().manual_seed(0)
    margins = torch.randn(200_000, generator=generator).mul(2)
    order = torch.where(torch.rand(len(margins), generator=generator) < margins.sigmoid(), 1.0, -1.0)
    assert pairwise_calibration_error(margins * order) < 0.01
    assert pairwise_calibration_error(3 * margins * order) > 0.1  # too sure
    assert pairwise_calibration_error(margins * order / 3) > 0.1  # too unsure

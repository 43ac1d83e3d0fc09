"""A reward model trained again, on several sets of pairs or on others, and given as its users have it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import lora, make_model, make_tokenizer
from datasets import Dataset
from transformers import TrainerCallback

from ppo_plus import RewardConfig, RewardTrainer
from ppo_plus.cli import launch

RECIPES = Path(__file__).parents[1] / "recipes"


def pairs(n, better="e", length=4):
    """The better letter ends the chosen text, `x` the rejected one."""
    texts = ["abcdfgh"[i % 7] * (1 + i % length) for i in range(n)]
    return Dataset.from_dict({"chosen": [t + better for t in texts], "rejected": [t + "x" for t in texts]})


def make_reward_trainer(base, folder, eval_dataset=None, config=None, **overrides):
    args = RewardConfig(
        **{"output_dir": str(folder), "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
           "max_steps": 2, "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no", "use_cpu": True,
           "disable_tqdm": True, "dataloader_pin_memory": False, "bf16": False, **(config or {})}
    )  # fmt: skip
    given = {"peft_config": lora(), "train_dataset": pairs(16), "processing_class": make_tokenizer()}
    return RewardTrainer(**{"model": base, "args": args, "eval_dataset": eval_dataset, **given, **overrides})


def saved(folder):
    return json.loads((folder / "reward_model.json").read_text())


def measured(trainer, *datasets):
    """Mean, deviation, accuracy and calibration error of rewards, one text at a time."""
    scores = []
    for row in (row for dataset in datasets for row in dataset):
        for name in ("chosen", "rejected"):
            ids = make_tokenizer()(row[name] + "<eos>", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scores.append(trainer.model.eval()(input_ids=ids).logits.item())
    both = torch.tensor(scores)
    chosen, rejected = both.view(-1, 2).T
    bins = {}  # by tenth of [0.5, 1]: whether a pair is right, less how probable that was
    for margin in (chosen - rejected).tolist():
        probability = 1 / (1 + math.exp(-abs(margin)))
        bins.setdefault(int((probability - 0.5) * 20), []).append((margin > 0) - probability)
    return {
        "calibration_error": pytest.approx(sum(abs(sum(gaps)) for gaps in bins.values()) / len(chosen), abs=1e-5),
        "reward_mean": pytest.approx(both.mean().item(), abs=1e-5),
        "reward_std": pytest.approx(both.std(unbiased=False).item(), abs=1e-5),
        "accuracy": pytest.approx((chosen > rejected).float().mean().item()),
        "pairs": len(chosen),
    }


def test_several_sets_of_pairs_are_calibrated_on_together(base, tmp_path):
    parts = {"few": pairs(6), "others": pairs(10, better="z", length=7)}
    trainer = make_reward_trainer(str(base), tmp_path, parts)
    trainer.train()
    trainer.save_model()
    assert saved(tmp_path) == {**saved(tmp_path), **measured(trainer, *parts.values()), "step": 2}
    assert saved(tmp_path)["reward_mean"] != measured(trainer, parts["few"])["reward_mean"]  # control
    assert trainer.calibrate(parts) == trainer.calibrate()
    assert trainer.calibrate(parts["others"]) == {**measured(trainer, parts["others"]), "step": 2}


def test_other_pairs_are_not_mistaken_for_those_of_evaluations_whose_workers_persist(base, tmp_path):
    config = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make_reward_trainer(str(base), tmp_path, pairs(4), config)
    trainer.evaluate()
    assert trainer.calibrate(pairs(8))["pairs"] == 8


@pytest.mark.parametrize("nothing", [{"eval_dataset": {}}, {"config": {"dataloader_drop_last": True}}])
def test_a_model_is_saved_though_nothing_can_be_measured(base, tmp_path, nothing):
    trainer = make_reward_trainer(str(base), tmp_path, **{"eval_dataset": pairs(3), **nothing})
    with pytest.raises(ValueError, match="There is no pair to calibrate on.*Pass more pairs"):
        trainer.calibrate()
    with pytest.warns(UserWarning, match="saved without a calibration. There is no pair"):
        trainer.save_model()
    assert "accuracy" not in saved(tmp_path) and (tmp_path / "adapter_model.safetensors").is_file()


def test_training_again_is_calibrated_again(base, tmp_path):
    held_out = pairs(8)
    trainer = make_reward_trainer(str(base), tmp_path, held_out)
    for _ in range(2):
        trainer.train()
        trainer.save_model()
        assert saved(tmp_path) == {**saved(tmp_path), **measured(trainer, held_out), "step": 2}


class Steps(TrainerCallback):
    def __init__(self):
        self.begun = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun.append(state.global_step)


class Calibrate(TrainerCallback):
    """Asks for the calibration at each evaluation, as a user's callback may."""

    def on_evaluate(self, args, state, control, **kwargs):
        self.found = self.trainer.calibrate()


def test_the_best_model_is_calibrated_and_not_the_last(base, tmp_path):
    config = {
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    held_out, asks = pairs(8), Calibrate()
    trainer = make_reward_trainer(str(base), tmp_path, held_out, config, callbacks=[asks])
    asks.trainer = trainer
    trainer.train(resume_from_checkpoint=None)
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    trainer.save_model()
    assert saved(tmp_path) == {**saved(tmp_path), **measured(trainer, held_out)}
    assert asks.found["reward_mean"] != saved(tmp_path)["reward_mean"]  # control: of the last


def test_training_passes_its_arguments_on(base, tmp_path):
    config = {"save_strategy": "steps", "save_steps": 1}
    make_reward_trainer(str(base), tmp_path, config=config).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    for given, named in (([checkpoint], {}), ([], {"resume_from_checkpoint": checkpoint})):
        steps = Steps()
        trainer = make_reward_trainer(str(base), tmp_path, config={"max_steps": 3}, callbacks=[steps])
        assert trainer.train(*given, **named).global_step == 3
        assert steps.begun == [2]


def test_a_base_is_given_as_a_path(base, tmp_path):
    assert isinstance(base, Path)
    trainer = make_reward_trainer(base, tmp_path)
    trainer.save_model()
    assert saved(tmp_path)["base_model"] == str(base)


@pytest.mark.parametrize("given", [{"peft_type": "LORA", "r": 4}, "lora"])
def test_an_adapter_is_described_by_a_configuration(base, tmp_path, given):
    with pytest.raises(TypeError, match=f"peft_config must be a PeftConfig; got {type(given).__name__}. Pass LoraConf"):
        make_reward_trainer(str(base), tmp_path, peft_config=given)


def test_other_pairs_may_take_the_place_of_those_that_were_passed(base, tmp_path):
    trainer = make_reward_trainer(str(base), tmp_path / "changed", pairs(4))
    trainer.train_dataset, trainer.eval_dataset = pairs(12, better="z"), pairs(8, better="z")
    trainer.train()
    expected = make_reward_trainer(str(base), tmp_path / "passed", train_dataset=pairs(12, better="z"))
    expected.train()
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], weight), name
    assert trainer.calibrate() == {**measured(trainer, pairs(8, better="z")), "step": 2}
    trainer.eval_dataset = pairs(6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.evaluate(pairs(6))["eval_loss"], abs=1e-6)
    trainer.eval_dataset = {"a": pairs(6), "b": pairs(4)}
    assert trainer.evaluate()["eval_a_loss"] == pytest.approx(expected.evaluate(pairs(6))["eval_loss"], abs=1e-6)
    assert trainer.calibrate()["pairs"] == 10


# Recipes


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a base, six prompts and a reward function."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(RECIPES / "demo"))
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    rows = {"prompt": ["tell me", "why", "the sea", "a film", "bread", "so"]}
    Dataset.from_dict(rows).to_json(tmp_path / "prompts.jsonl")
    Dataset.from_dict({"chosen": rows["prompt"], "rejected": ["x"] * 6}).to_json(tmp_path / "pairs.jsonl")
    (tmp_path / "my_rewards.py").write_text(
        "def count_e(completions, **kwargs):\n    return [c.count('e') for c in completions]\n"
    )
    return tmp_path


@pytest.mark.parametrize("form", ["my_rewards:count_e", "[my_rewards:count_e]"])
def test_a_reward_in_a_yaml_file_needs_no_list(here, form):
    (here / "run.yaml").write_text(
        f"reward_funcs: {form}\nmodel_name_or_path: base\ndataset_name: prompts.jsonl\noutput_dir: out\n"
        "use_peft: true\nlora_target_modules: all-linear\nuse_cpu: true\nreport_to: none\nhtml_report: false\n"
        "num_sample_generations: 0\nresponse_length: 4\nmax_steps: 1\nper_device_train_batch_size: 2\n"
        "gradient_accumulation_steps: 1\nnum_mini_batches: 1\nnum_ppo_epochs: 1\ndisable_tqdm: true\nlogging_steps: 1\n"
        "dataloader_pin_memory: false\n"
    )
    launch.run("ppo", ["--config", "run.yaml"])
    history = json.loads((here / "out" / "trainer_state.json").read_text())["log_history"]
    assert "rewards/count_e/mean" in history[0]


@pytest.mark.parametrize("command", ["ppo", "reward"])
@pytest.mark.parametrize("rows", ["-4", "2.5", "true"])
@pytest.mark.parametrize("split", [[], ["--dataset_test_split", "test"]])
def test_rows_to_evaluate_on_are_counted(here, capsys, command, rows, split):
    (here / "run.yaml").write_text(f"eval_rows: {rows}\n")  # 2.5 is refused on the command line; a file can say it
    data = ["--dataset_name", "prompts.jsonl"] + (["--reward_funcs", "x:y"] if command == "ppo" else [])
    with pytest.raises(SystemExit) as stop:
        launch.run(command, ["--config", "run.yaml", "--output_dir", "out", *data, *split])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert re.search(rf"eval_rows must be .*; got {yaml.safe_load(rows)}\.", error), error


COUNTS = ["num_pairs", "num_eval_pairs", "pair_tokens", "num_prompts", "num_eval_prompts", "prompt_tokens",
          "kl_horizon", "top_layers"]  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_the_demos_counts_are_counts(here, monkeypatch, name):
    from rm_then_ppo import DemoArguments

    for value in (-4, 0, 2.5):
        with pytest.raises(ValueError, match=rf"--{name} must be a whole number, 1 or more; got {value}"):
            DemoArguments(**{name: value})
    assert getattr(DemoArguments(**{name: 1}), name) == 1

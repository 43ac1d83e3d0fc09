"""The demo recipe, from its YAML file, on the real model for a few steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes" / "demo"))
import demo_assets  # noqa: E402
from rm_then_ppo import fast_precision  # noqa: E402


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


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_reward_model_then_ppo_on_the_real_model(tmp_path, load_in_4bit):
    base = real_model()
    config = yaml.safe_load((ROOT / "recipes" / "demo" / "rm_then_ppo.yaml").read_text())
    config |= {"num_pairs": 16, "num_eval_pairs": 8, "num_prompts": 16, "num_eval_prompts": 4}
    config["load_in_4bit"] = load_in_4bit
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

"""Two processes (DDP, gloo, CPU) train the policy that one process trains with twice the micro-batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
from conftest import lora, make_trainer
from ppo_plus import AdaptiveKLCallback, RewardNormalizationCallback

trainer = make_trainer(
    {folder!r},
    config={{"max_steps": {steps}, "save_strategy": "steps", "save_steps": 3, "ddp_backend": "gloo", **{config}}},
    peft_config=lora(),
    callbacks=[AdaptiveKLCallback(target=1.0, horizon=20), RewardNormalizationCallback()],
)
trainer.train(resume_from_checkpoint={resume!r})
state = {{n: p for n, p in trainer.model.named_parameters() if p.requires_grad}}
flat = torch.cat([p.detach().flatten() for p in state.values()])
everywhere = trainer.accelerator.gather(flat[None])
assert all(torch.equal(row, flat) for row in everywhere), "the processes do not hold the same weights"
if trainer.accelerator.is_main_process:
    trainer.save_model({folder!r} + "/final")
    print("RESULT" + json.dumps({{"processes": trainer.accelerator.num_processes, "sum": flat.double().sum().item(),
                                  "norm": flat.double().norm().item()}}))
"""


def launch(folder, *, steps=6, resume=None, config=None):
    folder.mkdir(exist_ok=True)
    script = folder / "train.py"
    tests = str(Path(__file__).parent)
    script.write_text(SCRIPT.format(tests=tests, folder=str(folder), steps=steps, resume=resume, config=config or {}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


@pytest.mark.slow
def test_two_processes_train_save_once_and_resume_to_the_same_bits(tmp_path):
    whole = launch(tmp_path / "whole")
    assert whole["processes"] == 2
    checkpoint = tmp_path / "whole" / "checkpoint-3"  # inside the first rollout
    saved = {f.name for f in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "value_head.safetensors", "manifest.json"} <= saved
    assert {"rollout_0.safetensors", "rollout_1.safetensors", "ppo_state_0.json", "ppo_state_1.json"} <= saved
    resumed = launch(tmp_path / "resumed", resume=str(checkpoint))
    assert resumed == whole
    final = {f.name for f in (tmp_path / "whole" / "final").iterdir()}
    assert "adapter_model.safetensors" in final and "model.safetensors" not in final

"""The benchmarks that wait for a GPU run through on a CPU, as far as that shows anything, on tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model

from ppo_plus.kernels.cpu_attention import EAGER_GQA

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from _utils import answer_continuously  # noqa: E402

PROMPTS, LENGTHS = [[5, 6, 7], [8, 9, 10, 11, 12], [33]], [4, 30, 2]


@pytest.mark.parametrize("attention", ["sdpa", EAGER_GQA])
def test_continuous_batching_answers_as_generate_does(attention):
    """Greedily, to the same ids, once and once more with the manager kept; our own attention it does not know."""
    model = make_model().eval()
    expected = [
        model.generate(torch.tensor([p]), do_sample=False, min_new_tokens=n, max_new_tokens=n)[0, len(p) :].tolist()
        for p, n in zip(PROMPTS, LENGTHS, strict=True)
    ]
    model.config._attn_implementation = attention
    for _ in range(2):
        assert answer_continuously(model, PROMPTS, LENGTHS, do_sample=False) == expected
        assert model.config._attn_implementation == attention


def tiny_run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), "--tiny", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_decode_path_runs():
    """One that fails on a card is reported as an error, and is no comparison."""
    paths = tiny_run("gpu_speed.py", "--precisions", "bf16")["tiny"]["bf16"]["decode"]
    assert paths.keys() == {"ours", "generate", "generate, static cache", "generate_batch"}
    assert all(path.get("tokens_per_second", 0) > 0 for path in paths.values()), paths


def test_a_run_under_a_cap_takes_the_sizes_of_the_plan():
    (run,) = tiny_run("gpu_memory.py", "--models", "qwen2.5-7b", "--caps", "12")["runs"]
    assert run["ran"] and run["planner_says_it_fits"], run
    assert run["response_tokens"] > 0
    assert {planned == taken for planned, taken in (run["decode_rows"], run["forward_rows"])} == {True}

"""benchmarks/vs_grpo.py and the tables that it and cards.py fill: figures by hand."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import tables
import vs_grpo


@pytest.mark.parametrize("text", ["256", "x48", "256x", "0x48", "-1x48", "256x48x2", "axb"])
def test_a_shape_is_two_positive_numbers(text):
    assert vs_grpo.parse_shape("256x48") == (256, 48)
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        vs_grpo.parse_shape(text)


def test_medians_and_ratios():
    def run(seconds, peak):
        phases = [vs_grpo.split_phases(s, {"generate": 0.2 * s, "rollout": 0.3 * s}) for s in seconds]
        return {
            "seconds": seconds, "peak": peak, "tokens": 1536, "responses": 32, "phases": phases,
            "layer_tokens": [int(s) for s in seconds],
        }  # fmt: skip

    runs = {
        "grpo": [run([10.0, 30.0], 900.0), run([20.0], 1100.0)], "repeated": [run([15.0], 800.0)] * 2,
        "shared": [run([5.0], 400.0), run([7.0], 600.0)],
    }  # fmt: skip
    found = vs_grpo.summarize(runs, (256, 48))
    assert (found["grpo"]["seconds"], found["shared"]["seconds"]) == (20.0, 6.0)
    assert (found["time_ratio"], found["memory_ratio"]) == (pytest.approx(0.3), pytest.approx(0.5))
    assert (found["ratio"], found["over_repeated"]) == (pytest.approx(20 / 6), 2.5)
    phases = zip(vs_grpo.PHASES, (1.2, 0.6, 4.2), strict=True)
    assert found["shared"]["phases"] == {name: pytest.approx(seconds) for name, seconds in phases}
    assert found["shared"]["layer_tokens"] == 6
    on_a_gpu = {side: [{**one, "gpu_allocated": one["peak"] / 10} for one in done] for side, done in runs.items()}
    on_a_gpu["shared"][0]["gpu_allocated"] = 10.0
    assert vs_grpo.summarize(on_a_gpu, (256, 48))["memory_ratio"] == pytest.approx(0.35)


def test_an_update_is_the_same_work_on_both_sides():
    """Responses, optimizer steps and responses per step are derived as each trainer does."""
    theirs, repeated, ours = (vs_grpo.arguments(side, "out", 48, updates=3) for side in vs_grpo.SIDES)
    assert ours["max_steps"] == theirs["max_steps"] == 16
    assert repeated == ours | {"num_generations": 1} and ours["num_generations"] == theirs["num_generations"] == 4
    per_step = ours["per_device_train_batch_size"] * ours["gradient_accumulation_steps"]
    assert per_step * ours["num_mini_batches"] == 32
    per_generation = theirs["per_device_train_batch_size"] * theirs["steps_per_generation"]
    assert per_generation == 32 and per_generation // theirs["num_generations"] == 8
    assert theirs["num_iterations"] * theirs["steps_per_generation"] == 4 == ours["num_ppo_epochs"] * 2


def test_the_table_of_cards(tmp_path):
    fits = {"fits": True, "activation_checkpointing": True, "per_device_train_batch_size": 4, "peak_gib": 7.25}
    result = {
        "models_by_card": {"8": 1, "12": 1}, "prompt_length": 256, "response_length": 512,
        "models": {"7B": {"8": {**fits, "fits": False}, "12": fits}},
    }  # fmt: skip
    assert tables.cards_table(tmp_path) == ""
    (tmp_path / "cards.json").write_text(json.dumps(result))
    title, _, row, _, note = tables.cards_table(tmp_path).splitlines()
    assert title == "| Qwen2.5 in NF4 | 8 GB | 12 GB |"
    assert row == "| 7B | no | 4 rows\\*, 7.2 GB |"
    assert "256" in note and "512" in note

"""benchmarks/architectures.py: its choices by hand, a model that breaks in each way, and all of it on two models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import architectures  # noqa: E402
import tables  # noqa: E402


def test_every_class_of_a_causal_decoder_is_swept_once():
    kinds = architectures.swept()
    names = [architectures.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] for kind in kinds]
    assert len(names) == len({*names}) > 100
    assert {"llama", "qwen3_5_text", "deepseek_v4", "mamba2"} <= {*kinds} and not {"bert", "bart"} & {*kinds}


def test_layers_of_each_kind_by_hand():
    layers = architectures.layers_of_each_kind
    assert layers({"layer_types": ["a", "a", "b", "a"], "mlp": ["x", "x", "x", "y"]}, 4) == [0, 2, 3]
    assert layers({"layer_types": ["a", "a", "a"]}, 3) == [0, 1]  # at least two: one below, one above
    assert layers({}, 5) == [0, 1]


def test_a_tiny_model_has_a_window_that_rows_exceed_and_no_bias_of_zero():
    model = architectures.tiny_model("gemma2")
    assert {*model.config.layer_types} == {"sliding_attention", "full_attention"}
    assert model.config.sliding_window < max(map(len, architectures.PROMPTS))
    vectors = [p for p in architectures.tiny_model("gpt2").parameters() if p.ndim == 1]
    assert vectors and all(p.std() > 0.1 for p in vectors)


def test_a_difference_of_the_worst_row_decides():
    expected = [torch.tensor([0.0, 1.0]), torch.tensor([2.0])]
    found = torch.tensor([[0.0, 1.5], [9.0, 2.0]])  # what is before a shorter response does not count
    assert architectures.off(found, expected) == 0.5
    assert architectures.off(found + torch.tensor(float("nan")), expected) == float("inf")
    assert architectures.verdict(1e-5) == "yes" and architectures.verdict(0.5).startswith("no:")


def crash(kind):
    os.abort()


def hang(kind):
    time.sleep(60)


@pytest.mark.parametrize(("broken", "how"), [(crash, "SIGABRT"), (hang, "not done after 1 seconds")])
def test_a_model_that_crashes_or_hangs_ends_alone(broken, how, monkeypatch):
    monkeypatch.setattr(architectures, "measure", broken)
    row = architectures.in_a_process("llama", 1.0)
    assert row["model"] == "LlamaForCausalLM" and how in row["left_out"]


def test_numbers_that_differ_are_a_no(monkeypatch):
    """Negative control of the columns: the oracle reads another token."""
    plain = architectures.plain_logprobs
    monkeypatch.setattr(architectures, "plain_logprobs", lambda m, p, a: plain(m, [*p[:-1], 40], a))
    row = architectures.Sweep("llama").run()
    for column in ("left_padding", "packing", "shared_prompts", "cached_decoding", "frozen_layers", "nf4", "lora"):
        assert row["cells"][column].startswith("no:"), column
    assert row["cells"]["reward_head"] == row["cells"]["generate"] == "yes"  # which ask another oracle


def test_the_script_writes_a_row_for_each_model(tmp_path):
    out = tmp_path / "architectures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "architectures.py"), "--only", "llama", "moshi", "--out", out]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    printed = json.loads(done.stdout.strip().splitlines()[-1])
    result = json.loads(out.read_text())
    assert printed["models"] == 2 and printed["taken"] == printed["refused"] == 1 and printed["no"] == []
    llama, moshi = result["rows"]
    assert {*llama["cells"]} == {*architectures.COLUMNS} and {*llama["cells"].values()} == {"yes"}
    assert "hidden states with its cache than without" in moshi["refused"]
    table = tables.architectures_table(tmp_path).splitlines()
    assert f"| LlamaForCausalLM |{' yes |' * len(architectures.COLUMNS)}" in table
    assert sum(line.startswith("| MoshiForCausalLM | the model computes other hidden states") for line in table) == 1


def test_the_table_in_words(tmp_path):
    right = dict.fromkeys(tables.ARCHITECTURE_COLUMNS, "yes")
    differs = "ForCausalLM differs by 1"
    rows = [
        {"model": "AForCausalLM", "cells": right | {"lora": f"no: A{differs} (relative error 2e-1), so"}},
        {"model": "BForCausalLM", "cells": right | {"packing": "yes, without gate", "lora": f"no: B{differs}, so."}},
        {"model": "CForCausalLM", "refused": "CForCausalLM reads pads.", "cells": right},
        {"model": "D", "left_out": "TypeError: no"},
    ]
    result = {"rows": rows, "models": 4, "taken": 2, "refused": 1, "left_out": 1, "date": "2026-01-02",
              "versions": {"transformers": "5.0"}}  # fmt: skip
    assert tables.architectures_table(tmp_path) == ""
    (tmp_path / "architectures.json").write_text(json.dumps(result))
    assert tables.reason("X fails (E: no.). If an adapter is the cause, le") == "X fails (E: no.)"
    assert (
        tables.reason("X reads pads. Choose another model; mo")
        == "X reads pads"
        != tables.reason("X reads pads. Load it")
    )
    lines = tables.architectures_table(tmp_path).splitlines()
    assert lines[0].startswith("| model | left padding | packing |") and lines[0].endswith("| LoRA, all-linear |")
    middle = " | ".join(["yes"] * 6)
    assert lines[2:4] == [
        f"| AForCausalLM | yes | yes | {middle} | no (1) |", f"| BForCausalLM | yes | yes (2) | {middle} | no (1) |"
    ]  # fmt: skip
    assert lines[5:7] == ["1. the model differs by 1, so", "2. without gate"]
    assert "| CForCausalLM | the model reads pads |" in lines and "| D | TypeError: no |" in lines
    assert lines[-1].startswith("4 classes of transformers 5.0: 2 taken, 1 refused, 1 not measured")

"""benchmarks/engines.py: medians by hand, and a run on a tiny model with a server that computes as vLLM does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from vllm_server import FakeVLLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import _utils
import engines
import tables


def test_speeds_are_those_of_the_medians():
    found = engines.summarize([(2.0, 4.0, 100), (1.0, 8.0, 100), (9.0, 5.0, 100)])
    assert found == {
        "seconds": 2.0, "cpu_seconds": 5.0, "tokens": 100, "tokens_per_second": 50.0, "tokens_per_cpu_second": 20.0,
    }  # fmt: skip


def test_sides_run_in_turn_and_the_first_turn_is_not_counted():
    calls = []
    sides = {name: lambda name=name: calls.append(name) or len(calls) for name in ("a", "b")}
    found = engines.measure(sides, 2, None)
    assert calls == ["a", "b"] * 3
    assert (found["a"]["tokens"], found["b"]["tokens"]) == (4, 5)  # medians of 3 and 5, of 4 and 6


def test_a_tiny_run_measures_all_sides(monkeypatch, capsys):
    model = _utils.random_llama(vocab_size=_utils.VOCABULARY)
    with FakeVLLM(model, max_model_len=512) as server:
        monkeypatch.setattr(sys, "argv", ["engines.py", "--url", server.url, "--tiny", "--repeats", "1", "--dtype",
                                          "float32"])  # fmt: skip
        engines.main()
        completions = [payload for path, payload in server.requests if path == "/v1/completions"]
        assert server.adapters == {}
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sum(payload["max_tokens"] for payload in completions) == 2 * sum(
        work["vllm"]["tokens"] for work in result["workloads"].values()
    )
    for work in result["workloads"].values():
        assert len({work[side]["tokens"] for side in engines.SIDES}) == 1
        assert work["ratio"] == pytest.approx(work["vllm"]["tokens_per_second"] / work["ours"]["tokens_per_second"])
    assert 0 < result["sync"]["adapter_mb"] < result["sync"]["all_mb"]
    assert "vLLM" in tables.engines(result)


def test_an_environment_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["engines.py", "--vllm", "nowhere/python"])
    with pytest.raises(SystemExit):
        engines.main()
    assert "nowhere/python" in capsys.readouterr().err

"""`make gpu`: a part that fails, hangs or is ended is recorded, what it had written stays, and the next one runs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu  # noqa: E402
from gpu import Part, count_outcomes, plan_parts, run_parts  # noqa: E402

WRITE = "import json, sys; json.dump({'rows': 1}, open(sys.argv[1], 'w'))"
# Writes a result, starts a process that does not listen to SIGTERM, and hangs.
HANG = f"""{WRITE}
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal, time; "
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"],
    stdout=subprocess.PIPE, text=True)
child.stdout.readline()
open(sys.argv[2], "w").write(str(child.pid))
time.sleep(600)
"""


def lives(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_part_that_fails_or_hangs_does_not_end_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.2)
    pid = tmp_path / "pid"
    files = {name: tmp_path / f"{name}.json" for name in ("whole", "hanging", "failing", "last")}
    parts = [
        Part("whole", ["-c", WRITE, str(files["whole"])], 60, files["whole"]),
        Part("hanging", ["-c", HANG, str(files["hanging"]), str(pid)], -50, files["hanging"]),  # the rest is left over
        Part("failing", ["-c", "print('why'); raise SystemExit(3)"], 30, files["failing"]),
        Part("last", ["-c", "import os; print(os.environ['WHO'])"], 30, None, {"WHO": "me"}),
    ]
    started = time.monotonic()
    result = run_parts(parts, tmp_path / "out", {"card_gb": 12})
    assert time.monotonic() - started < 60
    assert result == json.loads((tmp_path / "out" / "gpu.json").read_text()) and result["card_gb"] == 12
    found = result["parts"]
    assert {name: part["status"] for name, part in found.items()} == {
        "whole": "passed", "hanging": "ran over its time", "failing": "failed", "last": "passed",
    }  # fmt: skip
    assert (found["failing"]["exit_status"], found["failing"]["last_line"]) == (3, "why")
    assert [found[name]["result"] for name in found] == ["whole.json", "hanging.json", None, None]
    assert not lives(int(pid.read_text()))
    assert (tmp_path / "out" / "last.log").read_text() == "me\n"


def test_time_that_a_part_leaves_goes_to_the_next_one(tmp_path):
    used = (
        "import time; time.sleep(0.3)"  # boxes are rounded to 0.1 s: a part that takes less than half of it uses none
    )
    parts = [Part(name, ["-c", used], 20) for name in ("first", "second", "third")]
    boxes = [part["time_box_seconds"] for part in run_parts(parts, tmp_path, {})["parts"].values()]
    assert boxes[0] == 20 < boxes[1] < 40 and boxes[1] < boxes[2] < 60


def test_a_result_of_an_earlier_run_is_none_of_this_one(tmp_path):
    file = tmp_path / "gpu_memory.json"
    file.write_text("{}")
    found = run_parts([Part("memory", ["-c", "pass"], 20, file)], tmp_path, {})
    assert found["parts"]["memory"]["result"] is None


def test_outcomes_are_read_from_a_log_that_ends_anywhere():
    log = (
        "tests/test_gpu.py::test_a[x-y] PASSED   [  3%]\ntests/test_gpu.py::test_b FAILED [  6%]\n"
        "tests/test_gpu.py::test_c SKIPPED (there is no CUDA device)  [ 9%]\ntests/test_gpu.py::test_d ERROR [ 12%]\n"
        "tests/test_gpu.py::test_e "
    )
    failures = ["tests/test_gpu.py::test_b", "tests/test_gpu.py::test_d"]
    assert count_outcomes(log) == {"passed": 1, "failed": 1, "skipped": 1, "failures": failures}


@pytest.mark.parametrize("card_gb", [None, 12.0])
def test_all_parts_together_take_nine_minutes_and_know_the_card(tmp_path, card_gb):
    args = argparse.Namespace(minutes=9.0, card_gb=card_gb, model="me/mine", tiny=False, only=list(gpu.SECONDS))
    parts = plan_parts(args, tmp_path)
    assert [part.name for part in parts] == ["tests", "memory", "learning", "speed"]
    assert sum(part.seconds for part in parts) == pytest.approx(540)
    memory, learning, speed = (part.command for part in parts[1:])
    assert memory[memory.index("--caps") + 1] == "12" and learning[learning.index("--model") + 1] == "me/mine"
    assert parts[0].environment == ({} if card_gb is None else {"PPO_PLUS_CARD_GB": "12"})
    for command in (learning, speed):
        assert ("--card-gb" in command) == (card_gb is not None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_what_can_be_run():
    done = subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--tiny" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_its_parts_run_on_a_cpu(tmp_path):
    """Tests marked `gpu` among them: a few that are quick."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--only", "tests", "learning"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--minutes", "20", "--output", str(tmp_path)], capture_output=True, text=True, check=False,
        env=environment,
    )  # fmt: skip
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert done.returncode == 0 and parts["tests"]["passed"] >= 5 and not parts["tests"]["failures"], parts
    rollouts = json.loads((tmp_path / "learning.log").read_text().splitlines()[-1])["rollouts"]
    assert len(rollouts) >= 8 and rollouts[-1]["reward"] > rollouts[0]["reward"]

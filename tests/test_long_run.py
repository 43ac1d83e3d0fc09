"""benchmarks/long_run.py: its figures by hand, and all of it with a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import attempts  # noqa: E402
import long_run  # noqa: E402


def rows(count, growth=0.0):
    """Rollouts that take 1 s and hold 100 MB, and grow by so much each."""
    return [
        {
            "rollout": i, "wall_seconds": 2 + 2 * growth * i, "cpu_seconds": 1 + growth * i,
            "resident_mb": 100 + i * growth, "anonymous_mb": 50.0, "open_files": 6, "threads": 4,
        }
        for i in range(1, count + 1)
    ]  # fmt: skip


SIZES = {"window": 10, "early": 10, "late": 90}


def kept(measured, identical=True):
    return long_run.check_bounds({"undisturbed": long_run.compare(measured, SIZES), "identical": identical})


def test_figures_by_hand():
    found = long_run.compare(rows(100, growth=0.5), SIZES)
    assert found["resident_mb"] == {"early": 105, "late": 145, "ratio": 145 / 105}
    assert found["cpu_seconds"]["first"] == 1 + 0.5 * 5.5 and found["cpu_seconds"]["last"] == 1 + 0.5 * 95.5
    assert found["wall_seconds"]["ratio"] == found["cpu_seconds"]["ratio"] == (1 + 0.5 * 95.5) / (1 + 0.5 * 5.5)
    assert found["open_files"] == {"least": 6, "most": 6}


def test_what_grows_is_told_from_what_does_not():
    assert all(kept(rows(100)).values())
    growing = kept(rows(100, growth=0.5))
    assert [name for name, holds in growing.items() if not holds] == [
        "resident memory within 3 %", "CPU seconds a rollout within 5 %", "wall seconds a rollout within 5 %",
    ]  # fmt: skip
    leaking = rows(100)
    leaking[-1]["open_files"] = 7
    assert [name for name, holds in kept(leaking, identical=False).items() if not holds] == [
        "open files constant", "weights equal",
    ]  # fmt: skip


def test_the_last_line_of_measurements_may_be_unfinished(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert long_run.read_rows(file) == []
    file.write_text('{"rollout": 1}\n{"rollout": 2}\n{"roll')
    assert [row["rollout"] for row in long_run.read_rows(file)] == [1, 2]


def test_signals_come_inside_the_run_and_are_drawn_by_the_seed():
    sizes = {"rollouts": 510, "kills": 2}
    drawn = long_run.draw_signals(sizes, seed=3)
    assert drawn == long_run.draw_signals(sizes, seed=3) != long_run.draw_signals(sizes, seed=4)
    assert sorted(kind.name for _, _, kind in drawn) == ["SIGKILL", "SIGKILL", "SIGTERM", "SIGTERM"]
    moments = [rollout for rollout, _, _ in drawn]
    assert moments == sorted(moments) and moments[0] > 1 and moments[-1] < 508


class TestAttempts:
    def start(self, tmp_path, code):
        script = tmp_path / "script.py"
        script.write_text(code)
        log = tmp_path / "logs" / "log"
        return attempts.start_attempt(script, ["argument"], log), log

    def test_one_that_ends_too_early_shows_its_log(self, tmp_path):
        process, log = self.start(tmp_path, "import sys; print(sys.argv[1]); raise SystemExit(3)")
        with pytest.raises(SystemExit, match="exit status 3:\nargument"):
            attempts.wait_for(process, lambda: False, log)
        with pytest.raises(SystemExit, match="exit status 3:\nargument"):
            attempts.finish(process, log)
        with pytest.raises(SystemExit, match="SIGTERM was sent, and the exit status is 3"):
            attempts.interrupt(process, signal.SIGTERM, log)

    def test_one_that_is_interrupted(self, tmp_path):
        process, log = self.start(tmp_path, "import time; print('here', flush=True); time.sleep(60)")
        attempts.wait_for(process, lambda: "here" in log.read_text(), log)
        attempts.interrupt(process, signal.SIGTERM, log)
        assert process.returncode == -signal.SIGTERM

    def test_weights_are_compared_by_their_bits(self, tmp_path):
        """Metadata is compared by its entries, which safetensors writes in any order."""
        entries = {"a": "1", "b": "2", "c": "3", "d": "4"}
        for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.0000001), ("d", 1.0)):
            (tmp_path / name).mkdir()
            for file in attempts.FILES:
                metadata = entries | ({"a": "5"} if name == "d" else {})
                save_file({"weight": torch.tensor([value, 0.0])}, tmp_path / name / file, metadata=metadata)
        assert attempts.equal_weights(tmp_path / "a", tmp_path / "b")
        assert not attempts.equal_weights(tmp_path / "a", tmp_path / "c")
        assert not attempts.equal_weights(tmp_path / "a", tmp_path / "d")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of a process is read from Linux")
def test_a_tiny_run_is_interrupted_and_ends_in_the_same_bits(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "long_run.py"), "--tiny", "--output", str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["identical"] and found["kept"]["open files constant"], found
    assert found["undisturbed"]["resident_mb"]["ratio"] < 1.1
    assert sorted(one["signal"] for one in found["signals"]) == ["SIGKILL", "SIGTERM"]
    assert len(found["processes"]) == 3 and found["processes"][-1]["rollout"][-1] == 20
    assert (tmp_path / "disturbed" / "report.html").is_file()
    assert len(list((tmp_path / "disturbed").glob("checkpoint-*"))) == 2

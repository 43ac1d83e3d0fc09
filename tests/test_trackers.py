"""Metrics and tables of samples in TensorBoard, wandb, trackio and MLflow: the libraries themselves, offline."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
from conftest import make_prompts, make_trainer
from transformers.integrations import TensorBoardCallback

from ppo_plus.callbacks.trackers import log_table, markdown_table

# Some of the names under which Trainer's callbacks log: in two groups, but in MLflow as they are.
GROUPED = {
    "train/loss", "train/reward", "train/kl", "train/completions/mean_length", "train/rewards/score/mean",
    "train/time/generate", "train/ppo/policy_loss", "eval/reward", "eval/kl", "eval/completions/mean_length",
}  # fmt: skip
SPEEDS = ("train_samples_per_second", "train_steps_per_second")  # wandb has a summary of the run
AS_LOGGED = {name.removeprefix("train/").replace("eval/", "eval_") for name in GROUPED}
NASTY = "a|b *c* `d` <img src=x> [l](http://x) ![i](http://y)\n# e"


def run(tmp_path, tracker):
    """Two rollouts with a table each, and an evaluation: what is to be found in the tracker."""
    seen = {}

    def score(prompts, completions, log_extra, trainer_state, **kwargs):
        log_extra("why", [NASTY] * len(prompts))
        seen[trainer_state.global_step, len(prompts)] = prompts, completions  # cheap answers are before the rollout
        return [i - 0.5 for i in range(len(prompts))]

    config = {"report_to": tracker, "num_sample_generations": 2, "num_completions_to_print": 3,
              "eval_strategy": "steps", "eval_steps": 8, "run_name": "mine", "project": "ours"}  # fmt: skip
    make_trainer(tmp_path, config=config, reward_funcs=score, eval_dataset=make_prompts(3)).train()
    tables = {}
    for (step, rows), (prompts, completions) in seen.items():
        shown = zip(prompts[:3], completions[:3], [-0.5, 0.5, 1.5], strict=True)
        tables["completions" if rows == 8 else "eval/completions", step] = list(shown)
    assert list(tables) == [("completions", 0), ("completions", 4), ("eval/completions", 8)]
    return tables


def check(found, expected):
    """Tables as lists of rows, each a dict by column."""
    assert found.keys() == expected.keys()
    for (name, step), rows in found.items():
        assert [set(row) for row in rows] == [{"step", "prompt", "completion", "reward", "kl", "why"}] * 3
        assert [(r["prompt"], r["completion"], r["reward"]) for r in rows] == expected[name, step]
        assert all(r["step"] == step and r["why"] == NASTY and math.isfinite(r["kl"]) for r in rows)


def check_groups(names, tables=()):
    """All scalars are in Trainer's two groups; a table is where it was logged."""
    assert names >= GROUPED
    assert {name.split("/")[0] for name in names - {*tables}} == {"train", "eval"}


def test_tensorboard_gets_text(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    expected = run(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    found = {
        (name, event.step): event.tensor_proto.string_val[0].decode()
        for name in ("completions", "eval/completions")
        for event in events.Tensors(f"{name}/text_summary")
    }
    assert found.keys() == expected.keys()
    check_groups({*events.Tags()["scalars"]})  # Trainer's own writer, and no second one
    for key, rows in expected.items():
        shown = markdown_to_safe_html(found[key])
        assert shown.count("<tr>") == 1 + len(rows) and shown.count("<td>") == 5 * len(rows)
        assert shown.count("a|b *c* `d` &lt;img src=x&gt; [l](http://x) ![i](http://y)<br># e") == len(rows)
        assert not any(tag in shown for tag in ("<img", "<a ", "<em", "<code", "<h1"))
        for _, _, reward in rows:
            assert f"<td>{reward:.2f}</td>" in shown


def test_wandb_gets_a_table(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    try:
        expected = run(tmp_path, "wandb")
        names = {name for name in wandb.run.summary.keys() if not name.startswith("_")}  # noqa: SIM118
    finally:
        wandb.finish()
    found = {}
    for file in tmp_path.glob("wandb/offline-run-*/files/media/table/**/*.table.json"):
        table = json.loads(file.read_text())
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        found["eval/completions" if "eval" in file.parts else "completions", rows[0]["step"]] = rows
    check(found, expected)
    check_groups(names, {"completions", "total_flos", "train_loss", "train_runtime", *SPEEDS})


def test_mlflow_gets_a_table(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    expected = run(tmp_path, "mlflow")
    [logged] = mlflow.search_runs(output_format="list")
    assert {*logged.data.metrics} >= AS_LOGGED and logged.info.run_name == "mine"
    found = {}
    for file in (tmp_path / "mlflow").rglob("completions.json"):
        name = "eval/completions" if file.parent.name == "eval" else "completions"
        table = json.loads(file.read_text())
        for row in (dict(zip(table["columns"], row, strict=True)) for row in table["data"]):
            found.setdefault((name, row["step"]), []).append(row)
    check(found, expected)


def test_trackio_gets_a_table(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    for module in (utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    expected = run(tmp_path, "trackio")
    logs = sqlite_storage.SQLiteStorage.get_logs("ours", "mine")
    check_groups({name for entry in logs for name in entry} - {"step", "timestamp"}, {"completions"})
    found = {
        (name, entry["train/global_step"]): entry[name]["_value"]
        for entry in logs
        for name in ("completions", "eval/completions")
        if name in entry
    }
    check(found, expected)


def test_what_is_no_tracker_or_was_not_started_is_left_alone():
    stopped = TensorBoardCallback.__new__(TensorBoardCallback)
    stopped.tb_writer = None
    unknown, started = SimpleNamespace(), TensorBoardCallback.__new__(TensorBoardCallback)
    written = []
    started.tb_writer = SimpleNamespace(add_text=lambda *args: written.append(args), flush=lambda: None)
    log_table([unknown, stopped], "completions", {"prompt": ["a"]}, 0)
    assert not vars(unknown) and stopped.tb_writer is None and not written
    log_table([unknown, stopped, started], "completions", {"prompt": ["a"]}, 0)
    assert len(written) == 1  # control: the one that was started gets the table


def test_a_table_in_markdown():
    assert markdown_table({"prompt": ["a b", "c|d"], "reward": [1.0, math.nan], "n": [3, 4]}).split("\n") == [
        "| prompt | reward | n |", "| --- | --- | --- |", r"| a b | 1\.00 | 3 |", r"| c\|d | nan | 4 |",
    ]  # fmt: skip

"""The progress bar: which phase, how far, how fast; on a terminal, in a log, in a notebook, and switched off."""

from __future__ import annotations

import ast
import importlib
import io
import re
import sys
import types

import datasets
import pytest
import torch
import transformers
from conftest import Recorder, lora, make_prompts, make_tokenizer, make_trainer
from huggingface_hub.utils import are_progress_bars_disabled

from ppo_plus import PPOProgressCallback, RewardConfig, RewardTrainer
from ppo_plus.callbacks import progress
from ppo_plus.callbacks.progress import disable_bars_in_logs
from ppo_plus.kernels.batch_backoff import BatchSize
from ppo_plus.rollout.phases import ProgressReporter

PHASES = ["generating", "scoring", "logprobs", "reference", "learning"]


@pytest.fixture(autouse=True)
def no_bars_of_datasets():
    """Tokenizing shows a bar of its own, before training."""
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Events(Recorder):
    """What was reported, beside what the rollout then was."""

    def __init__(self):
        super().__init__()
        self.reports = []

    def on_rollout_progress(self, args, state, control, phase, done, total, tokens, **kwargs):
        self.reports.append((phase, done, total, tokens))

    def of(self, phase):
        return [(done, total, tokens) for name, done, total, tokens in self.reports if name == phase]


def train(tmp_path, *, resume=None, callbacks=(), **config):
    config = {"disable_tqdm": False, **config}
    trainer = make_trainer(tmp_path, config=config, callbacks=list(callbacks), eval_dataset=make_prompts(3))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def lines_of_phases(text):
    return [line for line in text.splitlines() if line.startswith("step ")]


def test_a_log_gets_one_plain_line_per_phase(tmp_path, capsys):
    train(tmp_path, max_steps=8)
    out, err = capsys.readouterr()
    assert "\r" not in out + err
    assert "it/s" not in out + err
    counted = {phase: "4/4" if phase == "learning" else "8/8" for phase in PHASES}
    found = [re.match(r"step (\d+)/8: (\S+) (\S+?)(, \d+ tokens/s)?, \d+\.\d s$", x) for x in lines_of_phases(out)]
    assert [(m[1], m[2], m[3], bool(m[4])) for m in found] == [
        (str(4 * rollout + 4 * (phase == "learning")), phase, counted[phase], phase != "scoring")
        for rollout in range(2)
        for phase in PHASES
    ]


def train_reward_model(base, folder, **config):
    """Four steps on eight pairs, and an evaluation of two batches after the second and the fourth."""
    pairs = datasets.Dataset.from_dict({"chosen": ["e" * i for i in range(1, 9)], "rejected": ["abc"] * 8})
    args = RewardConfig(
        output_dir=str(folder), per_device_train_batch_size=2, per_device_eval_batch_size=4, max_steps=4, eval_steps=2,
        eval_strategy="steps", save_strategy="no", report_to="none", use_cpu=True, bf16=False, **config,
    )  # fmt: skip
    data = {"train_dataset": pairs, "eval_dataset": pairs, "processing_class": make_tokenizer()}
    trainer = RewardTrainer(str(base), args, peft_config=lora(task_type="SEQ_CLS"), **data)
    trainer.train()
    return trainer


def test_a_log_of_a_reward_model_gets_one_plain_line_per_phase(base, tmp_path, capsys):
    disable_bars_in_logs()  # of loading weights
    trainer = train_reward_model(base, tmp_path)
    out, err = capsys.readouterr()
    assert "\r" not in out + err and "it/s" not in out + err
    found = [re.fullmatch(r"(\w+) (\d+/\d+), \d+\.\d s", line) for line in out.splitlines()]
    assert [m.groups() for m in found if m] == [("evaluating", "2/2")] * 2 + [("training", "4/4")]
    trainer.evaluate()
    assert re.fullmatch(r"evaluating 2/2, \d+\.\d s\n", capsys.readouterr().out)


def test_a_terminal_gets_trainers_bars_of_a_reward_model(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    train_reward_model(base, tmp_path)
    assert not re.search("^(evaluating|training) ", capsys.readouterr().out, re.MULTILINE)
    assert re.search(r"100%\|.*4/4", sys.stderr.getvalue()) and re.search(r"100%\|.*2/2", sys.stderr.getvalue())


def test_bars_of_a_reward_model_can_be_switched_off(base, tmp_path, capsys):
    disable_bars_in_logs()
    trainer = train_reward_model(base, tmp_path, disable_tqdm=True)
    assert all(line.startswith("{") for line in capsys.readouterr().out.splitlines())
    assert not any(isinstance(c, transformers.ProgressCallback) for c in trainer.callback_handler.callbacks)


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_bars_of_other_libraries_are_switched_off_in_a_log_alone(monkeypatch, stream):
    datasets.enable_progress_bars()
    monkeypatch.setattr(sys, "stderr", stream())
    disable_bars_in_logs()
    shown = [transformers.utils.logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()]
    assert shown == [stream is Terminal] * 2 and are_progress_bars_disabled() == (stream is not Terminal)


def test_a_terminal_gets_one_bar_that_names_the_phase(tmp_path, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    train(tmp_path, max_steps=4)
    assert lines_of_phases(capsys.readouterr().out) == []
    shown = re.findall(r"(\S+ \d+/\d+(?:, \d+ tokens/s)?): +\d+%\|", terminal.getvalue())
    for phase in PHASES:
        counts = [text.split()[1].rstrip(",") for text in shown if text.startswith(phase)]
        total = 4 if phase == "learning" else 8
        assert (counts[0], counts[-1]) == (f"0/{total}", f"{total}/{total}")
    assert [phase for phase in dict.fromkeys(text.split()[0] for text in shown)] == PHASES
    assert re.search(r"learning 4/4, \d+ tokens/s: 100%\|", terminal.getvalue())
    assert len(re.findall(r"\n", terminal.getvalue())) <= 1 + terminal.getvalue().count("\r")


def test_switched_off_nothing_but_trainers_log_is_printed(tmp_path, capsys):
    trainer = train(tmp_path, max_steps=4, disable_tqdm=True)
    out, err = capsys.readouterr()
    assert err == ""
    logs = [ast.literal_eval(line) for line in out.splitlines()]  # Trainer prints its logs as dicts
    assert len(logs) == len(trainer.state.log_history) == 5
    assert not any(isinstance(c, PPOProgressCallback) for c in trainer.callback_handler.callbacks)


def test_it_is_trainers_own_bar_that_is_replaced_and_nobody_elses(tmp_path):
    class Mine(transformers.ProgressCallback):
        pass

    mine = Mine()
    trainer = make_trainer(tmp_path, config={"disable_tqdm": False}, callbacks=[mine])
    bars = [c for c in trainer.callback_handler.callbacks if isinstance(c, transformers.ProgressCallback)]
    assert [type(bar) for bar in bars] == [Mine, PPOProgressCallback]


def test_speed_is_over_the_whole_phase_and_the_bar_changes_no_more_often_than_it_may(monkeypatch):
    now, texts = [100.0], []
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    state = types.SimpleNamespace(global_step=0, max_steps=8, is_world_process_zero=False)
    args = types.SimpleNamespace(num_mini_batches=2, steps_per_rollout=4)
    callback = PPOProgressCallback()
    callback.on_train_begin(args, state, None)
    callback.training_bar = types.SimpleNamespace(
        disable=False, mininterval=1.0, set_description_str=texts.append, update=lambda steps: None
    )
    for done, seconds in ((0, 0.0), (1, 0.6), (2, 0.6), (3, 0.6), (4, 0.1)):
        now[0] += seconds
        callback.on_rollout_progress(args, state, None, "generating", done, 4, 120 * done)
    # 1 and 3 come less than a second after what is shown; the end is always shown.
    assert texts == ["generating 0/4", "generating 2/4, 200 tokens/s", "generating 4/4, 253 tokens/s"]
    mask = torch.ones(4, 400, dtype=torch.bool)
    callback.on_rollout_end(args, state, None, types.SimpleNamespace(action_mask=mask), None, {})
    texts.clear()
    for seconds in (2.0, 6.0):
        callback.on_step_begin(args, state, None)
        now[0] += seconds
        state.global_step += 1
        callback.on_step_end(args, state, None)
    # 1600 tokens are learned from in two steps: 800 in 2 seconds, then 1600 in 8.
    assert texts == ["learning 0/4", "learning 1/4, 400 tokens/s", "learning 2/4, 200 tokens/s"]
    callback.on_rollout_progress(args, state, None, "generating", 4, 4, 0)  # an evaluation in the midst of a rollout
    callback.on_step_begin(args, state, None)
    assert texts[-1] == "learning 2/4"


def test_evaluation_is_shown_and_learning_goes_on_after_it(tmp_path, capsys):
    train(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=3)
    words = [tuple(line.split()[2:4]) for line in lines_of_phases(capsys.readouterr().out)]
    rollout = [(phase, "8/8") for phase in PHASES[:4]]
    evaluation = [(phase, "3/3") for phase in PHASES[:4]]
    assert [(a, b.rstrip(",")) for a, b in words] == [*rollout, *evaluation, ("learning", "4/4"), *evaluation]


def test_without_training_an_evaluation_is_quiet(tmp_path, capsys):
    trainer = make_trainer(tmp_path, config={"disable_tqdm": False}, eval_dataset=make_prompts(3))
    trainer.evaluate()
    assert capsys.readouterr() == ("", "")


def test_a_run_resumed_inside_a_rollout_shows_what_it_knows(tmp_path, capsys):
    train(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    capsys.readouterr()
    train(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, resume=str(tmp_path / "checkpoint-2"))
    (line,) = lines_of_phases(capsys.readouterr().out)
    assert re.fullmatch(r"step 4/4: learning 4/4, \d+\.\d s", line)


def test_what_is_reported_is_what_the_rollout_was(tmp_path):
    events = Events()
    sizes = {"local_rollout_forward_batch_size": 3, "response_length": 24, "temperature": 5.0}
    train(tmp_path, max_steps=4, callbacks=[events], disable_tqdm=True, **sizes)
    (rollout,), (samples,) = events.rollouts, events.samples
    attended = samples.attention_mask
    response = attended[:, -samples.action_mask.shape[1] :]
    assert 1 < int(response.sum(1).min()) < int(response.sum(1).max())  # they stop at different steps
    generating = events.of("generating")
    assert generating[0] == (0, 8, 0)
    assert generating[-1] == (8, 8, int(response.sum()))
    # Rows side by side are 3, 3 and 2, sorted by prompt; each decode step of each chunk is one report.
    order = (attended.sum(1) - response.sum(1)).argsort(stable=True)
    steps = sum(int(response[chunk].sum(1).max()) for chunk in order.split(3))
    assert len(generating) == 1 + steps + 3
    assert generating == sorted(generating)  # neither count ever falls
    for phase in ("logprobs", "reference"):
        assert [done for done, _, _ in events.of(phase)] == [0, 2, 4, 6, 8]  # micro-batches
        assert events.of(phase)[-1] == (8, 8, int(rollout.attention_mask.sum()))
    assert events.of("scoring") == [(0, 8, 0), (8, 8, 0)]


def test_a_chunk_that_ran_out_of_memory_counts_once():
    reports = []
    tally = ProgressReporter("generating", 4, lambda *report: reports.append(report))

    def decode(chunk):
        step = tally.decode_step_callback(len(chunk))
        for alive in (len(chunk), len(chunk) - 1):
            step(alive)
            if len(chunk) == 4:
                raise torch.OutOfMemoryError
        tally.add(len(chunk), 2 * len(chunk) - 1)

    with pytest.warns(UserWarning, match="Out of memory"):
        BatchSize(4).run(torch.arange(4), decode)
    assert reports == [
        ("generating", done, 4, tokens)
        for done, tokens in [(0, 0), (0, 0), (0, 0), (1, 2), (2, 3), (2, 3), (3, 5), (4, 6)]
    ]


def test_a_notebook_keeps_trainers_table(tmp_path, capsys, monkeypatch):
    """Trainer's own callback for notebooks, with nothing replaced but the display it draws on."""
    drawn = []

    class Output:
        def update(self, html):
            drawn.append(html)

    display = types.ModuleType("IPython.display")
    display.display, display.HTML = lambda html, display_id=None: drawn.append(html) or Output(), str
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    sys.modules["IPython"].display = display
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    notebook = importlib.import_module("transformers.utils.notebook")
    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", notebook.NotebookProgressCallback)
    trainer = train(tmp_path, max_steps=4)
    assert capsys.readouterr() == ("", "")
    assert "[4/4" in drawn[-1] and drawn[-1].count("<tr>") >= 4
    assert not any(isinstance(c, PPOProgressCallback) for c in trainer.callback_handler.callbacks)

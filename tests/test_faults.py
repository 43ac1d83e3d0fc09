"""A half-written checkpoint is never taken for a whole one, and signals end a run in good order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from conftest import make_prompts, make_trainer, trained_weights
from transformers import EarlyStoppingCallback, TrainerCallback

import ppo_plus.training.gradients as gradients_module
import ppo_plus.training.resume as resume_module
from ppo_plus import PPOCallback
from ppo_plus.kernels.batch_backoff import BatchSize
from ppo_plus.training.checkpoint import MANIFEST, integrity_error, write_manifest


def steps(folder):
    return sorted(int(p.name.rpartition("-")[2]) for p in folder.glob("checkpoint-*"))


def saving(folder, **config):
    defaults = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    return make_trainer(folder, config={**defaults, **config})


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer = saving(folder)
    trainer.train()
    return folder, trained_weights(trainer)


@pytest.fixture
def copy(whole_run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole_run[0], folder)
    return folder


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "saving was interrupted"),
    "manifest cut": (lambda d: cut(d / MANIFEST), "it cannot be read"),
    "adapter missing": (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "one byte short": (lambda d: cut(d / "optimizer.pt"), "optimizer.pt was changed or truncated"),
    "one bit flipped": (lambda d: flip(d / "rollout_0.safetensors"), "rollout_0.safetensors was changed or truncated"),
    "trainer state cut": (lambda d: cut(d / "trainer_state.json"), "trainer_state.json was changed or truncated"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(copy, whole_run, name):
    spoil, words = DAMAGES[name]
    assert integrity_error(copy / "checkpoint-6") is None
    spoil(copy / "checkpoint-6")
    assert words in integrity_error(copy / "checkpoint-6")
    shutil.rmtree(copy / "checkpoint-5")
    trainer = saving(copy)
    with pytest.warns(UserWarning, match=f"checkpoint-6 is skipped: .*{words}"):
        trainer.train(resume_from_checkpoint=True)
    assert equal(trained_weights(trainer), whole_run[1])
    assert integrity_error(copy / "checkpoint-6") is None  # written again, whole


def test_a_damaged_checkpoint_that_was_asked_for_by_name_is_refused(copy):
    cut(copy / "checkpoint-6" / "optimizer.pt")
    with pytest.raises(ValueError, match=r"checkpoint-6 cannot be resumed: optimizer.pt was changed or truncated"):
        saving(copy).train(resume_from_checkpoint=str(copy / "checkpoint-6"))


def test_without_any_checkpoint_training_starts_anew(tmp_path, whole_run):
    trainer = saving(tmp_path)
    with pytest.warns(UserWarning, match="training starts from the beginning"):
        trainer.train(resume_from_checkpoint=True)
    assert equal(trained_weights(trainer), whole_run[1])


def test_the_checkpoint_before_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    trainer = saving(tmp_path, save_total_limit=1, max_steps=3)
    at_seal = []

    def watched(directory):
        at_seal.append([s for s in steps(tmp_path) if integrity_error(tmp_path / f"checkpoint-{s}") is None])
        write_manifest(directory)

    monkeypatch.setattr(resume_module, "write_manifest", watched)
    trainer.train()
    assert at_seal == [[], [1], [2]]
    assert steps(tmp_path) == [3]
    assert trainer.args.save_total_limit == 1


class FullDisk(TrainerCallback):
    """From a step on, no file may grow beyond some bytes: the operating system refuses, whoever writes."""

    def __init__(self, steps, size):
        self.steps, self.size = steps, size

    def on_step_end(self, args, state, control, **kwargs):
        size = self.size if state.global_step in self.steps else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.fixture
def any_file_size():
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("size", [6_000, 20_000])  # bytes; another file fails first
def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint_before(tmp_path, any_file_size, size):
    trainer = saving(tmp_path, save_total_limit=1)
    trainer.add_callback(FullDisk({3}, size))
    words = r"checkpoint-3 could not be written .* MiB are free there.*last whole checkpoint is .*checkpoint-2\."
    with pytest.raises(OSError, match=words):
        trainer.train()
    assert steps(tmp_path) == [2] and integrity_error(tmp_path / "checkpoint-2") is None
    assert trainer.args.save_total_limit == 1


def test_a_full_disk_is_passed_over_if_so_chosen(tmp_path, any_file_size, whole_run):
    trainer = saving(tmp_path, save_total_limit=1, on_save_error="skip")
    trainer.add_callback(FullDisk({3, 4}, 6_000))
    with pytest.warns(UserWarning, match="checkpoint-4 could not be written.*Training continues without it") as told:
        trainer.train()
    assert sum("could not be written" in str(w.message) for w in told) == 2
    assert equal(trained_weights(trainer), whole_run[1])
    assert steps(tmp_path) == [6] and integrity_error(tmp_path / "checkpoint-6") is None


def test_a_best_checkpoint_that_could_not_be_written_is_not_taken_for_one(tmp_path, any_file_size):
    from conftest import make_prompts

    def best_last(completions, trainer_state, **kwargs):
        return [float(trainer_state.global_step)] * len(completions)

    trainer = make_trainer(tmp_path, reward_funcs=best_last, eval_dataset=make_prompts(2), config={
        "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "on_save_error": "skip",
    })  # fmt: skip
    trainer.add_callback(FullDisk({3}, 6_000))
    with pytest.warns(UserWarning, match="checkpoint-3 could not be written"):
        trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


TESTS = Path(__file__).parent
IN_A_PROCESS_OF_ITS_OWN = f"""
import sys
import threading
from pathlib import Path
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]
from test_faults import *
"""
TINY_DISK = """
mount -t tmpfs -o size=400k tmpfs "$1" || exit 77
"$2" -W ignore "$3"
status=$?
echo
cd "$1" && ls -d checkpoint-* checkpoint-*/manifest.json
exit $status
"""


def test_a_disk_that_is_really_full_keeps_only_whole_checkpoints(tmp_path):
    """On a file system of 400 kB, in a mount namespace of its own."""
    disk, script = tmp_path / "disk", tmp_path / "train.py"
    disk.mkdir()
    script.write_text(f"{IN_A_PROCESS_OF_ITS_OWN}saving(Path({str(disk)!r})).train()\n")
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", TINY_DISK, "-"]
    done = subprocess.run([*command, str(disk), sys.executable, str(script)], capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("user namespaces may not mount here")
    assert done.returncode == 1 and "OSError: " in done.stderr and "MiB are free there" in done.stderr
    there = [name for name in done.stdout.split() if name.startswith("checkpoint-")]
    folders = [name for name in there if not name.endswith(".json")]
    assert 1 <= len(folders) < 6 and {f"{name}/manifest.json" for name in folders} == set(there) - set(folders)


@pytest.fixture(autouse=True)
def interrupts_are_listened_to():
    """A shell that runs the tests in the background has told them to ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class RaiseAt(TrainerCallback):
    """Sends this process signals at a step."""

    def __init__(self, step, number, times=1):
        self.step, self.number, self.times = step, number, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for _ in range(self.times):
                signal.raise_signal(self.number)


class RaiseBeforeRollout(PPOCallback):
    """Sends this process a signal when the rollout of a step begins."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_rollout_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(self.number)


def test_one_interrupt_finishes_the_step_saves_and_then_interrupts(tmp_path, whole_run, capfd):
    trainer = saving(tmp_path, save_strategy="no")
    trainer.add_callback(RaiseAt(2, signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "SIGINT: finishing this step and saving" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    assert steps(tmp_path) == [3] and integrity_error(tmp_path / "checkpoint-3") is None

    resumed = saving(tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert equal(trained_weights(resumed), whole_run[1])


def test_a_second_interrupt_leaves_at_once(tmp_path):
    trainer = saving(tmp_path, save_strategy="no")
    trainer.add_callback(RaiseAt(2, signal.SIGINT, times=2))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert steps(tmp_path) == [] and trainer.state.global_step == 2


def test_sigterm_is_handed_on_to_the_handler_that_was_there(tmp_path):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        trainer = saving(tmp_path, save_strategy="no")
        trainer.add_callback(RaiseAt(1, signal.SIGTERM))
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM] and steps(tmp_path) == [2]


class RaiseInGeneration:
    """Sends a signal while the first decode batch of a rollout runs, and counts batches."""

    def __init__(self, monkeypatch, rollout, number):
        from ppo_plus.models.actor_critic import ActorCritic

        generate, self.calls = ActorCritic.sample, []

        def interrupted(model, *args, **kwargs):
            self.calls.append(len(self.calls))
            if len(self.calls) == 4 * rollout + 1:
                signal.raise_signal(number)
            return generate(model, *args, **kwargs)

        monkeypatch.setattr(ActorCritic, "sample", interrupted)


def test_an_interrupt_while_generating_leaves_the_state_before_the_rollout(tmp_path, monkeypatch, whole_run):
    from conftest import count_e

    def counted(prompts, completions, **kwargs):
        scored.append(len(prompts))
        return count_e(prompts, completions)

    scored, config = [], {"max_steps": 6, "generation_batch_size": 2}
    trainer = make_trainer(tmp_path, config=config, reward_funcs=counted)
    with monkeypatch.context() as patch:
        sent = RaiseInGeneration(patch, 1, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    # Cheap answers and one rollout; of the second, one batch of four was generated, and nothing scored.
    assert len(sent.calls) == 4 + 1 and scored == [8, 8]
    assert steps(tmp_path) == [4] and integrity_error(tmp_path / "checkpoint-4") is None

    resumed = make_trainer(tmp_path, config=config)
    resumed.train(resume_from_checkpoint=True)
    assert equal(trained_weights(resumed), whole_run[1])
    assert [row["num_tokens"] for row in resumed.state.log_history if "num_tokens" in row] == [
        row["num_tokens"]
        for row in json.loads((whole_run[0] / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
        if "num_tokens" in row
    ]


@pytest.mark.parametrize("rollout", [0, 1])
def test_an_interrupt_while_generating_writes_nothing_that_is_there_already(tmp_path, monkeypatch, rollout):
    trainer = make_trainer(
        tmp_path, config={"max_steps": 6, "generation_batch_size": 2, "save_strategy": "steps", "save_steps": 4}
    )
    RaiseInGeneration(monkeypatch, rollout, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert steps(tmp_path) == [4][:rollout]  # nothing was learned before the first rollout


def evaluating(folder, **config):
    """A run with an evaluation of four decode batches after each step; the whole one is compared with others of it."""
    defaults = {"eval_strategy": "steps", "eval_steps": 1, "generation_batch_size": 2, "save_strategy": "no"}
    callbacks = [EarlyStoppingCallback(config.pop("patience"))] if "patience" in config else []
    reward = {"reward_funcs": config.pop("reward")} if "reward" in config else {}
    prompts = make_prompts(8)
    prompts = {"first": prompts, "second": prompts} if config.pop("of_two", False) else prompts
    data = {"eval_dataset": prompts, "callbacks": callbacks, **reward}
    return make_trainer(folder, config={"max_steps": 6, **defaults, **config}, **data)


def interrupt_the_evaluation(trainer, monkeypatch, step, batch=2):
    """Sends a signal while that decode batch of the evaluation after a step runs; returns the batches there."""
    from ppo_plus.models.actor_critic import ActorCritic

    generate, calls = ActorCritic.sample, []

    def interrupted(model, *args, **kwargs):
        if trainer._progress.evaluation_pending and trainer.state.global_step == step:
            calls.append(step)
            if len(calls) == batch:
                signal.raise_signal(signal.SIGINT)
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(ActorCritic, "sample", interrupted)
    return calls


def constant(completions, **kwargs):
    return [1.0] * len(completions)


PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.1}}
BEST = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}
GIVEN_UP = {
    "inside a rollout": (2, {}),
    "between rollouts": (4, {}),
    "after the last step": (6, {}),
    "a schedule that reads it": (2, PLATEAU),
    "at the end of an epoch": (8, {"eval_strategy": "epoch", "max_steps": 12}),
    "of the best model": (3, BEST),
    "of the best model alone": (1, BEST | {"save_strategy": "best"}),
    "of the best model, last": (6, BEST | {"learning_rate": 0.03}),
    "that ends the run": (2, {**BEST, "patience": 1, "reward": constant}),
    "of the second of two sets": (
        2, {**BEST, "metric_for_best_model": "first_reward", "patience": 2, "reward": constant, "of_two": True}
    ),
    "of the reference's answers": (1, {"eval_win_rate": True}),
}  # fmt: skip
LATER = {"of the second of two sets": 6, "of the reference's answers": 6}  # decode batches; the second elsewhere


# Trainer itself makes the last one, which it finds in the checkpoint's control.
SPOILED = [name for name, (step, config) in GIVEN_UP.items() if step < config.get("max_steps", 6)]


@pytest.mark.parametrize(
    ("setting", "spoil"), [*((name, False) for name in GIVEN_UP), *((name, True) for name in SPOILED)]
)
def test_an_evaluation_that_a_signal_ended_is_made_by_the_resumed_run(tmp_path, monkeypatch, setting, spoil):
    """To the same bits, history and best model; negative control: a checkpoint that does not say that it is due."""
    step, config = GIVEN_UP[setting]
    whole = evaluating(tmp_path / "whole", **config)
    whole.train()
    trainer = evaluating(tmp_path / "parts", **config)
    last = LATER.get(setting, 2)
    with monkeypatch.context() as patch:
        batches = interrupt_the_evaluation(trainer, patch, step, last)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert len(batches) == last and trainer.state.global_step == step  # not all of them, and no step more
    checkpoint = tmp_path / "parts" / f"checkpoint-{step}"
    assert integrity_error(checkpoint) is None
    if spoil:
        file = checkpoint / "ppo_state_0.json"
        file.write_text(file.read_text().replace('"evaluation_pending": true', '"evaluation_pending": false'))
        write_manifest(checkpoint)

    resumed = evaluating(tmp_path / "parts", **config)
    resumed.train(resume_from_checkpoint=True)

    def kept(state):
        rows = [{k: v for k, v in row.items() if not k.startswith(("time/", "train_"))} for row in state.log_history]
        best = Path(state.best_model_checkpoint or "").name
        return [row for row in rows if row.keys() - {"epoch", "step", "total_flos"}], best, state.global_step

    assert (kept(resumed.state) == kept(whole.state)) == (not spoil)
    if not spoil:
        assert equal(trained_weights(resumed), trained_weights(whole))
        assert not resumed._progress.evaluation_pending


def test_a_signal_in_a_step_does_not_begin_the_evaluation_after_it(tmp_path, monkeypatch):
    whole = evaluating(tmp_path / "whole")
    whole.train()
    trainer = evaluating(tmp_path / "parts")
    trainer.add_callback(RaiseAt(2, signal.SIGINT))
    with monkeypatch.context() as patch:
        batches = interrupt_the_evaluation(trainer, patch, 3)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert batches == [] and steps(tmp_path / "parts") == [3]
    resumed = evaluating(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert equal(trained_weights(resumed), trained_weights(whole))
    rows = [[row for row in t.state.log_history if "eval_reward" in row] for t in (resumed, whole)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [1, 2, 3, 4, 5, 6]
    assert [row["eval_reward"] for row in rows[0]] == [row["eval_reward"] for row in rows[1]]


def test_the_evaluation_on_start_is_given_up_and_is_not_the_one_that_is_due(tmp_path, monkeypatch):
    def run(folder, stop_at=None, resume=None, **config):
        trainer = evaluating(folder, eval_on_start=True, **PLATEAU, **config)
        with (
            monkeypatch.context() as patch,
            pytest.raises(KeyboardInterrupt) if stop_at is not None else contextlib.nullcontext(),
        ):
            batches = [] if stop_at is None else interrupt_the_evaluation(trainer, patch, stop_at)
            trainer.train(resume_from_checkpoint=resume)
        return trainer, batches

    whole, _ = run(tmp_path / "whole")
    _, batches = run(tmp_path / "parts", stop_at=0)
    assert len(batches) == 2 and steps(tmp_path / "parts") == []  # nothing was learned
    run(tmp_path / "parts", stop_at=2)
    assert steps(tmp_path / "parts") == [2]
    _, batches = run(tmp_path / "parts", stop_at=2, resume=True)  # on start again, and the one that is due still is
    assert (
        len(batches) == 2
        and steps(tmp_path / "parts") == [2]
        and integrity_error(tmp_path / "parts" / "checkpoint-2") is None
    )
    resumed, _ = run(tmp_path / "parts", resume=True)
    assert equal(trained_weights(resumed), trained_weights(whole))  # its schedule has read what was due


def test_evaluations_of_ones_own_are_not_given_up(tmp_path, monkeypatch):
    """A signal belongs to the run that it ended; who catches the interrupt may evaluate."""
    trainer = evaluating(tmp_path)
    with monkeypatch.context() as patch:
        interrupt_the_evaluation(trainer, patch, 2)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    whole = evaluating(tmp_path / "whole")
    whole.train()
    (expected,) = (row for row in whole.state.log_history if "eval_reward" in row and row["step"] == 2)
    assert trainer.evaluate()["eval_reward"] == expected["eval_reward"]


@pytest.mark.parametrize(("number", "phase"), [(signal.SIGTERM, "generating"), (signal.SIGINT, "learning")])
def test_the_exit_status_is_the_conventional_one(tmp_path, number, phase):
    """Ended by the signal itself, which shells show as 128 + number: 143 and 130."""
    script = tmp_path / "train.py"
    event = {"learning": f"RaiseAt(5, {int(number)})", "generating": f"RaiseBeforeRollout(4, {int(number)})"}[phase]
    script.write_text(
        f"{IN_A_PROCESS_OF_ITS_OWN}"
        f"trainer = saving(Path({str(tmp_path)!r}), save_strategy='no')\n"
        f"trainer.add_callback({event})\n"
        "trainer.train()\n"
        "print('went on')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert done.returncode == -number, done.stderr[-2000:]
    assert f"{number.name}: finishing this step and saving" in done.stderr and "went on" not in done.stdout
    assert steps(tmp_path) == [6 if phase == "learning" else 4]
    assert integrity_error(tmp_path / f"checkpoint-{steps(tmp_path)[0]}") is None


def test_an_error_in_training_puts_the_handlers_back(tmp_path):
    def fails(**kwargs):
        raise RuntimeError("out of service")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="out of service"):
        make_trainer(tmp_path, reward_funcs=fails).train()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_manifest_lists_every_file(whole_run):
    directory = whole_run[0] / "checkpoint-6"
    listed = set(json.loads((directory / MANIFEST).read_text()))
    assert listed == {p.name for p in directory.iterdir()} - {MANIFEST}
    assert {"adapter_model.safetensors", "value_head.safetensors", "optimizer.pt", "rollout_0.safetensors"} <= listed


def spoil_the_loss(trainer, monkeypatch, steps_to_spoil):
    """Make the loss NaN at these steps."""
    compute = trainer.compute_loss

    def spoiled(model, inputs, **kwargs):
        loss = compute(model, inputs, **kwargs)
        return loss * float("nan") if trainer.state.global_step in steps_to_spoil else loss

    monkeypatch.setattr(trainer, "compute_loss", spoiled)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_step_with_nan_gradients_is_skipped_counted_and_reported(tmp_path, monkeypatch, max_grad_norm):
    trainer = saving(tmp_path, max_steps=4, max_grad_norm=max_grad_norm)
    spoil_the_loss(trainer, monkeypatch, {2})
    with pytest.warns(UserWarning, match="Step 2 has gradients that are not finite and is skipped.*the film"):
        trainer.train()
    by_step = {}
    for step in (2, 3, 4):
        directory = tmp_path / f"checkpoint-{step}"
        by_step[step] = (directory / "adapter_model.safetensors").read_bytes()
    assert by_step[2] == by_step[3] != by_step[4]
    assert [row["ppo/skipped_steps"] for row in trainer.state.log_history if "ppo/skipped_steps" in row] == [1.0]
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_the_response_that_has_no_finite_gradient_is_the_one_that_is_named(tmp_path, monkeypatch):
    from datasets import Dataset

    prompts = Dataset.from_dict({"prompt": [f"{letter} film" for letter in "abcdefghijklmnop"]})
    trainer = make_trainer(tmp_path, config={"max_steps": 4}, train_dataset=prompts)
    compute, named = trainer.compute_loss, []

    def spoiled(model, inputs, **kwargs):
        loss = compute(model, inputs, **kwargs)
        if trainer.state.global_step == 2:
            row = int(trainer._rollouts.minibatch_rows[1])
            victim = trainer._progress.rollout.returns[row, 0]
            named[:] = [trainer.processing_class.decode(trainer._progress.rollout.input_ids[row])]
            loss = loss * torch.where((inputs["returns"][:, 0] == victim).any(), torch.nan, 1.0)
        return loss

    monkeypatch.setattr(trainer, "compute_loss", spoiled)
    with pytest.warns(UserWarning, match="Step 2 has gradients that are not finite") as told:
        trainer.train()
    (said,) = [str(w.message) for w in told if "Step 2" in str(w.message)]
    film = named[0].replace("<pad>", "")[:6]
    assert film in said and said.count(" film") == 1
    # Looking for it leaves no trace: every step is measured once.
    assert all(math.isfinite(row.get("ppo/ratio", 1.0)) for row in trainer.state.log_history)


def test_too_many_skipped_steps_in_a_row_stop_the_run_and_name_the_last_checkpoint(tmp_path, monkeypatch):
    trainer = saving(tmp_path, max_steps=6, max_skipped_steps=2)
    spoil_the_loss(trainer, monkeypatch, {1, 3, 4})  # 1 is alone, 3 and 4 are in a row
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match=r"2 steps in a row .*checkpoint-4\."):
        trainer.train()
    assert trainer.state.global_step == 4


def scaling_losses(trainer, monkeypatch, scale):
    """fp16 with the code that a GPU runs, accelerate's and torch's; only that accelerate refuses it here is undone."""
    monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
    monkeypatch.setattr(trainer.accelerator, "native_amp", True)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-8)


def test_an_overflow_that_the_loss_scaler_skips_does_not_stop_the_run(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, config={"max_steps": 12, "max_skipped_steps": 2})
    scaling_losses(trainer, monkeypatch, 2.0**48)
    before = trained_weights(trainer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Step .* has gradients that are not finite")
        warnings.filterwarnings("error", ".* adapters get no gradient")  # of the first rollout, all skipped
        trainer.train()
    skipped = [row["step"] - 1 for row in trainer.state.log_history if "ppo/skipped_steps" in row]
    assert len(skipped) > 2 and skipped == list(range(len(skipped))) and len(skipped) < 12
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (48 - 8 * len(skipped))
    assert not equal(trained_weights(trainer), before) and all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_further_critic_update_that_overflows_lowers_the_loss_scale_too(tmp_path, monkeypatch):
    """2**48 to 2**8 are five overflows, of critic updates alone and of steps."""
    trainer = make_trainer(tmp_path, config={"critic": "adapter", "num_critic_updates": 2, "max_steps": 6})
    scaling_losses(trainer, monkeypatch, 2.0**48)
    before = trained_weights(trainer)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0**8 and not equal(trained_weights(trainer), before)
    skipped = [row["step"] for row in trainer.state.log_history if "ppo/skipped_steps" in row]
    assert len(skipped) < 5 and all(p.isfinite().all() for p in trainer.model.parameters())


def test_gradients_that_no_loss_scale_makes_finite_stop_the_run(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, config={"max_steps": 8, "max_skipped_steps": 2})
    scaling_losses(trainer, monkeypatch, 2.0**16)
    spoil_the_loss(trainer, monkeypatch, range(8))
    with pytest.warns(UserWarning, match="Step 2 has"), pytest.raises(RuntimeError, match="2 steps in a row"):
        trainer.train()
    assert trainer.state.global_step == 3  # scales 2**16 and 2**8 might have been too high, 1 and less were not


@pytest.mark.parametrize("failing", ["raises", "nan", "wrong number", "text"])
def test_a_failing_reward_function_is_skipped_if_so_chosen(tmp_path, failing):
    from conftest import count_e

    def broken(completions, **kwargs):
        if failing == "raises":
            raise TimeoutError("no answer from the judge")
        return {"nan": [float("nan")] * len(completions), "wrong number": [1.0], "text": "good"}[failing]

    trainer = saving(tmp_path, max_steps=1, on_reward_error="skip", save_strategy="no")
    other = make_trainer(tmp_path, config={"max_steps": 1, "on_reward_error": "skip"}, reward_funcs=[count_e, broken])
    trainer.train()
    with pytest.warns(UserWarning, match="'broken' is skipped in this rollout"):
        other.train()
    assert equal(trained_weights(trainer), trained_weights(other))
    with pytest.raises((TimeoutError, ValueError)):
        make_trainer(tmp_path, config={"max_steps": 1}, reward_funcs=[count_e, broken]).train()


@pytest.fixture
def never():
    """An event that functions wait for, and that comes only when the test is over."""
    event = threading.Event()
    yield event
    event.set()


def hanging(kind, never):
    def sync(completions, **kwargs):
        never.wait()

    async def patient(completions, **kwargs):
        await asyncio.sleep(3600)

    async def blocking(completions, **kwargs):
        never.wait()

    async def stubborn(completions, **kwargs):
        while not never.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    return {f.__name__: f for f in (sync, patient, blocking, stubborn)}[kind]


@pytest.mark.parametrize("kind", ["sync", "patient", "blocking", "stubborn"])
def test_a_reward_function_that_hangs_is_named_with_its_prompts(tmp_path, never, kind):
    trainer = make_trainer(tmp_path, reward_funcs=hanging(kind, never), config={"reward_timeout": 0.1})
    words = rf"'{kind}' did not return within reward_timeout=0.1 seconds; it was called with 8 completions, .*'the f"
    with pytest.raises(TimeoutError, match=words):
        trainer.train()


@pytest.mark.parametrize("kind", ["sync", "patient", "stubborn"])
def test_a_reward_function_that_hangs_is_left_out_if_so_chosen(tmp_path, never, kind):
    from conftest import count_e

    async def other(prompts, completions, **kwargs):
        return count_e(prompts, completions)

    config = {"max_steps": 1, "on_reward_error": "skip"}
    plain = make_trainer(tmp_path, config=config, reward_funcs=other)
    plain.train()
    both = make_trainer(tmp_path, config={**config, "reward_timeout": 0.5}, reward_funcs=[hanging(kind, never), other])
    with pytest.warns(UserWarning, match=f"'{kind}' is skipped in this rollout: TimeoutError"):
        both.train()
    assert equal(trained_weights(plain), trained_weights(both))


def test_a_timeout_changes_nothing_for_a_function_that_answers(tmp_path):
    import random

    def lottery(completions, **kwargs):
        assert not torch.is_grad_enabled()
        return [random.random() + torch.rand(()).item() for _ in completions]

    found = []
    for timeout in (None, 60.0):
        config = {"max_steps": 2, "reward_timeout": timeout}
        trainer = make_trainer(tmp_path, config=config, reward_funcs=lottery)
        trainer.train()
        found.append(trained_weights(trainer))
    assert equal(*found)


def test_an_error_in_a_timed_function_is_its_own(tmp_path):
    def broken(**kwargs):
        raise ZeroDivisionError("no reward")

    with pytest.raises(ZeroDivisionError) as raised:
        make_trainer(tmp_path, reward_funcs=broken, config={"reward_timeout": 60.0}).train()
    assert "Raised by the reward function 'broken', called with 8 completions" in raised.value.__notes__[0]


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_async_reward_functions_wait_at_the_same_time(timeout):
    """Each answers only once all three have been asked: one after the other they would wait without end."""
    from ppo_plus.rewards import Completions, FunctionReward, RewardSet

    asked = []

    def judge(score):
        async def function(completions, **kwargs):
            asked.append(score)
            while len(asked) < 3:
                await asyncio.sleep(0.01)
            return [score] * len(completions)

        return function

    rewards = RewardSet([FunctionReward(judge(s), f"judge_{s}", timeout) for s in (1.0, 2.0, 3.0)], None)
    batch = Completions(prompts=["a", "b"], completions=["c", "d"], completion_ids=[[1], [2]])
    assert rewards(batch).by_function.tolist() == [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]


@pytest.mark.parametrize(("phase", "tried"), [("sample", [8, 4, 2, 2]), ("forward", [4, 2, 2, 2])])
def test_out_of_memory_in_a_rollout_halves_the_chunk_and_changes_nothing_else(tmp_path, monkeypatch, phase, tried):
    from ppo_plus.models.actor_critic import ActorCritic

    sizes = {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    plain = make_trainer(tmp_path, config=sizes)
    plain.train()
    call, seen = getattr(ActorCritic, phase), []

    def small_card(self, input_ids, *args, **kwargs):
        if not torch.is_grad_enabled():
            seen.append(len(input_ids))
            if len(input_ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory (as if)")
        return call(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(ActorCritic, phase, small_card)
    trainer = make_trainer(tmp_path, config=sizes)
    with pytest.warns(UserWarning, match="Out of memory: .*reduced to 2 rows"):
        trainer.train()
    assert seen[:4] == tried
    assert all(
        torch.allclose(a, b, atol=1e-4)
        for a, b in zip(trained_weights(trainer).values(), trained_weights(plain).values(), strict=True)
    )


@pytest.mark.parametrize(
    ("error", "survived"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
            True,
        ),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_memory_runs_out_under_several_names(error, survived):
    done = []

    def run(rows):
        if len(rows) > 2:
            raise error
        done.extend(rows.tolist())

    if not survived:
        with pytest.raises(type(error), match=re.escape(str(error))):
            BatchSize(4).run(torch.arange(7), run)
        assert done == []
        return
    with pytest.warns(UserWarning, match="reduced to 2 rows"):
        size = BatchSize(4)
        size.run(torch.arange(7), run)
    assert size.rows == 2
    assert done == list(range(7))


def test_out_of_memory_with_a_single_row_is_an_error(tmp_path, monkeypatch):
    from ppo_plus.models.actor_critic import ActorCritic

    def no_card(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory (as if)")

    monkeypatch.setattr(ActorCritic, "sample", no_card)
    with pytest.warns(UserWarning, match="Out of memory"), pytest.raises(torch.OutOfMemoryError):
        make_trainer(tmp_path, config={"max_steps": 4}).train()


class DiesInBackward(torch.autograd.Function):
    """The identity, whose backward pass runs out of memory."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory (as if)")


def small_card(monkeypatch, phase, most_rows):
    """While it learns, the model runs out of memory beyond so many rows; returns the sizes that were tried."""
    from ppo_plus.models.actor_critic import ActorCritic
    from ppo_plus.models.backbone_runner import BackboneRunner

    forward, run, sizes = ActorCritic.forward, BackboneRunner.run, []

    def counting(self, input_ids, *args, **kwargs):
        if torch.is_grad_enabled():
            sizes.append(len(input_ids))
            if phase == "forward" and len(input_ids) > most_rows:
                raise torch.OutOfMemoryError("CUDA out of memory (as if)")
        return forward(self, input_ids, *args, **kwargs)

    def dying(self, model, input_ids, *args, **kwargs):
        # The value head, above the hidden states, has its gradient by then; the layers below have none.
        out = run(self, model, input_ids, *args, **kwargs)
        if phase == "backward" and torch.is_grad_enabled() and len(input_ids) > most_rows:
            out.last_hidden_state = DiesInBackward.apply(out.last_hidden_state)
        return out

    monkeypatch.setattr(ActorCritic, "forward", counting)
    monkeypatch.setattr(BackboneRunner, "run", dying)
    return sizes


@pytest.fixture(scope="module")
def on_a_large_card(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("large"), config={"max_steps": 4, "per_device_train_batch_size": 4})
    trainer.train()
    return trained_weights(trainer), trainer.state.log_history


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_out_of_memory_in_learning_halves_the_micro_batch_and_changes_nothing_else(
    tmp_path, monkeypatch, phase, on_a_large_card
):
    sizes = small_card(monkeypatch, phase, most_rows=2)
    trainer = make_trainer(tmp_path, config={"max_steps": 4, "per_device_train_batch_size": 4})
    with pytest.warns(UserWarning, match="Out of memory: .*reduced to 2 rows"):
        trainer.train()
    assert sizes[0] > 2 and max(sizes[1:]) == 2 and sum(sizes[1:]) == 4 * 8  # tried once; then 4 steps of 8 rows
    expected, expected_log = on_a_large_card
    found = trained_weights(trainer)
    assert max((found[name] - expected[name]).abs().max() for name in expected) < 1e-5
    for row, expected_row in zip(trainer.state.log_history, expected_log, strict=True):
        for name in ("loss", "grad_norm", "critic/grad_norm", "ppo/ratio", "ppo/value_loss", "clip_ratio/policy"):
            assert row.get(name) == pytest.approx(expected_row.get(name), abs=1e-4)


def test_a_gradient_left_by_a_pass_that_died_would_be_seen(tmp_path, monkeypatch, on_a_large_card):
    """Negative control: without beginning the step anew the value head's would count twice."""
    small_card(monkeypatch, "backward", most_rows=2)
    monkeypatch.setattr(gradients_module.GradientAccumulator, "_restart", lambda self, *args: None)
    trainer = make_trainer(tmp_path, config={"max_steps": 4, "per_device_train_batch_size": 4})
    with pytest.warns(UserWarning, match="Out of memory"):
        trainer.train()
    name = "value_head.layers.0.weight"
    assert (trained_weights(trainer)[name] - on_a_large_card[0][name]).abs().max() > 1e-4


def test_out_of_memory_in_learning_with_a_single_row_is_an_error(tmp_path, monkeypatch):
    small_card(monkeypatch, "backward", most_rows=0)
    with pytest.warns(UserWarning, match="1 rows"), pytest.raises(torch.OutOfMemoryError):
        make_trainer(tmp_path, config={"max_steps": 4}).train()


def test_out_of_memory_in_a_reward_model_halves_its_batch_and_gives_the_same_scores(monkeypatch):
    from conftest import make_tokenizer
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from ppo_plus.rewards import ClassifierReward, Completions

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1, num_attention_heads=4))
    reward = ClassifierReward(model, make_tokenizer(), "judge", batch_size=64, chat_template_kwargs={})
    texts = ["a film", "very good", "b", "the worst of all", "c"]
    batch = Completions(prompts=texts, completions=[" indeed"] * 5, completion_ids=[[1]] * 5)
    expected, forward, tried = reward(batch), model.forward, []

    def small_card(input_ids, **kwargs):
        tried.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (as if)")
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", small_card)
    with pytest.warns(UserWarning, match="reduced to 2 rows"):
        found = reward(batch)
    assert found == pytest.approx(expected, abs=1e-5) and len({round(s, 4) for s in found}) == 5
    reward(batch)
    assert tried == [5, 2, 2, 1, 2, 2, 1]  # what fitted is remembered

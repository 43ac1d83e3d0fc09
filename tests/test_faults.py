"""A half-written checkpoint is never taken for a whole one, and signals end a run in good order."""

from __future__ import annotations

import json
import shutil
import signal
import warnings

import pytest
import torch
from conftest import make_trainer
from transformers import TrainerCallback

import ppo_plus.trainer as trainer_module
from ppo_plus.checkpoint import MANIFEST, damage, last_whole_checkpoint, seal


def steps(folder):
    return sorted(int(p.name.rpartition("-")[2]) for p in folder.glob("checkpoint-*"))


def saving(folder, **config):
    defaults = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    return make_trainer(folder, config={**defaults, **config})


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer = saving(folder)
    trainer.train()
    return folder, weights(trainer)


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
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "it was not finished"),
    "manifest cut": (lambda d: cut(d / MANIFEST), "it cannot be read"),
    "adapter missing": (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "one byte short": (lambda d: cut(d / "optimizer.pt"), "optimizer.pt is not as it was written"),
    "one bit flipped": (lambda d: flip(d / "rollout_0.safetensors"), "rollout_0.safetensors is not as it was written"),
    "trainer state cut": (lambda d: cut(d / "trainer_state.json"), "trainer_state.json is not as it was written"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(copy, whole_run, name):
    spoil, words = DAMAGES[name]
    assert damage(copy / "checkpoint-6") is None
    spoil(copy / "checkpoint-6")
    assert words in damage(copy / "checkpoint-6")
    shutil.rmtree(copy / "checkpoint-5")
    trainer = saving(copy)
    with pytest.warns(UserWarning, match=f"checkpoint-6 is skipped: .*{words}"):
        trainer.train(resume_from_checkpoint=True)
    assert equal(weights(trainer), whole_run[1])
    assert damage(copy / "checkpoint-6") is None  # written again, whole


def test_a_damaged_checkpoint_that_was_asked_for_by_name_is_refused(copy):
    cut(copy / "checkpoint-6" / "optimizer.pt")
    with pytest.raises(ValueError, match=r"checkpoint-6 cannot be resumed: optimizer.pt is not as it was written"):
        saving(copy).train(resume_from_checkpoint=str(copy / "checkpoint-6"))


def test_without_any_checkpoint_training_starts_anew(tmp_path, whole_run):
    trainer = saving(tmp_path)
    with pytest.warns(UserWarning, match="training starts anew"):
        trainer.train(resume_from_checkpoint=True)
    assert equal(weights(trainer), whole_run[1])


def test_the_checkpoint_before_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    trainer = saving(tmp_path, save_total_limit=1, max_steps=3)
    at_seal = []

    def watched(directory):
        at_seal.append([s for s in steps(tmp_path) if damage(tmp_path / f"checkpoint-{s}") is None])
        seal(directory)

    monkeypatch.setattr(trainer_module, "seal", watched)
    trainer.train()
    assert at_seal == [[], [1], [2]]
    assert steps(tmp_path) == [3]
    assert trainer.args.save_total_limit == 1


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    from ppo_plus.rollout import Rollout

    trainer = saving(tmp_path, save_total_limit=1)

    def full(self, path):
        if "checkpoint-3" in str(path):
            raise OSError(28, "No space left on device", str(path))
        return save(self, path)

    save = Rollout.save
    monkeypatch.setattr(Rollout, "save", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert trainer.args.save_total_limit == 1


class RaiseAt(TrainerCallback):
    """Sends this process signals at a step."""

    def __init__(self, step, number, times=1):
        self.step, self.number, self.times = step, number, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for _ in range(self.times):
                signal.raise_signal(self.number)


def test_one_interrupt_finishes_the_step_saves_and_then_interrupts(tmp_path, whole_run, capfd):
    trainer = saving(tmp_path, save_strategy="no")
    trainer.add_callback(RaiseAt(2, signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "SIGINT: finishing this step and saving" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    assert steps(tmp_path) == [3] and damage(tmp_path / "checkpoint-3") is None

    resumed = saving(tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(resumed), whole_run[1])


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


def test_too_many_skipped_steps_in_a_row_stop_the_run_and_name_the_last_checkpoint(tmp_path, monkeypatch):
    trainer = saving(tmp_path, max_steps=6, max_skipped_steps=2)
    spoil_the_loss(trainer, monkeypatch, {1, 3, 4})  # 1 is alone, 3 and 4 are in a row
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match=r"2 steps in a row .*checkpoint-4\."):
        trainer.train()
    assert trainer.state.global_step == 4


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
    with pytest.warns(UserWarning, match="'broken' is left out of this rollout"):
        other.train()
    assert equal(weights(trainer), weights(other))
    with pytest.raises((TimeoutError, ValueError)):
        make_trainer(tmp_path, config={"max_steps": 1}, reward_funcs=[count_e, broken]).train()


@pytest.mark.parametrize("phase", ["generate", "forward"])
def test_out_of_memory_in_a_rollout_halves_the_chunk_and_changes_nothing_else(tmp_path, monkeypatch, phase):
    from ppo_plus.modeling import ActorCritic

    plain = make_trainer(tmp_path, config={"max_steps": 4})
    plain.train()
    call, seen = getattr(ActorCritic, phase), []

    def small_card(self, input_ids, *args, **kwargs):
        if not torch.is_grad_enabled():
            seen.append(len(input_ids))
            if len(input_ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory (as if)")
        return call(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(ActorCritic, phase, small_card)
    trainer = make_trainer(tmp_path, config={"max_steps": 4})
    with pytest.warns(UserWarning, match="Out of memory: going on with 2 rows"):
        trainer.train()
    assert seen[:4] == [8, 4, 2, 2]
    assert all(
        torch.allclose(a, b, atol=1e-4) for a, b in zip(weights(trainer).values(), weights(plain).values(), strict=True)
    )


def test_out_of_memory_with_a_single_row_is_an_error(tmp_path, monkeypatch):
    from ppo_plus.modeling import ActorCritic

    def no_card(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory (as if)")

    monkeypatch.setattr(ActorCritic, "generate", no_card)
    with pytest.warns(UserWarning, match="Out of memory"), pytest.raises(torch.OutOfMemoryError):
        make_trainer(tmp_path, config={"max_steps": 4}).train()

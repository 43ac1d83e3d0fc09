"""Two processes (DDP, gloo, CPU) train the policy that one process trains with twice the micro-batches."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_trainer
from support_table import EVALUATION, SHARED

from ppo_plus import AdaptiveKLCallback, RewardNormalizationCallback
from ppo_plus.report.page import read_run
from ppo_plus.rollout.buffer import Rollout

ROOT = Path(__file__).parents[1]
SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
from conftest import lora, make_trainer
from ppo_plus import AdaptiveKLCallback, RewardNormalizationCallback

trainer = make_trainer(
    {folder!r},
    config={{"max_steps": {steps}, "save_strategy": "steps", "save_steps": 3, "ddp_backend": "gloo", **{config}}},
    peft_config=lora(),
    callbacks=[AdaptiveKLCallback(target=1.0, horizon=20), RewardNormalizationCallback()],
)
{prepare}
trainer.train(resume_from_checkpoint={resume!r})
state = {{n: p for n, p in trainer.model.named_parameters() if p.requires_grad}}
flat = torch.cat([p.detach().flatten() for p in state.values()])
everywhere = trainer.accelerator.gather(flat[None])
assert all(torch.equal(row, flat) for row in everywhere), "the processes do not hold the same weights"
if trainer.accelerator.is_main_process:
    trainer.save_model({folder!r} + "/final")
    torch.save(flat, {folder!r} + "/weights.pt")
    log = [row for row in trainer.state.log_history if "reward" in row]
    print("RESULT" + json.dumps({{"processes": trainer.accelerator.num_processes, "sum": flat.double().sum().item(),
                                  "norm": flat.double().norm().item(), "log": log,
                                  "skipped": [r["ppo/skipped_steps"] for r in trainer.state.log_history
                                              if "ppo/skipped_steps" in r]}}))
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
"""


def launch(folder, *, steps=6, resume=None, config=None, prepare="", result="RESULT"):
    folder.mkdir(exist_ok=True)
    script = folder / "train.py"
    tests = str(Path(__file__).parent)
    text = {"tests": tests, "folder": str(folder), "steps": steps, "resume": resume, "config": config or {}}
    script.write_text(SCRIPT.format(**text, prepare=prepare))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    _, found, rest = done.stdout.partition(result)
    assert found, done.stdout[-2000:]
    return json.JSONDecoder().raw_decode(rest)[0]  # whatever the other process wrote on the same line


@pytest.mark.support("R", SHARED)
@pytest.mark.slow
def test_two_processes_train_save_once_and_resume_to_the_same_bits(tmp_path):
    whole = launch(tmp_path / "whole")
    assert whole["processes"] == 2
    checkpoint = tmp_path / "whole" / "checkpoint-3"  # inside the first rollout
    saved = {f.name for f in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "value_head.safetensors", "manifest.json"} <= saved
    assert {"rollout_0.safetensors", "rollout_1.safetensors", "ppo_state_0.json", "ppo_state_1.json"} <= saved
    resumed = launch(tmp_path / "resumed", resume=str(checkpoint))
    assert (resumed["sum"], resumed["norm"]) == (whole["sum"], whole["norm"])
    final = {f.name for f in (tmp_path / "whole" / "final").iterdir()}
    assert "adapter_model.safetensors" in final and "model.safetensors" not in final
    for folder in ("", "checkpoint-3", "final"):
        card = (tmp_path / "whole" / folder / "README.md").read_text()
        assert "2 processes" in card and "More Information Needed" not in card and str(tmp_path) not in card


MEASURED = ("reward", "reward_std", "kl", "entropy", "completions/mean_length", "num_tokens", "ppo/kl_coef",
            "critic/explained_variance", "clip_ratio/policy", "ppo/ratio", "grad_norm")  # fmt: skip


def alone(folder, seed=42, stream=False, resume=None, **config):
    """One process with twice the micro-batches of SCRIPT: weights and log."""
    trainer = make_trainer(
        folder,
        config={"max_steps": 6, "gradient_accumulation_steps": 4, "seed": seed, **config},
        callbacks=[AdaptiveKLCallback(target=1.0, horizon=20), RewardNormalizationCallback()],
    )
    if stream:
        trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    trainer.train(resume_from_checkpoint=resume)
    flat = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    return flat, [row for row in trainer.state.log_history if "reward" in row]


@pytest.mark.support("1", SHARED, "`num_generations`", "critic `adapter`, updated twice")
@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [{}, {"num_generations": 4}, {"critic": "adapter", "num_critic_updates": 2, "critic_backbone_learning_rate": 1e-3}],
    ids=["", "several answers", "a critic that is updated twice"],
)
def test_two_processes_train_what_one_trains_with_twice_the_micro_batches(tmp_path, config):
    """Sampling, minibatches, whitening, statistics and gradients: 6 steps, in the second rollout already."""
    two = launch(tmp_path / "two", config={"gradient_accumulation_steps": 2, **config})
    weights, log = alone(tmp_path / "one", seed=42, **config)
    other, _ = alone(tmp_path / "other", seed=43, **config)
    found = torch.load(tmp_path / "two" / "weights.pt")
    assert two["processes"] == 2 and (found - weights).abs().max() < 1e-4
    assert (found - other).abs().max() > 1e-2  # negative control
    assert len(two["log"]) == len(log) >= 2
    for ours, theirs in zip(two["log"], log, strict=True):
        for name in MEASURED:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


def differs(two, log, one):
    """Of a run on two processes and one on one: the largest difference of a weight; their logs are equal."""
    weights, found = one
    assert len(log) == len(found) >= 1
    for ours, theirs in zip(log, found, strict=True):
        for name in MEASURED:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    return (torch.load(two / "weights.pt") - weights).abs().max()


EACH_STEP = {"save_steps": 1, "save_strategy": "steps", "logging_steps": 4}  # metrics of step 3 are in no log yet


@pytest.mark.support("1", "a checkpoint of two processes continued by one")
@pytest.mark.slow
def test_a_run_of_two_processes_continues_on_one(tmp_path, monkeypatch):
    """Inside a rollout, whose rows both have saved, and at the border of two; the same responses in total per step."""
    whole = launch(tmp_path / "two", config=EACH_STEP)
    inside, border = (str(tmp_path / "two" / f"checkpoint-{step}") for step in (3, 4))
    for checkpoint in (inside, border):
        one = alone(tmp_path / Path(checkpoint).name, resume=checkpoint, **EACH_STEP)
        assert differs(tmp_path / "two", whole["log"], one) < 1e-4
    with pytest.raises(
        ValueError, match=r"responses_per_rollout 16 there, 8 here.*gradient_accumulation_steps must be 8"
    ):
        alone(tmp_path / "half", resume=inside, **EACH_STEP, gradient_accumulation_steps=2)
    concatenate = Rollout.concatenate  # negative control: the rows of the other process come first
    monkeypatch.setattr(Rollout, "concatenate", lambda rollouts, pad: concatenate(rollouts[::-1], pad))
    swapped, _ = alone(tmp_path / "swapped", resume=inside, **EACH_STEP)
    assert (torch.load(tmp_path / "two" / "weights.pt") - swapped).abs().max() > 1e-3
    (tmp_path / "two" / "checkpoint-3" / "ppo_state_1.json").unlink()
    with pytest.raises(ValueError, match="ppo_state_1.json"):
        alone(tmp_path / "lost", resume=inside, **EACH_STEP)


@pytest.mark.support("1", "a checkpoint of one process continued by two")
@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4], ids=["inside a rollout", "between two"])
def test_a_run_of_one_process_continues_on_two(tmp_path, step):
    one = alone(tmp_path / "one", **EACH_STEP)
    checkpoint = str(tmp_path / "one" / f"checkpoint-{step}")
    resumed = launch(tmp_path / "two", resume=checkpoint, config=EACH_STEP)
    assert resumed["processes"] == 2 and differs(tmp_path / "two", resumed["log"], one) < 1e-4
    other, _ = alone(tmp_path / "other", seed=43, **EACH_STEP)
    assert (torch.load(tmp_path / "two" / "weights.pt") - other).abs().max() > 1e-2  # negative control


@pytest.mark.support("1", "prompts from a stream")
@pytest.mark.slow
def test_two_processes_share_the_rollouts_of_a_stream(tmp_path):
    """A stream is read in its own order, so the same prompts make another run than shuffled ones do."""
    stream = "trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()"
    launch(tmp_path / "two", config={"gradient_accumulation_steps": 2}, prepare=stream)
    found = torch.load(tmp_path / "two" / "weights.pt")
    assert (found - alone(tmp_path / "one", seed=42, stream=True)[0]).abs().max() < 1e-4
    assert (found - alone(tmp_path / "shuffled", seed=42)[0]).abs().max() > 1e-2  # negative control


NAN_ON_ONE = """
compute = trainer.compute_loss
def spoiled(*args, **kwargs):
    here = trainer.accelerator.process_index == 1 and trainer.state.global_step == 2
    return compute(*args, **kwargs) * (float("nan") if here else 1.0)
trainer.compute_loss = spoiled
"""


@pytest.mark.support("runs", "NaN gradients on one process", columns=["DDP", "sharded"])
@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["copies", "sharded"])
def test_a_nan_on_one_process_is_skipped_by_both(tmp_path, fsdp):
    """The gradients are those of all processes when they are looked at, so all come to the same decision."""
    # `launch` asserts that both hold the same weights.
    found = launch(tmp_path / "spoiled", steps=4, prepare=NAN_ON_ONE, config={"fsdp": fsdp})
    assert found["skipped"] == [1.0] and math.isfinite(found["norm"])


LOGS_ALONE = """
from ppo_plus import PPOCallback

class Log(PPOCallback):
    def on_rollout_end(self, args, state, control, **kwargs):  # what `log_metric` does, with names of their own
        rank = trainer.accelerator.process_index
        for name, value in ({"both": 1.0} if rank == 0 else {"alone": 3.0, "both": 4.0}).items():
            trainer._progress.meter.add(name, value)

trainer.add_callback(Log())
"""


@pytest.mark.slow
def test_a_metric_that_one_process_has_is_logged(tmp_path):
    """A reward function may have something to say of rows that only one process got."""
    log = launch(tmp_path / "alone", steps=1, prepare=LOGS_ALONE)["log"]
    assert (log[0]["alone"], log[0]["both"]) == (3.0, 2.5)


SIGNAL_TO_ONE = """
import signal
from ppo_plus import PPOCallback

class Raise(PPOCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if trainer.accelerator.process_index == 1 and state.global_step == {step}:
            signal.raise_signal({number})

trainer.add_callback(Raise())
"""


@pytest.mark.support("R", "SIGTERM to one process", columns=["DDP", "sharded"])
@pytest.mark.slow
@pytest.mark.parametrize(("number", "fsdp"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path, number, fsdp):
    """Each by the signal, and with a checkpoint from which a run goes on to the same bits."""
    folder = tmp_path / "stopped"
    folder.mkdir()
    text = {"tests": str(Path(__file__).parent), "folder": str(folder), "steps": 6, "resume": None}
    text["config"] = {"fsdp": fsdp, "html_report": True}
    prepare = SIGNAL_TO_ONE.format(step=1, number=int(number))
    (folder / "train.py").write_text(SCRIPT.format(**text, prepare=prepare))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2",
              "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(folder / "train.py")],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [-number] * 2, said[0][-3000:] + said[1][-3000:]
    assert [f"{number.name}: finishing this step and saving" in text for text in said] == [False, True]
    assert [f.name for f in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    if number == signal.SIGTERM:
        whole = launch(tmp_path / "whole", config={"fsdp": fsdp})
        checkpoint = str(folder / "checkpoint-2")  # a damaged one is refused
        resumed = launch(tmp_path / "resumed", resume=checkpoint, config={"fsdp": fsdp})
        assert (resumed["sum"], resumed["norm"]) == (whole["sum"], whole["norm"])


LEAVES = """
import atexit, signal, torch
from ppo_plus.training.shutdown import GracefulShutdownCallback

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
atexit.register(lambda: print("at the end:", torch.distributed.is_initialized()))
try:
    with GracefulShutdownCallback():
        if {interrupted}:
            signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("caught:", torch.distributed.is_initialized())
"""


@pytest.mark.parametrize("interrupted", [True, False])
def test_an_interrupted_process_leaves_its_group_at_its_end(interrupted):
    """And no sooner: who catches the interrupt may go on. Else the group's threads may end it with another status."""
    script = [sys.executable, "-c", LEAVES.format(interrupted=interrupted)]
    done = subprocess.run(script, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.splitlines() == (["caught: True", "at the end: False"] if interrupted else ["at the end: True"])


EVALUATE = """
trainer.args.eval_win_rate = True
trainer.eval_dataset = trainer.train_dataset.select(range(5))
try:
    trainer.evaluate(trainer.train_dataset.select(range(1)))
except ValueError as error:
    assert "each of the 2 processes, and there are 1" in str(error)
else:
    raise AssertionError("one prompt for two processes was taken")
first = trainer.evaluate()
assert first["eval_win_rate"] == 0.5, first
shown = trainer.predict(trainer.eval_dataset)
if trainer.accelerator.is_main_process:
    print("EVALUATED" + json.dumps([first, shown.predictions.tolist()]))
"""


@pytest.mark.support("1", EVALUATION)
@pytest.mark.slow
def test_two_processes_evaluate_and_predict_what_one_does(tmp_path):
    """Five prompts: one process answers three of them, the other two."""
    folder = tmp_path / "two"
    folder.mkdir()
    found = launch(folder, steps=1, config={"html_report": True}, prepare=EVALUATE, result="EVALUATED")
    report = read_run(folder / "report.html")
    assert [len(answers["rows"]) for answers in report["answers"]] == [6, 6]  # process 0 answers all fixed prompts
    one = make_trainer(tmp_path / "one", config={"eval_win_rate": True})
    one.eval_dataset = one.train_dataset.select(range(5))
    metrics, answers = one.evaluate(), one.predict(one.eval_dataset).predictions.tolist()
    assert found[1] == answers
    for name in ("eval_reward", "eval_reward_std", "eval_kl", "eval_entropy", "eval_completions/mean_length"):
        assert found[0][name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name


RANK_0_ALONE = """
from pathlib import Path
from ppo_plus import PPOCallback

seen = []

class Look(PPOCallback):
    def on_rewards_computed(self, args, state, control, scores, gathered_scores, **kwargs):
        seen.append(gathered_scores.tolist())
        Path(args.output_dir, "seen.json").write_text(json.dumps(seen))

    def on_rollout_end(self, args, state, control, rollout, samples, metrics, **kwargs):
        metrics["look"] = metrics["reward"]

class Double(PPOCallback):
    def on_rewards_computed(self, args, state, control, scores, gathered_scores, **kwargs):
        scores.mul_(2)

callbacks, main = trainer.callback_handler.callbacks, trainer.accelerator.is_main_process
normalize = callbacks.pop(next(i for i, c in enumerate(callbacks) if type(c) is RewardNormalizationCallback))
for callback in [Look()] * main + [Double()] + [Look()] * main + [normalize] + [Look(), Look()] * main:
    trainer.add_callback(callback)
"""


@pytest.mark.slow
def test_no_process_waits_for_a_callback_that_one_alone_has(tmp_path):
    """It gets the scores of both processes, as the last callback left them that both have."""
    log = launch(tmp_path, steps=1, prepare=RANK_0_ALONE)["log"]
    first, doubled, *normalized = (torch.tensor(row) for row in json.loads((tmp_path / "seen.json").read_text()))
    assert len(first) == 16 and first.std() > 0  # 8 of each process
    assert first.mean().item() == pytest.approx(log[0]["reward"]) == log[0]["look"]
    assert torch.equal(doubled, 2 * first)
    expected = (doubled - doubled.mean()) / doubled.std(unbiased=False)
    assert len(normalized) == 2 and all((row - expected).abs().max() < 1e-4 for row in normalized)

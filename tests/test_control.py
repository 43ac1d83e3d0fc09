"""Control flags of callbacks: of one process alone, in a rollout, and between the micro-batches of a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SIZES, lora, make_prompts, make_tokenizer, make_trainer
from datasets import Dataset
from transformers import EarlyStoppingCallback, LlamaConfig, LlamaForSequenceClassification, TrainerCallback

from ppo_plus import (
    AdaptiveKLCallback,
    EarlyStoppingOnKLCallback,
    PPOCallback,
    RewardConfig,
    RewardNormalizationCallback,
    RewardTrainer,
)
from ppo_plus.training.control import ControlMixin

ROOT = Path(__file__).parents[1]
EVENTS = (
    "on_train_begin", "on_epoch_begin", "on_epoch_end", "on_step_begin", "on_substep_end", "on_pre_optimizer_step",
    "on_step_end", "on_log", "on_evaluate", "on_save", "on_rollout_begin", "on_rollout_end", "on_rollout_progress",
)  # fmt: skip


class SetFlag(PPOCallback):
    """Sets a flag once, in an event at a step or later."""

    def __init__(self, event: str, flag: str, step: int = 3) -> None:
        self.event, self.flag, self.step, self.is_done = event, flag, step, False


def setter(event: str):
    def handle(self, args, state, control, **kwargs):
        if event == self.event and state.global_step >= self.step and not self.is_done:
            self.is_done = True
            setattr(control, self.flag, True)

    return handle


for each in EVENTS:
    setattr(SetFlag, each, setter(each))


class Journal(TrainerCallback):
    """Notes at which steps a run logs, evaluates and saves."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_save(self, args, state, control, **kwargs):
        self.events.append(f"save {state.global_step}")

    def on_evaluate(self, args, state, control, **kwargs):
        self.events.append(f"eval {state.global_step}")

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.events.append(f"log {state.global_step}")


class Halve(PPOCallback):
    def on_rewards_computed(self, args, state, control, scores, **kwargs):
        scores.mul_(0.5)


def run(folder: Path, callbacks: list, *, reward: bool = False, **config) -> dict:
    """Train, and return the last step, the journal, and the error."""
    journal = Journal()
    if reward:
        trainer = reward_trainer(folder, [journal, *callbacks], **config)
    else:
        trainer = make_trainer(
            folder, config={"logging_steps": 100, **config}, callbacks=[journal], eval_dataset=make_prompts(4)
        )
        for callback in callbacks:  # after those that the trainer adds
            trainer.add_callback(callback)
    try:
        trainer.train()
    except ValueError as error:
        return {"error": str(error)}
    return {"step": trainer.state.global_step, "events": journal.events}


def reward_trainer(folder: Path, callbacks: list, **config) -> RewardTrainer:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1))
    pairs = Dataset.from_dict({"chosen": ["see", "the"] * 32, "rejected": ["xx", "yy"] * 32})
    config = {"logging_steps": 100, "save_strategy": "no", **config}
    args = RewardConfig(
        output_dir=str(folder), max_steps=8, report_to="none", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        **config,
    )  # fmt: skip
    return RewardTrainer(
        model, args, train_dataset=pairs, eval_dataset=pairs.select(range(4)), peft_config=lora(),
        processing_class=make_tokenizer(), callbacks=callbacks,
    )  # fmt: skip


# On one process


@pytest.mark.parametrize("event", ["on_rollout_end", "on_step_begin", "on_substep_end"])
def test_a_stop_within_a_step_takes_effect_after_it(event, tmp_path, monkeypatch):
    """Steps 1 to 4 learn from the first rollout, step 5 is the first of the second."""
    assert run(tmp_path, [SetFlag(event, "should_training_stop", 4)])["step"] == 5
    monkeypatch.setattr(ControlMixin, "_defer_control", lambda self: None)  # negative control: half a minibatch is lost
    assert run(tmp_path, [SetFlag(event, "should_training_stop", 4)])["step"] == 4


def test_a_stop_before_the_last_event_of_a_step_trains_it_whole(tmp_path):
    """The same weights as of a run of so many steps."""
    stopped = make_trainer(tmp_path, callbacks=[SetFlag("on_substep_end", "should_training_stop", 1)])
    stopped.train()
    whole = make_trainer(
        tmp_path, config={"max_steps": 8}, callbacks=[SetFlag("on_step_end", "should_training_stop", 2)]
    )
    whole.train()
    assert stopped.state.global_step == 2
    weights = [dict(trainer.model.named_parameters()) for trainer in (stopped, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# On two processes, with a callback on the second alone

CASES = {  # event, flag, first step: the last step, what every process does
    ("on_train_begin", "should_training_stop", 0): (1, []),
    ("on_substep_end", "should_training_stop", 3): (4, []),
    ("on_step_end", "should_save", 3): (8, ["save 3"]),
    ("on_step_end", "should_evaluate", 3): (8, ["eval 3"]),
    ("on_step_end", "should_training_stop", 3): (3, []),
    ("on_step_end", "should_epoch_stop", 4): (8, []),
    ("on_log", "should_evaluate", 3): (8, ["log 3", "eval 3", "log 6"]),
    ("on_evaluate", "should_save", 3): (8, ["eval 3", "save 3", "eval 6", "eval 8"]),
    ("on_save", "should_training_stop", 3): (3, ["save 3"]),
    ("on_rollout_progress", "should_training_stop", 3): (5, []),
}
EVERY_3 = {
    "on_log": {"logging_steps": 3},
    "on_evaluate": {"eval_strategy": "steps", "eval_steps": 3},
    "on_save": {"save_strategy": "steps", "save_steps": 3},
}
REWARD_CASES = {
    ("on_substep_end", "should_training_stop", 3): (4, []),
    ("on_log", "should_save", 3): (8, ["log 3", "save 3", "log 6"]),
    ("on_evaluate", "should_training_stop", 3): (3, ["eval 3"]),
}
OTHERS = {
    "early stopping": (
        lambda: EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e9),
        {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "reward", "save_strategy": "steps",
         "save_steps": 2, "load_best_model_at_end": True},
    ),
    "KL bound": (lambda: EarlyStoppingOnKLCallback(max_kl=1e-9), {}),
    "KL controller": (lambda: AdaptiveKLCallback(target=0.1, horizon=50), {}),
    "normalization": (RewardNormalizationCallback, {}),
    "halved": (Halve, {}),
}  # fmt: skip


def run_all(folder: Path, rank: int) -> dict[str, dict]:
    """Run every case on this process of two."""
    found = {}

    def on_second(callback):
        return [callback] if rank == 1 else []

    for cases, reward in ((CASES, False), (REWARD_CASES, True)):
        for event, flag, step in cases:
            name = f"{event} {flag} {reward}"
            callbacks = on_second(SetFlag(event, flag, step))
            options = {"ddp_backend": "gloo", **EVERY_3.get(event, {})}
            found[name] = run(folder / name.replace(" ", "_"), callbacks, reward=reward, **options)
    for name, (make, options) in OTHERS.items():
        found[name] = run(folder / name.replace(" ", "_"), on_second(make()), ddp_backend="gloo", **options)
    controllers = [AdaptiveKLCallback(target=0.1, horizon=50), RewardNormalizationCallback()]
    found["both"] = run(folder / "both", controllers, ddp_backend="gloo")
    return found


@pytest.mark.slow
def test_what_one_process_asks_for_is_done_by_all_or_refused_by_all(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=560)
    assert done.returncode == 0, done.stderr[:6000]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    for cases, reward in ((CASES, False), (REWARD_CASES, True)):
        for (event, flag, _), (step, events) in cases.items():
            found = ranks[0][f"{event} {flag} {reward}"]
            assert found == {"step": step, "events": events}, (event, flag, reward)
    assert ranks[0]["early stopping"]["step"] == 4
    assert ranks[0]["KL bound"]["step"] == 5  # the KL of the first rollout is 0
    assert "different KL coefficients" in ranks[0]["KL controller"]["error"]
    assert ranks[0]["normalization"]["error"].startswith("RewardNormalizationCallback changed the scores")
    assert ranks[0]["halved"]["error"].startswith("Halve changed the scores")
    assert ranks[0]["both"]["step"] == 8


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(run_all(Path(sys.argv[1]), rank)))

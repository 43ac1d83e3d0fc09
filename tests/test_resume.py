"""A run that was interrupted anywhere ends in the same bits as one that was not, and nothing less will do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import lora, make_model, make_prompts, make_trainer
from transformers import LlamaForSequenceClassification

from ppo_plus import AdaptiveKLCallback, PPOCallback, RewardNormalizationCallback, Rollout
from ppo_plus.training.checkpoint import Rank, load_progress, write_manifest

STEPS = 13  # rollouts at steps 0, 4, 8 and 12; the second data epoch begins at step 8
TIMES = ("time/", "train_", "epoch")

# What a checkpoint must bring back is different for each of these: one line makes a critic part of the table.
CRITICS = {
    "shared": {"critic": "shared"},
    "detached": {"critic": "detached", "value_head": "mlp"},
    "adapter": {"critic": "adapter", "critic_warmup_steps": 2},
    "separate": {"critic": "separate"},
    "twice updated": {"critic": "adapter", "num_critic_updates": 2},
    "pretrained": {
        "critic": "detached",
        "critic_warmup_steps": 12,
        "critic_warmup_explained_variance": 0.0,
        "lam": 0.5,
        "value_head_learning_rate": 0.05,
    },
}
KINDS = {
    "adaptive KL": {},
    "dropout": {"dropout": 0.1},
    "no accumulation": {"gradient_accumulation_steps": 1},
    "fixed KL": {"adaptive": False},
    "several answers": {"num_generations": 4},
}
SETTINGS = {
    **KINDS,
    **{f"{critic} critic": {**config, "dropout": 0.1} for critic, config in CRITICS.items()},
}
# After the first, middle and last but one minibatch of a rollout; between rollouts and epochs; in the second epoch.
POSITIONS = (1, 2, 3, 8, 10)


class Rollouts(PPOCallback):
    """Keeps what is learned from, by the step at which it was collected."""

    def __init__(self):
        self.by_step = {}

    def on_rollout_end(self, args, state, control, rollout, **kwargs):
        names = [f.name for f in fields(Rollout) if getattr(rollout, f.name) is not None]
        self.by_step[state.global_step] = {name: getattr(rollout, name).clone() for name in names}


def make_value_model():
    torch.manual_seed(1)
    model_config = make_model().config
    model_config.num_labels = 1
    return LlamaForSequenceClassification(model_config)


def run(folder, *, resume=None, dropout=0.0, adaptive=True, spoil=None, arguments=None, **config):
    """Train, and return weights, optimizer state, rollouts and log at the end."""
    config = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, **config}
    rollouts = Rollouts()
    callbacks = [RewardNormalizationCallback(), rollouts]
    if adaptive:
        callbacks.append(AdaptiveKLCallback(target=1.0, horizon=20))
    trainer = make_trainer(
        folder,
        config=config,
        callbacks=callbacks,
        # Two rollouts make an epoch, whatever their size.
        **{
            "train_dataset": make_prompts(8 * config.get("gradient_accumulation_steps", 2)),
            "peft_config": lora(lora_dropout=dropout),
            "value_model": make_value_model() if config.get("critic") == "separate" else None,
            **(arguments or {}),
        },
    )
    if spoil is not None:
        spoil(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad},
        "optimizer": trainer.optimizer.state_dict()["state"],
        "schedule": trainer.lr_scheduler.state_dict()["last_epoch"],
        "rollouts": rollouts.by_step,
        "log": [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in trainer.state.log_history],
    }


def largest_gap(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """One whole run per setting, with a checkpoint at every step."""
    runs = {}

    def get(name="adaptive KL"):
        if name not in runs:
            folder = tmp_path_factory.mktemp("run")
            runs[name] = (folder, run(folder, **SETTINGS[name]))
        return runs[name]

    return get


RESUME = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
from test_resume import SETTINGS, run

for setting, step, checkpoint, folder in json.load(open(sys.argv[1])):
    torch.save(run(folder, resume=checkpoint, save_strategy="no", **SETTINGS[setting]), folder + ".pt")
"""


@pytest.fixture(scope="module")
def resumed(undisturbed, tmp_path_factory):
    """The whole table, resumed in a process that made none of the checkpoints."""
    folder = tmp_path_factory.mktemp("resumed")
    cases = [
        (setting, step, str(undisturbed(setting)[0] / f"checkpoint-{step}"), str(folder / f"{setting} {step}"))
        for setting in SETTINGS
        for step in POSITIONS
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    script = RESUME.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script, str(folder / "cases.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return {(setting, step): torch.load(f"{path}.pt", weights_only=True) for setting, step, _, path in cases}


@pytest.mark.parametrize("step", POSITIONS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_resumed_in_a_fresh_process_ends_in_the_same_bits(undisturbed, resumed, setting, step):
    _, whole = undisturbed(setting)
    found = resumed[setting, step]
    assert largest_gap(whole["weights"], found["weights"]) == 0.0
    assert whole["optimizer"].keys() == found["optimizer"].keys() and len(found["optimizer"]) == len(found["weights"])
    for index, state in whole["optimizer"].items():
        assert state.keys() == found["optimizer"][index].keys()
        assert all(torch.equal(value, found["optimizer"][index][name]) for name, value in state.items())
    assert whole["schedule"] == found["schedule"] == STEPS
    assert whole["log"] == found["log"]
    collected = {s: rollout for s, rollout in whole["rollouts"].items() if s >= step}
    assert collected.keys() == found["rollouts"].keys() and 12 in collected
    for at, rollout in collected.items():
        assert all(torch.equal(tensor, found["rollouts"][at][name]) for name, tensor in rollout.items())


def test_the_gap_is_seen_if_the_rollout_is_another_one(undisturbed, tmp_path):
    """Negative control: a resumed run that learns from another rollout must not end in the same bits."""
    folder, whole = undisturbed()
    copy = tmp_path / "checkpoint-6"
    shutil.copytree(folder / "checkpoint-6", copy)
    shutil.copy(folder / "checkpoint-3" / "rollout_0.safetensors", copy)
    write_manifest(copy)
    assert largest_gap(whole["weights"], run(tmp_path / "out", resume=str(copy))["weights"]) > 1e-4


def test_a_missing_rollout_is_named(undisturbed, tmp_path):
    folder, _ = undisturbed()
    copy = tmp_path / "checkpoint-6"
    shutil.copytree(folder / "checkpoint-6", copy)
    (copy / "rollout_0.safetensors").unlink()
    write_manifest(copy)
    with pytest.raises(RuntimeError, match="inside rollout 1.*multiple of 4"):
        run(tmp_path / "out", resume=str(copy))


@pytest.mark.parametrize(
    ("piece", "smallest_gap"),
    [("sampling", 1e-3), ("callbacks", 1e-7), ("minibatches", 1e-5), ("value head", 1e-5)],
)
def test_every_piece_of_the_state_matters(undisturbed, tmp_path, piece, smallest_gap, monkeypatch):
    """Negative controls: leave one piece out of what is restored, and the weights must differ."""
    import ppo_plus.data.batching as batching_module
    import ppo_plus.rollout.collector as collector_module

    folder, whole = undisturbed()
    derive_seed = batching_module.derive_seed

    def other_seed(kind):
        return lambda seed, *position: derive_seed(seed + (position[0] == kind), *position)

    def spoil(trainer):
        if piece == "sampling":
            monkeypatch.setattr(collector_module, "derive_seed", other_seed("rollout"))
        elif piece == "minibatches":
            monkeypatch.setattr(batching_module, "derive_seed", other_seed("minibatches"))
        elif piece == "callbacks":
            trainer.args.restore_callback_states_from_checkpoint = False
        else:
            monkeypatch.setattr(trainer.model.value_head, "load_state_dict", lambda state: None)

    spoiled = run(tmp_path, resume=str(folder / "checkpoint-6"), spoil=spoil)
    assert largest_gap(whole["weights"], spoiled["weights"]) > smallest_gap


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gradient_accumulation_steps": 1}, "responses_per_rollout 8 there, 4 here"),
        ({"num_ppo_epochs": 1}, "num_ppo_epochs 2 there, 1 here"),
        ({"num_mini_batches": 1, "gradient_accumulation_steps": 4}, "num_mini_batches 2 there, 1 here"),
        ({"seed": 7}, "seed 42 there, 7 here"),
        ({"data_seed": 7}, "data_seed None there, 7 here"),
        ({"response_length": 9}, "response_length 8 there, 9 here"),
    ],
)
def test_a_checkpoint_whose_steps_mean_something_else_is_refused(undisturbed, tmp_path, config, message):
    folder, _ = undisturbed()
    with pytest.raises(ValueError, match=message):
        run(tmp_path, resume=str(folder / "checkpoint-6"), **config)


def test_a_checkpoint_of_another_base_with_the_same_shapes_is_refused(undisturbed, tmp_path):
    folder, _ = undisturbed()
    with pytest.raises(ValueError, match="base_weights [0-9a-f]{12} there, [0-9a-f]{12} here"):
        run(tmp_path, resume=str(folder / "checkpoint-6"), arguments={"model": make_model(seed=1)})


def test_the_base_is_told_by_what_training_does_not_change(undisturbed, tmp_path):
    """Adapters come and go on the same base, and another one is told from its first numbers."""
    from ppo_plus.training.checkpoint import weights_digest

    trainer = make_trainer(tmp_path, config={"max_steps": 1})
    before = weights_digest(trainer.model.frozen_models)
    trainer.train()
    assert weights_digest(trainer.model.frozen_models) == before
    in_full = make_trainer(tmp_path, config={"max_steps": 1}, peft_config=None)
    before_in_full = weights_digest(in_full.model.frozen_models)
    in_full.train()
    assert weights_digest(in_full.model.frozen_models) == before_in_full
    assert weights_digest([make_model(seed=1).requires_grad_(False)]) != weights_digest(
        [make_model().requires_grad_(False)]
    )


class Packed(torch.Tensor):
    """A weight of several tensors, as torchao makes them: it has a dtype, and numbers only for who asks its way."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.weight = weight

    def __tensor_flatten__(self):
        return ["weight"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].weight)
        raise NotImplementedError(func)


def test_a_base_with_weights_of_several_tensors_has_a_name():
    from ppo_plus.training.checkpoint import weights_digest

    def digest(seed):
        model = make_model(seed=seed).requires_grad_(False)
        layer = model.model.layers[0].mlp.up_proj
        layer.weight = torch.nn.Parameter(Packed(layer.weight.detach()), requires_grad=False)
        return weights_digest([model])

    assert digest(0) == digest(0) != digest(1)


def test_the_evaluation_cadence_does_not_alter_training(tmp_path, undisturbed):
    _, whole = undisturbed()
    config = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "no"}
    found = run(tmp_path, arguments={"eval_dataset": make_prompts(5)}, **config)
    assert largest_gap(whole["weights"], found["weights"]) == 0.0
    assert [row["step"] for row in found["log"] if "eval_reward" in row] == [3, 6, 9, 12, STEPS]


@pytest.mark.parametrize(("formats", "file"), [((2, 1), "ppo_state_1"), ((1, 2), "ppo_state_0")])
def test_another_number_of_processes_checks_the_format_of_every_state(tmp_path, formats, file):
    for index, version in enumerate(formats):
        state = {"format_version": version, "num_processes": 2}
        (tmp_path / f"ppo_state_{index}.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(ValueError, match=r"older ppo_plus \(format 1"):
        load_progress(tmp_path, Rank(index=0, count=1), {}, pad_token_id=0)
    current = tmp_path / f"{file}.json"
    current.write_text(json.dumps({"format_version": 2, "num_processes": 2}), encoding="utf-8")
    with pytest.raises(KeyError, match="fingerprint"):  # control: with formats of today it reads on
        load_progress(tmp_path, Rank(index=0, count=1), {}, pad_token_id=0)

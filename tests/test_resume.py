"""A run that was interrupted anywhere ends in the same bits as one that was not, and nothing less will do."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import lora, make_trainer

from ppo_plus import AdaptiveKLCallback, RewardNormalizationCallback
from ppo_plus.checkpoint import seal

STEPS = 12  # three rollouts of 4 steps; the second data epoch begins at step 8
TIMES = ("time/", "train_", "epoch")


def callbacks():
    return [AdaptiveKLCallback(target=1.0, horizon=20), RewardNormalizationCallback()]


def run(folder, *, resume=None, dropout=0.0, spoil=None, **config):
    """Train, and return (weights, optimizer state, log) at the end."""
    config = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, **config}
    trainer = make_trainer(folder, config=config, callbacks=callbacks(), peft_config=lora(lora_dropout=dropout))
    if spoil is not None:
        spoil(trainer)
    trainer.train(resume_from_checkpoint=resume)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    log = [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in trainer.state.log_history]
    return weights, trainer.optimizer.state_dict()["state"], log


def largest_gap(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """One whole run per setting, with a checkpoint at every step."""
    runs = {}

    def get(**setting):
        key = tuple(sorted(setting.items()))
        if key not in runs:
            folder = tmp_path_factory.mktemp("run")
            runs[key] = (folder, run(folder, **setting))
        return runs[key]

    return get


@pytest.mark.parametrize("setting", [{}, {"dropout": 0.1}, {"gradient_accumulation_steps": 1}])
@pytest.mark.parametrize("step", [1, 3, 4, 6, 8, 11])  # inside and between rollouts, first and second data epoch
def test_resumed_run_ends_in_the_same_bits(undisturbed, tmp_path, step, setting):
    folder, (weights, optimizer, log) = undisturbed(**setting)
    resumed, resumed_optimizer, resumed_log = run(tmp_path, resume=str(folder / f"checkpoint-{step}"), **setting)
    assert largest_gap(weights, resumed) == 0.0
    for index, state in optimizer.items():
        for name, value in state.items():
            assert torch.equal(value, resumed_optimizer[index][name])
    assert log == resumed_log


def test_the_gap_is_seen_if_the_rollout_is_another_one(undisturbed, tmp_path):
    """Negative control: a resumed run that learns from another rollout must not end in the same bits."""
    folder, (weights, _, _) = undisturbed()
    copy = tmp_path / "checkpoint-6"
    shutil.copytree(folder / "checkpoint-6", copy)
    shutil.copy(folder / "checkpoint-3" / "rollout_0.safetensors", copy)
    seal(copy)
    assert largest_gap(weights, run(tmp_path / "out", resume=str(copy))[0]) > 1e-4


def test_a_missing_rollout_is_named(undisturbed, tmp_path):
    folder, _ = undisturbed()
    copy = tmp_path / "checkpoint-6"
    shutil.copytree(folder / "checkpoint-6", copy)
    (copy / "rollout_0.safetensors").unlink()
    seal(copy)
    with pytest.raises(RuntimeError, match="inside rollout 1.*multiple of 4"):
        run(tmp_path / "out", resume=str(copy))


@pytest.mark.parametrize(
    ("piece", "smallest_gap"),
    [("sampling", 1e-3), ("callbacks", 1e-7), ("minibatches", 1e-5), ("value head", 1e-5)],
)
def test_every_piece_of_the_state_matters(undisturbed, tmp_path, piece, smallest_gap, monkeypatch):
    """Negative controls: leave one piece out of what is restored, and the weights must differ."""
    import ppo_plus.rollout as rollout_module
    import ppo_plus.trainer as trainer_module

    folder, (weights, _, _) = undisturbed()
    position_seed = rollout_module.position_seed

    def other_seed(kind):
        return lambda seed, *position: position_seed(seed + (position[0] == kind), *position)

    def spoil(trainer):
        if piece == "sampling":
            monkeypatch.setattr(trainer_module, "position_seed", other_seed("rollout"))
        elif piece == "minibatches":
            monkeypatch.setattr(rollout_module, "position_seed", other_seed("minibatches"))
        elif piece == "callbacks":
            trainer.args.restore_callback_states_from_checkpoint = False
        else:
            monkeypatch.setattr(trainer.model.value_head, "load_state_dict", lambda state: None)

    resumed, _, _ = run(tmp_path, resume=str(folder / "checkpoint-6"), spoil=spoil)
    assert largest_gap(weights, resumed) > smallest_gap


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gradient_accumulation_steps": 1}, "rollout_batch_size 8 there, 4 here"),
        ({"num_ppo_epochs": 1}, "num_ppo_epochs 2 there, 1 here"),
        ({"num_mini_batches": 1, "gradient_accumulation_steps": 4}, "num_mini_batches 2 there, 1 here"),
        ({"seed": 7}, "seed 42 there, 7 here"),
        ({"response_length": 9}, "response_length 8 there, 9 here"),
    ],
)
def test_a_checkpoint_whose_steps_mean_something_else_is_refused(undisturbed, tmp_path, config, message):
    folder, _ = undisturbed()
    with pytest.raises(ValueError, match=message):
        run(tmp_path, resume=str(folder / "checkpoint-6"), **config)


def test_the_evaluation_cadence_does_not_alter_training(tmp_path, undisturbed):
    from conftest import make_config, make_prompts

    _, (weights, _, _) = undisturbed()
    config = make_config(tmp_path, max_steps=STEPS, eval_strategy="steps", eval_steps=3)
    trainer = make_trainer(tmp_path, callbacks=callbacks(), args=config, eval_dataset=make_prompts(5),
                           peft_config=lora(lora_dropout=0.0))  # fmt: skip
    trainer.train()
    found = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert largest_gap(weights, found) == 0.0
    assert sum("eval_reward" in row for row in trainer.state.log_history) == 4

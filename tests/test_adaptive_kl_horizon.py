"""The KL controller acts at the size of the run, or says that it does not."""

from __future__ import annotations

import warnings

import pytest
from conftest import make_config, make_trainer
from transformers import TrainerControl, TrainerState

from ppo_plus import AdaptiveKLCallback, PPOCallback
from ppo_plus.callbacks.base import RolloutSettings
from ppo_plus.callbacks.kl import default_horizon


class FarAway(PPOCallback):
    """Reports a KL far above every target."""

    def __init__(self):
        self.coefficients = []

    def on_rollout_end(self, args, state, control, rollout, samples, metrics, **kwargs):
        self.coefficients.append(metrics["ppo/kl_coef"])
        metrics["kl"] = 1000.0


def controlled(tmp_path, callback, rollouts, kl, **config):
    """The coefficients of a run's rollouts under a constant KL, without a model."""
    args = make_config(tmp_path, **config)
    state = TrainerState(max_steps=rollouts * args.steps_per_rollout)
    control, found = TrainerControl(), []
    callback.on_train_begin(args, state, control)
    for index in range(rollouts):
        state.global_step = index * args.steps_per_rollout
        settings = RolloutSettings(kl_coef=args.kl_coef)
        callback.on_rollout_begin(args, state, control, settings=settings)
        found.append(settings.kl_coef)
        callback.on_rollout_end(args, state, control, rollout=None, samples=None, metrics={"kl": kl})
    return found


@pytest.mark.parametrize(
    ("rollouts", "expected"),
    [
        (8, 1.2**7),  # 64 episodes, a horizon of one rollout: 0.2 a rollout
        (40, (1 + 0.2 * 8 / 32) ** 39),  # 320 episodes, a horizon of 32
        (1000, (1 + 0.2 * 8 / 800) ** 999),  # 8,000 episodes, a horizon of 800: about e^2
    ],
)
def test_the_default_acts_in_runs_of_every_size(tmp_path, rollouts, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        up = controlled(tmp_path, AdaptiveKLCallback(), rollouts, kl=1000.0)
        down = controlled(tmp_path, AdaptiveKLCallback(), rollouts, kl=0.0)
    assert up[-1] / up[0] == pytest.approx(expected)
    assert down[-1] / down[0] < 0.5 and min(down) > 0


@pytest.mark.parametrize(
    ("rollout", "run", "expected"), [(8, 8, 8), (8, 64, 8), (32, 512, 51), (64, 100_000, 10_000), (512, 10**7, 10_000)]
)
def test_the_default_horizon(rollout, run, expected):
    assert default_horizon(rollout, run) == expected


def test_a_long_run_keeps_zieglers_horizon(tmp_path):
    config = {"per_device_train_batch_size": 128}
    default = controlled(tmp_path, AdaptiveKLCallback(), 400, kl=7.0, **config)
    assert default == controlled(tmp_path, AdaptiveKLCallback(horizon=10_000), 400, kl=7.0, **config)


def test_a_horizon_that_does_nothing_in_the_run_is_named(tmp_path):
    """64 episodes and the horizon of the paper: 0.2 * 64 / 10,000 is 0.1 %."""
    with pytest.warns(UserWarning, match=r"horizon=10000 .* at most 0\.1% .* 64 episodes"):
        found = controlled(tmp_path, AdaptiveKLCallback(horizon=10_000), 8, kl=1000.0)
    assert found[-1] / found[0] < 1.002
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        controlled(tmp_path, AdaptiveKLCallback(horizon=128), 8, kl=6.0)  # 10 %
        controlled(tmp_path, AdaptiveKLCallback(band=(1.0, 5.0), horizon=10_000), 8, kl=6.0)


@pytest.mark.parametrize("horizon", [1, 1.6])
def test_a_horizon_that_takes_the_coefficient_below_zero_is_refused(tmp_path, horizon):
    with pytest.raises(ValueError, match=f"horizon={horizon} .*rollouts of 8"):
        controlled(tmp_path, AdaptiveKLCallback(horizon=horizon), 2, kl=0.0)
    assert min(controlled(tmp_path, AdaptiveKLCallback(horizon=2), 8, kl=0.0)) > 0  # control


def test_the_default_acts_in_training_and_after_a_checkpoint(tmp_path):
    def run(folder, **config):
        watch = FarAway()
        trainer = make_trainer(
            folder, callbacks=[watch, AdaptiveKLCallback()],
            config={"max_steps": 12, "save_strategy": "steps", "save_steps": 8, **config},
        )  # fmt: skip
        return trainer, watch

    trainer, watch = run(tmp_path)
    trainer.train()
    assert watch.coefficients == pytest.approx([0.05, 0.06, 0.072])  # 24 episodes, 0.2 a rollout of 8
    resumed, watch = run(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert watch.coefficients == pytest.approx([0.072])

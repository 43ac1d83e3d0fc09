"""The KL controller acts at the size of the run, or says that it does not."""

from __future__ import annotations

import json
import math
import random
import warnings

import pytest
from conftest import make_config, make_trainer
from transformers import TrainerControl, TrainerState

from ppo_plus import AdaptiveKLCallback, PPOCallback, algo
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


# --- a controller with gains ---


def test_the_pi_controller_by_hand():
    """error log(2), before log(1): 0.1 * 2 ** (0.2 + 1) = 0.2297; a KL of 0 counts as a factor of e too low."""
    assert algo.log_kl_error(8.0, 4.0) == pytest.approx(math.log(2))
    assert (algo.log_kl_error(0.0, 4.0), algo.log_kl_error(-0.1, 4.0), algo.log_kl_error(99.0, 4.0)) == (-1, -1, 1)
    assert algo.pi_kl_coef(0.1, math.log(2), 0.0, proportional=1.0, integral=0.2) == pytest.approx(0.22973967)


def simulated(tmp_path, callback, start, target, lag, rollouts=16):
    """The last KL over its target: KL approaches `target (0.1 / beta) ** 2`, by at most 1.5 nats a rollout, measured
    with 10 % noise. `start` is the first beta over the right one.
    """
    args = make_config(tmp_path, kl_coef=0.1 * start)
    state, control, kl, noise = TrainerState(max_steps=rollouts * 4), TrainerControl(), 0.0, random.Random(0)
    callback.on_train_begin(args, state, control)
    for _ in range(rollouts):
        settings = RolloutSettings(kl_coef=args.kl_coef)
        callback.on_rollout_begin(args, state, control, settings=settings)
        measured = kl * (1 + noise.gauss(0, 0.1))
        callback.on_rollout_end(args, state, control, rollout=None, samples=None, metrics={"kl": measured})
        kl += min((target * (0.1 / callback.kl_coef) ** 2 - kl) / lag, 1.5)
    return kl / target


def test_gains_end_within_15_percent_of_the_target_where_the_integral_alone_does_not(tmp_path):
    cases = [(start, target, lag) for start in (0.5, 1, 2) for target in (4.0, 8.0) for lag in (3, 5)]
    damped = [simulated(tmp_path, AdaptiveKLCallback(t, gains=(1.0, 0.2)), s, t, lag) for s, t, lag in cases]
    assert max(abs(x - 1) for x in damped) < 0.15
    alone = [simulated(tmp_path, AdaptiveKLCallback(t, gains=(0.0, 0.2)), s, t, lag) for s, t, lag in cases]
    horizon = [simulated(tmp_path, AdaptiveKLCallback(t, horizon=32), s, t, lag) for s, t, lag in cases]
    assert max(alone) > 1.3 and max(horizon) > 1.3


def test_gains_go_on_after_a_resume(tmp_path):
    whole, first = (AdaptiveKLCallback(target=2.0, gains=[1.0, 0.2]) for _ in range(2))
    for callback in (whole, first):
        callback.kl_coef = 0.1
        callback.on_rollout_end(None, None, None, rollout=None, samples=None, metrics={"kl": 3.0})
    saved = json.loads(json.dumps(first.state()))
    resumed = AdaptiveKLCallback.from_state(saved)
    forgetful = AdaptiveKLCallback.from_state({**saved, "attributes": {"kl_coef": saved["attributes"]["kl_coef"]}})
    for callback in (whole, resumed, forgetful):
        callback.on_rollout_end(None, None, None, rollout=None, samples=None, metrics={"kl": 1.0})
    assert resumed.kl_coef == whole.kl_coef != forgetful.kl_coef


@pytest.mark.parametrize("options", [{"gains": (1.0, 0.0)}, {"gains": (-1.0, 0.2)}, {"gains": (1.0,)}])
def test_wrong_gains_are_refused(options):
    with pytest.raises(ValueError, match="gains="):
        AdaptiveKLCallback(**options)


@pytest.mark.parametrize("options", [{"horizon": 64}, {"band": (1.0, 2.0)}])
def test_gains_exclude_what_would_have_no_effect(options):
    with pytest.raises(ValueError, match="no effect with gains"):
        AdaptiveKLCallback(gains=(1.0, 0.2), **options)

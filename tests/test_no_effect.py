"""Options that would leave no trace in a run are refused or named when the trainer, the configuration or the callback
is made.
"""

from __future__ import annotations

import warnings

import pytest
from conftest import make_config, make_prompts, make_trainer

import ppo_plus.training.setup
from ppo_plus import AdaptiveKLCallback, EarlyStoppingOnKLCallback, RewardConfig, RewardNormalizationCallback

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def no_weights(monkeypatch):
    """Fail where weights are loaded."""
    monkeypatch.setattr(
        ppo_plus.training.setup, "load_policy", lambda *args, **kwargs: pytest.fail("weights were loaded")
    )


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"num_train_epochs": 0, "max_steps": -1}, "num_train_epochs must be .* got 0"),
        ({"num_train_epochs": -1.0, "max_steps": -1}, "num_train_epochs must be .* got -1.0"),
        ({"num_train_epochs": NAN, "max_steps": -1}, "num_train_epochs must be .* got nan"),
        ({"num_train_epochs": "3", "max_steps": -1}, "num_train_epochs must be .* got '3'"),
        ({"max_steps": 0}, "max_steps must be 1 or more.* got 0"),
        ({"max_steps": 2.5}, "max_steps must be .* got 2.5"),
    ],
)
@pytest.mark.parametrize("kind", ["PPOConfig", "RewardConfig"])
def test_training_of_no_length_is_refused(tmp_path, config, named, kind):
    with pytest.raises(ValueError, match=f"{kind}: {named}"):
        make_config(tmp_path, **config) if kind == "PPOConfig" else RewardConfig(str(tmp_path), use_cpu=True, **config)


def test_epochs_play_no_part_where_steps_or_episodes_decide(tmp_path):
    assert make_config(tmp_path, num_train_epochs=0, max_steps=4).requested_max_steps == 4
    assert make_config(tmp_path, num_train_epochs=0, max_steps=-1, total_episodes=16).requested_max_steps == 8
    trainer = make_trainer(tmp_path, config={"num_train_epochs": 0.4, "max_steps": -1})
    trainer.train()
    assert trainer.state.global_step == 4  # of 8 in an epoch


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ({"max_steps": 5}, 5),
        ({"max_steps": -1, "total_episodes": 9}, 8),
        ({"max_steps": -1, "num_train_epochs": 2}, 16),
    ],
)
def test_a_warm_up_of_the_whole_run_is_named(tmp_path, length, steps):
    named = f"critic_warmup_steps={steps} covers all {steps} optimizer steps"
    with pytest.warns(UserWarning, match=named):
        make_trainer(tmp_path, config={**length, "critic_warmup_steps": steps})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_trainer(tmp_path, config={**length, "critic_warmup_steps": steps - 1})


@pytest.mark.parametrize("warmup", [{"warmup_steps": 8}, {"warmup_steps": 1000}, {"warmup_steps": 9, "max_steps": 5}])
def test_a_learning_rate_that_rises_to_the_end_is_named(tmp_path, warmup):
    steps = warmup.get("max_steps", 8)
    reached = f"{(steps - 1) / warmup['warmup_steps']:.1%}"
    with pytest.warns(UserWarning, match=f"warmup_steps={warmup['warmup_steps']} covers all {steps} .* {reached} of"):
        make_trainer(tmp_path, config=warmup)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_trainer(tmp_path, config={"warmup_steps": 7})
        make_trainer(tmp_path, config={"warmup_steps": 0.5})
        make_trainer(tmp_path, config={**warmup, "lr_scheduler_type": "constant"})  # has none


def test_a_win_rate_that_is_not_measured_chooses_no_checkpoint(tmp_path):
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 500}
    with pytest.raises(ValueError, match="metric_for_best_model must be .* eval_win_rate=True"):
        make_config(tmp_path, **best, metric_for_best_model="eval_win_rate")
    assert make_config(tmp_path, **best, metric_for_best_model="win_rate", eval_win_rate=True).greater_is_better


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"bf16_full_eval": True}, "bf16_full_eval=True"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length'"),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy='batch_rebalance'"),
        ({"learning_rate": "3e-5"}, "learning_rate must be .* got '3e-5'"),
        ({"learning_rate": NAN}, "learning_rate must be .* got nan"),
        ({"center_rewards_coefficient": -0.1}, "center_rewards_coefficient must be .* got -0.1"),
    ],
)
def test_an_argument_that_the_pairwise_loss_cannot_use_is_refused(tmp_path, options, named):
    with pytest.raises(ValueError, match=f"RewardConfig: {named}"):
        RewardConfig(str(tmp_path), use_cpu=True, **options)
    RewardConfig(str(tmp_path), use_cpu=True, train_sampling_strategy="sequential", center_rewards_coefficient=0.01)


def test_a_win_rate_without_prompts_is_named(tmp_path):
    with pytest.warns(UserWarning, match="eval_win_rate=True .* eval_dataset"):
        trainer = make_trainer(tmp_path, config={"eval_win_rate": True})
    assert trainer.evaluate(make_prompts(4))["eval_win_rate"] == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_trainer(tmp_path, config={"eval_win_rate": True}, eval_dataset=make_prompts(4))


def test_a_coefficient_that_stays_zero_is_refused(tmp_path, no_weights):
    for arguments in ({}, {"band": (1.0, 5.0)}):
        with pytest.raises(ValueError, match="AdaptiveKLCallback .* kl_coef=0"):
            make_trainer(tmp_path, config={"kl_coef": 0.0}, callbacks=[AdaptiveKLCallback(**arguments)])


def test_a_callback_that_is_added_later_is_checked_when_training_begins(tmp_path):
    trainer = make_trainer(tmp_path, config={"kl_coef": 0.0})
    trainer.add_callback(AdaptiveKLCallback())
    with pytest.raises(ValueError, match="AdaptiveKLCallback .* kl_coef=0"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_horizon_that_would_turn_the_sign_of_the_coefficient_is_refused(tmp_path, no_weights):
    """A rollout of 8 episodes may change it by 0.2 * 8 / horizon."""
    with pytest.raises(ValueError, match="horizon=1 .* rollouts of 8, .* by 160%: set horizon above 1.6"):
        make_trainer(tmp_path, callbacks=[AdaptiveKLCallback(horizon=1)])
    config = make_config(tmp_path)
    AdaptiveKLCallback(horizon=2).check_arguments(config)
    AdaptiveKLCallback(horizon=1, band=(1.0, 2.0)).check_arguments(config)


@pytest.mark.parametrize(
    ("callback", "arguments", "named"),
    [
        (RewardNormalizationCallback, {"clip": -1}, "clip=-1"),
        (RewardNormalizationCallback, {"clip": 0.0}, "clip=0.0"),
        (RewardNormalizationCallback, {"clip": NAN}, "clip=nan"),
        (RewardNormalizationCallback, {"clip": "5"}, "clip='5'"),
        (RewardNormalizationCallback, {"decay": NAN}, "decay=nan"),
        (RewardNormalizationCallback, {"decay": "0.9"}, "decay='0.9'"),
        (AdaptiveKLCallback, {"target": NAN}, "target=nan"),
        (AdaptiveKLCallback, {"target": "6"}, "target='6'"),
        (AdaptiveKLCallback, {"horizon": INF}, "horizon=inf"),
        (AdaptiveKLCallback, {"band": (1.0, NAN)}, "band="),
        (AdaptiveKLCallback, {"band": (1.0,)}, "band="),
        (EarlyStoppingOnKLCallback, {"max_kl": NAN}, "max_kl=nan"),
        (EarlyStoppingOnKLCallback, {"patience": "2"}, "patience='2'"),
    ],
)
def test_an_argument_of_a_callback_that_could_not_work_is_named(callback, arguments, named):
    with pytest.raises(ValueError, match=f"{callback.__name__}: .*{named}"):
        callback(**arguments)


def test_arguments_at_the_edge_of_what_works_are_taken():
    RewardNormalizationCallback(decay=0, clip=1e-3)
    RewardNormalizationCallback(clip=None)
    assert AdaptiveKLCallback(target=1e-3, horizon=1, band=[0, 1]).horizon == 1
    EarlyStoppingOnKLCallback(max_kl=1, patience=1)

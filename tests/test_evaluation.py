"""Evaluation and prediction: what they return, that training does not notice, and how often the policy wins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import as_text, count_e, make_config, make_prompts, make_trainer
from transformers import Cache

from ppo_plus import PPOCallback, RewardConfig


def trained(tmp_path, steps=8, **overrides):
    config = {"max_steps": steps or 1, "eval_win_rate": True, "kl_coef": 0.0, **overrides.pop("config", {})}
    trainer = make_trainer(tmp_path, config=config, **{"eval_dataset": make_prompts(6), **overrides})
    if steps:
        trainer.train()
    return trainer


def decodes(trainer, run) -> int:
    """How many prompts are answered from the start while `run` runs."""
    seen = []
    hook = trainer.model.language_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])) if kwargs["use_cache"]
        and not any(isinstance(value, Cache) for value in kwargs.values()) else None, with_kwargs=True)  # fmt: skip
    run()
    hook.remove()
    return sum(seen)


def test_the_policy_ties_with_itself(tmp_path):
    """Before training it is the reference, and the noise is the same."""
    assert trained(tmp_path, steps=0).evaluate()["eval_win_rate"] == 0.5


def test_the_win_rate_counts_prompts_by_hand(tmp_path):
    trainer = trained(tmp_path, steps=20)
    metrics = trainer.evaluate()
    ours = trainer.generate_completions().scores
    (answers,) = trainer._evaluator.reference_cache.values()
    theirs = torch.tensor(count_e(answers.prompts, answers.completions))
    points = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)]
    assert metrics["eval_win_rate"] == pytest.approx(sum(points) / 6) and sum(points) > 3
    # An independent reference: the untrained model, by the same noise.
    untrained = trained(tmp_path / "other", steps=0).generate_completions()
    assert answers.completions == untrained.completions.completions


def test_the_reference_answers_once_per_dataset_and_only_if_asked(tmp_path):
    trainer = trained(tmp_path, steps=0)
    assert decodes(trainer, trainer.evaluate) == 12
    assert decodes(trainer, trainer.evaluate) == 6
    assert decodes(trainer, lambda: trainer.evaluate(make_prompts(4))) == 8
    without = trained(tmp_path, steps=0, config={"eval_win_rate": False})
    assert decodes(without, without.evaluate) == 6
    assert "eval_win_rate" not in without.evaluate()


def test_a_prompt_that_is_not_scored_decides_nothing(tmp_path):
    def half(prompts, completions, **kwargs):
        return [None if i % 2 else score for i, score in enumerate(count_e(prompts, completions))]

    with pytest.warns(UserWarning, match="returned None for 3 of 6"):
        assert trained(tmp_path, steps=0, reward_funcs=half).evaluate()["eval_win_rate"] == 0.5


def test_asking_for_the_win_rate_does_not_alter_training(tmp_path):
    weights = []
    for asked in (True, False):
        config = {"eval_strategy": "steps", "eval_steps": 2, "eval_win_rate": asked}
        trainer = trained(tmp_path / str(asked), config=config)
        weights.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_the_best_model_may_be_the_one_that_wins_most(tmp_path):
    config = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4,
              "load_best_model_at_end": True, "metric_for_best_model": "eval_win_rate"}  # fmt: skip
    trainer = trained(tmp_path, config=config)
    rates = [row["eval_win_rate"] for row in trainer.state.log_history if "eval_win_rate" in row]
    assert len(rates) == 2 and trainer.state.best_metric == max(rates)


@pytest.mark.parametrize("name", [None, "some"], ids=["one dataset", "several"])
def test_the_best_model_is_the_one_with_the_highest_reward_unless_another_metric_is_named(tmp_path, name):
    config = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
              "load_best_model_at_end": True, "num_ppo_epochs": 1}  # fmt: skip
    metric = "eval_reward" if name is None else f"eval_{name}_reward"
    data = {}
    if name is not None:
        config["metric_for_best_model"] = metric
        data["eval_dataset"] = {name: make_prompts(6), "other": make_prompts(4)}
    falling = iter(range(1000, 0, -1))

    def worse_and_worse(completions, **kwargs):
        return [float(next(falling)) for _ in completions]

    trainer = trained(tmp_path, steps=4, reward_funcs=worse_and_worse, config=config, **data)
    rewards = [row[metric] for row in trainer.state.log_history if metric in row]
    assert len(rewards) == 2 and rewards[0] > rewards[1]
    assert trainer.state.best_metric == rewards[0] and trainer.state.best_model_checkpoint.endswith("-2")


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize("better", [1, -1], ids=["rising", "falling"])
def test_a_schedule_that_follows_evaluations_takes_a_higher_reward_for_better(tmp_path, schedule, better):
    score = iter(range(0, 10_000 * better, better))

    def scores(completions, **kwargs):
        return [float(next(score)) for _ in completions]

    options = {"patience": 0, "factor": 0.5}
    config = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1, "save_strategy": "no",
              "lr_scheduler_type": schedule, "lr_scheduler_kwargs": options, "warmup_steps": 0}  # fmt: skip
    trainer = trained(tmp_path, steps=6, reward_funcs=scores, config=config)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert len(rates) == 6
    assert rates[-1] >= rates[0] if better == 1 else rates[-1] < rates[0]


def test_the_direction_of_such_a_schedule_can_be_set(tmp_path):
    config = make_config(tmp_path, eval_strategy="steps", eval_steps=1, lr_scheduler_type="reduce_lr_on_plateau",
                         metric_for_best_model="eval_kl", lr_scheduler_kwargs='{"mode": "min"}')  # fmt: skip
    assert config.lr_scheduler_kwargs == {"mode": "min"}
    assert make_config(tmp_path).lr_scheduler_kwargs is None
    for metric, mode in (("eval_accuracy", "max"), (None, "min")):
        config = RewardConfig(output_dir=str(tmp_path), report_to="none", eval_strategy="steps", eval_steps=1,
                              lr_scheduler_type="greedy", metric_for_best_model=metric)  # fmt: skip
        assert config.lr_scheduler_kwargs == {"mode": mode}


def test_predict_returns_the_answers_in_order(tmp_path):
    events = []

    class Heard(PPOCallback):
        def on_predict(self, args, state, control, metrics, **kwargs):
            events.append(metrics)

    trainer = trained(tmp_path, callbacks=[Heard()], config={"response_length": 30})
    logs = len(trainer.state.log_history)
    output = trainer.predict(make_prompts(6))
    assert output.label_ids is None and events == [output.metrics] and len(trainer.state.log_history) == logs
    expected = trainer.generate_completions().completions
    assert output.predictions.dtype == np.int64 and (output.predictions == -100).any()
    for row, ids in zip(output.predictions, expected.completion_ids, strict=True):
        assert row[: len(ids)].tolist() == ids and (row[len(ids) :] == -100).all()
    evaluated = trainer.evaluate()
    del evaluated["epoch"]  # which logging added
    assert output.metrics == {name.replace("eval_", "test_", 1): value for name, value in evaluated.items()}


def test_an_evaluation_shows_its_first_answers(tmp_path, capsys):
    config = {"num_sample_generations": 1, "num_completions_to_print": 2, "eval_win_rate": False}
    trainer = trained(tmp_path, steps=0, config=config)
    trainer.evaluate()
    shown = capsys.readouterr().out
    answers = trainer.generate_completions().completions.completions
    assert "Evaluation at step 0" in shown
    assert [as_text(a)[:3] in shown for a in answers[:2]] == [True, True]
    assert make_prompts(6)["prompt"][1] in shown and make_prompts(6)["prompt"][5] not in shown
    quiet = trained(tmp_path, steps=0)
    quiet.evaluate()
    assert "Evaluation" not in capsys.readouterr().out

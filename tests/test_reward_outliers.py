"""One absurd score leaves a run finite, and is named with its row."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from conftest import LETTERS, Recorder, as_text, make_prompts, make_trainer
from datasets import Dataset

from ppo_plus import PPOCallback, RewardNormalizationCallback
from ppo_plus.rewards import Completions, FunctionReward, RewardSet

OUTLIERS = [1e20, 3e38, -3e38, 1e9]
PROMPTS = Dataset.from_dict({"prompt": [f"the {a} {b}" for a in LETTERS[:8] for b in LETTERS[:8]]})


def numbers(logs):
    return [value for row in logs for value in row.values() if isinstance(value, int | float)]


class Spoiled:
    """Counts the letter e, but for one answer of the call `at`: the second is the first rollout."""

    __name__ = "spoiled"

    def __init__(self, outlier, per_token=False, at=2):
        self.outlier, self.per_token, self.at, self.calls, self.prompt = outlier, per_token, at, 0, None

    def __call__(self, prompts, completions, completion_ids, **kwargs):
        self.calls += 1
        scores = [float(as_text(c).count("e")) for c in completions]
        if self.per_token:
            scores = [[s / len(ids)] * len(ids) for s, ids in zip(scores, completion_ids, strict=True)]
        if self.calls == self.at:
            self.prompt = prompts[3]
            scores[3] = [self.outlier, *scores[3][1:]] if self.per_token else self.outlier
        return scores


@pytest.mark.parametrize(
    ("how", "outlier"),
    [*(("plain", outlier) for outlier in OUTLIERS), ("token", 1e20), ("whitened", 3e38), ("normalized", -3e38),
     ("adapter", 3e38)],
)  # fmt: skip
def test_a_run_stays_finite(tmp_path, base, reward_adapter, how, outlier):
    reward, watch = Spoiled(outlier, per_token=how == "token"), Recorder()
    normalize = [RewardNormalizationCallback(clip=None)] if how == "normalized" else []
    trainer = make_trainer(
        tmp_path, model=str(base), train_dataset=PROMPTS, callbacks=[*normalize, watch],
        reward_funcs=[reward, str(reward_adapter)] if how == "adapter" else reward,
        config={"max_steps": 8, "response_length": 6, "whiten_rewards": how == "whitened", "max_grad_norm": 0.0,
                "learning_rate": 1e-4, "cliprange_value": None},
    )  # fmt: skip
    with pytest.warns(UserWarning, match="'spoiled' returned") as caught:
        trainer.train()
    said = [str(w.message) for w in caught if "'spoiled' returned" in str(w.message)]
    assert len(said) == 1 and repr(reward.prompt) in said[0] and repr(outlier) in said[0]
    assert all(map(math.isfinite, numbers(trainer.state.log_history)))
    assert all(math.isfinite(value) for metrics in watch.metrics for value in metrics.values())
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    assert "ppo/skipped_steps" not in {name for row in trainer.state.log_history for name in row}
    learned = watch.rollouts[0].action_mask.any(1).tolist()
    assert learned == [True] * 8 if how == "adapter" else learned == [i != 3 for i in range(8)]
    assert all(rollout.returns.abs().max() < 1e3 for rollout in watch.rollouts)  # nothing of it is left
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert max(norms) < 1e3


def scored(scores, completions=None, **options):
    count = len(scores)
    batch = Completions(["p"] * count, completions or ["c"] * count, [[5, 6]] * count)
    return RewardSet([FunctionReward(lambda **_: scores, "f")], None, **options)(batch)


@pytest.mark.parametrize(
    "scores",
    [
        [0.0, 1.0, -1.0, 1e6],  # a million times 1 is the bound
        [1e7, 2e7, -3e7, 1e7],  # large throughout
        [1e-5, 2e-5, 100.0, 1e-5],  # small, and one that float32 still adds up beside others
        [0.0, 0.0, 0.0, 5.0],  # sparse
        [1e12, 1e12, 1e12, 5e14],
        [None, None, 2.0, 3.0],
    ],
)
def test_scores_of_any_usual_scale_are_left_alone(scores):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scored(scores) if None not in scores else scored(scores[2:])
    assert found.total.tolist() == pytest.approx([s for s in scores if s is not None])


@pytest.mark.parametrize(
    ("scores", "left_out"),
    [
        ([0.0, 1.0, -1.0, 1.1e6], [3]),
        ([1.0, 1e20, 2.0, -1e20], [1, 3]),
        ([1e16, 2e16, 1e16, 1e16], [0, 1, 2, 3]),  # beyond what is computed with, alone too
        ([[1e20, -1e20], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]], [0]),  # of sum 0
    ],
)
def test_what_float32_cannot_hold_beside_the_others_is_left_out(scores, left_out):
    with pytest.warns(UserWarning, match="'f' returned"):
        found = scored(scores)
    assert found.total.isnan().nonzero().squeeze(-1).tolist() == left_out
    assert bool(found.per_token.isfinite().all()) and not found.per_token[left_out].any()


def test_another_reward_still_scores_the_answer():
    batch = Completions(["p"] * 4, ["c"] * 4, [[5]] * 4)
    rewards = [FunctionReward(lambda **_: [1.0, 1e20, 2.0, 3.0], "f"), FunctionReward(lambda **_: [1.0] * 4, "g")]
    with pytest.warns(UserWarning, match="'f' returned 1e"):
        found = RewardSet(rewards, [1.0, 2.0])(batch)
    assert found.total.tolist() == [3.0, 2.0, 4.0, 5.0] and found.by_function[1].isnan().tolist() == [True, False]


@pytest.mark.parametrize("value", [1e20, math.inf, -math.inf])
def test_what_a_callback_makes_of_scores_is_bounded_too(tmp_path, value):
    class Spoil(PPOCallback):
        def on_rewards_computed(self, args, state, control, scores, **kwargs):
            scores[2] = value

    watch = Recorder()
    trainer = make_trainer(tmp_path, callbacks=[Spoil(), watch], train_dataset=make_prompts(), config={"max_steps": 4})
    with pytest.warns(UserWarning, match="score of prompt"):
        trainer.train()
    assert [i for i, learned in enumerate(watch.rollouts[0].action_mask.any(1)) if not learned] == [2]
    assert all(map(math.isfinite, numbers(trainer.state.log_history)))


def test_an_evaluation_stays_finite(tmp_path):
    reward = Spoiled(1e38, at=1)  # cheap answers are asked about when training starts, not here
    trainer = make_trainer(tmp_path, reward_funcs=reward, eval_dataset=make_prompts(8))
    with pytest.warns(UserWarning, match="'spoiled' returned"):
        metrics = trainer.evaluate()
    assert all(map(math.isfinite, numbers([metrics]))) and metrics["eval_reward"] < 10
    assert torch.tensor(metrics["eval_reward_std"]) < 10

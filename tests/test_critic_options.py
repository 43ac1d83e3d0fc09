"""Options of values and advantages, each with a slow oracle, a number worked by hand, and the same run without it."""

from __future__ import annotations

import pytest
import torch
from conftest import close, make_config, make_trainer
from test_functional import ragged, real_tokens, slow_gae, slow_moments

from ppo_plus import PPOCallback, algo
from ppo_plus.callbacks.training_health import TrainingHealthCallback
from ppo_plus.rollout.advantages import estimate_advantages


class Rollouts(PPOCallback):
    """Keeps rollouts with their metrics."""

    def __init__(self):
        self.kept = []

    def on_rollout_end(self, args, state, control, rollout, samples, metrics, **kwargs):
        self.kept.append((rollout, samples, dict(metrics)))


def train(tmp_path, **config):
    rollouts = Rollouts()
    trainer = make_trainer(tmp_path, config=config, callbacks=[rollouts])
    trainer.train()
    return trainer, rollouts.kept


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


# --- two lambdas, and one by length ---


def test_lambda_by_length_by_hand():
    """alpha 1.5 and 10 tokens give 14/15; the last of 10 TD errors weighs 0.9333^9 in the first token."""
    mask = torch.arange(10) < torch.tensor([10, 2, 0])[:, None]
    close(algo.length_adaptive_lam(mask, 1.5), [14 / 15, 2 / 3, 1 / 3])
    close(algo.length_adaptive_lam(mask, 0.05), [0.0, 0.0, 0.0])  # alpha * l below 1
    rewards = torch.zeros(3, 10)
    rewards[0, 9] = 1.0
    lam = algo.length_adaptive_lam(mask, 1.5)
    advantages, _ = algo.gae(rewards, torch.zeros(3, 10), mask, gamma=1.0, lam=lam)
    close(advantages[0, 0], 0.53744124)


@pytest.mark.parametrize(("alpha", "lam_value"), [(None, 1.0), (1.5, None), (0.4, 1.0), (1.5, 0.3), (None, None)])
def test_advantages_and_targets_against_the_definition(tmp_path, alpha, lam_value):
    lengths = (7, 1, 4, 0)
    (rewards, mask), (values, _) = ragged(lengths, 7, seed=1), ragged(lengths, 7, seed=2)
    args = make_config(tmp_path, lam=0.9, gamma=0.97, length_adaptive_alpha=alpha, lam_value=lam_value)
    advantages, returns = estimate_advantages(rewards, values, mask, args)
    for row, length in enumerate(lengths):
        given = rewards[row, :length].tolist(), values[row, :length].tolist(), 0.97
        lam = 0.9 if alpha is None else max(0.0, 1 - 1 / (alpha * max(length, 1)))
        close(advantages[row, :length], slow_gae(*given, lam))
        targets = slow_gae(*given, lam if lam_value is None else lam_value)
        close(returns[row, :length], [a + v for a, v in zip(targets, given[1], strict=True)])
    assert advantages[~mask].abs().sum() == 0 and returns[~mask].abs().sum() == 0


def test_monte_carlo_targets_do_not_depend_on_values(tmp_path):
    (rewards, mask), (values, _) = ragged((5, 3), 5, seed=3), ragged((5, 3), 5, seed=4)
    both = [
        [estimate_advantages(rewards, v, mask, make_config(tmp_path, lam_value=lam))[1] for v in (values, 2 * values)]
        for lam in (1.0, None)
    ]
    close(both[0][0], both[0][1])
    assert (both[1][0] - both[1][1]).abs().max() > 0.01  # at 0.95 they are part of their own target


@pytest.mark.parametrize("option", [{"lam_value": 1.0}, {"length_adaptive_alpha": 1.5}])
def test_a_run_with_another_lambda_ends_elsewhere(tmp_path, option):
    plain, with_it = (weights(train(tmp_path, **config)[0]) for config in ({}, option))
    assert (plain - with_it).abs().max() > 1e-4


# --- the gate on the critic ---


def test_the_gate_by_hand():
    """Returns 1 and 3 around their mean 2; a critic that says 3 and 1 has the error variance 4 of a variance of 1."""
    returns, values, mask = torch.tensor([[1.0], [3.0]]), torch.tensor([[3.0], [1.0]]), torch.ones(2, 1)
    explained = algo.explained_variance(values, returns, mask)
    close(explained, -3.0)
    close(algo.gate_critic(returns - values, returns, mask, explained), [[-1.0], [1.0]])
    right = algo.explained_variance(returns, returns, mask)
    close(algo.gate_critic(returns - returns, returns, mask, right), [[0.0], [0.0]])  # the critic's advantages stay


@pytest.mark.parametrize("seed", range(6))
def test_gated_advantages_have_the_smaller_variance(seed):
    (returns, mask), (noise, _) = ragged((4, 2, 5), 5, seed=seed), ragged((4, 2, 5), 5, seed=seed + 9)
    for share in (0.2, 0.9, 3.0):  # of noise in the values
        values = (1 - min(share, 1)) * returns + share * noise
        explained = algo.explained_variance(values, returns, mask)
        gated = algo.gate_critic((returns - values) * mask, returns, mask, explained)
        variance = {name: slow_moments(real_tokens(x, mask))[1] for name, x in
                    {"gated": gated, "critic": returns - values, "mean": returns}.items()}  # fmt: skip
        assert variance["gated"] == pytest.approx(min(variance["critic"], variance["mean"]), rel=1e-4)


def test_a_gated_rollout_learns_from_the_returns_alone(tmp_path):
    """The first values are 0 and explain nothing, so the gate is closed: advantages are whitened returns."""
    _, kept = train(tmp_path, critic_gate=True, max_steps=4, importance_sampling_cap=None, lam=0.5, lam_value=1.0)
    rollout, _, metrics = kept[0]
    assert metrics["critic/gated"] == 1 and metrics["critic/explained_variance_mc"] == 0
    mean, variance = slow_moments(real_tokens(rollout.returns, rollout.action_mask))
    whitened = ((rollout.returns - mean) / variance**0.5).masked_fill(~rollout.action_mask, 0)
    close(rollout.advantages, whitened, atol=1e-4)
    _, kept = train(tmp_path, max_steps=4, importance_sampling_cap=None, lam=0.5, lam_value=1.0)
    assert "critic/gated" not in kept[0][2]
    assert (kept[0][0].advantages - whitened).abs().max() > 0.01


def warnings_of(explained, tmp_path, recwarn, **config):
    callback, args = TrainingHealthCallback(), make_config(tmp_path, **config)
    trainer, kept = train(tmp_path, max_steps=4)
    rollout, samples, metrics = kept[0]
    recwarn.clear()
    for step, value in enumerate(explained, start=1):
        trainer.state.global_step = 4 * step
        metrics["critic/explained_variance_mc"] = value
        callback.on_rollout_end(args, trainer.state, None, rollout=rollout, samples=samples, metrics=metrics)
    return [str(w.message) for w in recwarn if "critic_gate" in str(w.message)]


def test_a_critic_that_hurts_is_named_once(tmp_path, recwarn):
    found = warnings_of([-0.5] * 8, tmp_path, recwarn)
    assert len(found) == 1 and "-0.50" in found[0]


@pytest.mark.parametrize(
    ("explained", "config"),
    [([-0.5] * 4 + [0.1] + [-0.5] * 4, {}), ([-0.5] * 8, {"critic_gate": True}), ([0.0] * 8, {}),
     ([-0.5] * 8, {"critic_warmup_steps": 40})],
)  # fmt: skip
def test_a_critic_that_helps_now_and_then_or_is_gated_is_not(tmp_path, recwarn, explained, config):
    assert warnings_of(explained, tmp_path, recwarn, **config) == []


# --- refused values ---


@pytest.mark.parametrize(
    ("name", "value"),
    [("lam_value", 1.2), ("lam_value", "1"), ("length_adaptive_alpha", 0.0), ("length_adaptive_alpha", True),
     ("critic_gate", "yes")],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value!r}"):
        make_config(tmp_path, **{name: value})

"""Options of values and advantages, each with a slow oracle, a number worked by hand, and the same run without it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import close, count_e, make_config, make_trainer
from test_functional import ragged, real_tokens, slow_gae, slow_moments

from ppo_plus import PPOCallback, algo
from ppo_plus.callbacks.training_health import TrainingHealthCallback
from ppo_plus.rollout.advantages import estimate_advantages
from ppo_plus.training.checkpoint import write_manifest
from ppo_plus.training.losses import positive_example_weights


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


# --- the likelihood of correct responses ---


def test_weights_of_correct_responses_by_hand():
    """Two tokens of five belong to the one response above 0, so each weighs 0.1 * 5 / 2."""
    scores, mask = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0]]).bool()
    close(positive_example_weights(scores, mask, 0.1, lambda x: x), [[0.25], [0.0], [0.0]])
    close(positive_example_weights(scores, mask, 0.1, lambda x: 2 * x), [[0.25], [0.0], [0.0]])  # another rank, alike
    alone = lambda x: x + torch.tensor([5, 0])  # noqa: E731 (another rank without a correct response)
    close(positive_example_weights(scores, mask, 0.1, alone), [[0.5], [0.0], [0.0]])
    close(positive_example_weights(scores - 1, mask, 0.1, lambda x: x), [[0.0], [0.0], [0.0]])  # none is correct


def nll_gradient(tmp_path, weight, **config):
    """Return the rollout and the first step's gradient of a run that scores half of its responses above 0."""
    rewards = iter([1.0, -1.0] * 99)
    trainer = make_trainer(
        tmp_path, reward_funcs=lambda completions, **_: [next(rewards) for _ in completions],
        config={"positive_example_nll_weight": weight, "missing_eos_penalty": None, "max_grad_norm": 0.0,
                "max_steps": 1, "vf_coef": 0.0, "num_mini_batches": 1, "num_ppo_epochs": 1, **config},
    )  # fmt: skip
    kept, gradients = [], []
    trainer.add_callback(Steps(lambda: gradients.append(actor_gradient(trainer)), lambda rollout: kept.append(rollout)))
    trainer.train()
    return trainer, kept[0], gradients[0]


class Steps(PPOCallback):
    def __init__(self, before_step, after_rollout):
        self.before_step, self.after_rollout = before_step, after_rollout

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.before_step()

    def on_rollout_end(self, args, state, control, rollout, **kwargs):
        self.after_rollout(rollout)


def actor_gradient(trainer):
    return torch.cat([p.grad.flatten() for p in trainer.model.actor_parameters()]).clone()


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_the_likelihood_term_is_one_mean_over_the_minibatch(tmp_path, rows):
    """The gradient exceeds that without the term by mu times that of the mean, however rows are split."""
    split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows}
    trainer, rollout, with_term = nll_gradient(tmp_path, 0.3, **split)
    _, same, without = nll_gradient(tmp_path, 0.0, **split)
    assert torch.equal(rollout.input_ids, same.input_ids)  # two runs of one policy
    nll, expected = nll_of(make_trainer(tmp_path, config=split), rollout, rollout.sequence_scores > 0)
    close(with_term - without, 0.3 * expected, atol=1e-6)
    assert trainer.state.log_history[0]["ppo/positive_nll"] == pytest.approx(nll, rel=1e-5)
    other_nll, other = nll_of(make_trainer(tmp_path, config=split), rollout, rollout.sequence_scores < 0)
    assert abs(other_nll - nll) > 1e-3 and (other - expected).abs().max() > 1e-3  # the control: not just any responses


def nll_of(trainer, rollout, rows):
    """Return the mean negative log-likelihood of the tokens of these responses, and its gradient."""
    inputs = rollout.micro_batch(rows.nonzero()[:, 0])
    mask = inputs["action_mask"]
    output = trainer.model(inputs["input_ids"], inputs["attention_mask"], mask.shape[1], trainer.args.temperature)
    nll = -output.logprobs[mask].mean()
    return nll.item(), torch.cat([g.flatten() for g in torch.autograd.grad(nll, trainer.model.actor_parameters())])


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


# --- masked objective ---


def masked_loss(ratio, advantage, **options):
    return algo.masked_policy_loss(
        torch.tensor(ratio).log(), torch.zeros(len(ratio)), torch.tensor(advantage), **options
    )


def test_the_mask_by_hand():
    """SAO's bounds for mathematics: 0.7 to 6, both excluded, whatever the sign of the advantage."""
    loss, masked = masked_loss([0.8, 0.5, 5.0, 7.0, 0.5, 7.0], [2.0, 2.0, 2.0, 2.0, -2.0, -2.0],
                               cliprange=0.3, cliprange_high=5.0)  # fmt: skip
    close(loss, [-1.6, 0.0, -10.0, 0.0, 0.0, 0.0])
    assert masked.tolist() == [False, True, False, True, True, True]
    clipped, _ = algo.clipped_policy_loss(torch.tensor([0.5, 7.0]).log(), torch.zeros(2), torch.tensor([2.0, -2.0]))
    close(clipped, [-1.0, 14.0])  # a clip keeps both, each in the direction in which it does not bound


def test_the_mask_and_its_gradient_against_loops():
    generator = torch.Generator().manual_seed(0)
    old, new, advantages = (torch.randn(4, 6, generator=generator) for _ in range(3))
    new[0, 0], advantages[0, 0] = 200.0, 1.0  # a ratio of infinity
    new = new.requires_grad_()
    loss, masked = algo.masked_policy_loss(new, old, advantages, cliprange=0.8, cliprange_high=3.0)
    loss.sum().backward()
    for row in range(4):
        for t in range(6):
            ratio = math.exp(min(new[row, t].item() - old[row, t].item(), 300.0))
            expected = -ratio * advantages[row, t].item() if 0.2 < ratio < 4.0 else 0.0
            assert masked[row, t].item() == (not 0.2 < ratio < 4.0)
            assert loss[row, t].item() == pytest.approx(expected, abs=1e-5)
            assert new.grad[row, t].item() == pytest.approx(expected, abs=1e-5)  # d(-r A) / d log pi = -r A
    assert 0 < masked.sum() < 24


def passes(trainer):
    """Count the passes over the backbone in a scoring, by role."""
    counts, run = {}, trainer.model._response_hidden_states

    def counted(*args):
        counts[trainer.model._role] = counts.get(trainer.model._role, 0) + 1
        return run(*args)

    trainer.model._response_hidden_states = counted
    return counts


@pytest.mark.parametrize("objective", ["clip", "masked"])
def test_the_masked_objective_spares_the_pass_for_old_logprobs(tmp_path, objective):
    config = {"objective": objective, "critic": "adapter", "max_steps": 1, "num_ppo_epochs": 1, "num_mini_batches": 1}
    rollouts = Rollouts()
    trainer = make_trainer(tmp_path, config=config, callbacks=[rollouts])
    counts, scored = passes(trainer), {}
    sample = trainer.collector.sample
    trainer.collector.sample = lambda *args, **kwargs: (sample(*args, **kwargs), scored.update(counts))[0]
    trainer.train()
    _, samples, metrics = rollouts.kept[0]
    assert scored == {"critic": 2, "reference": 2, **({"actor": 2} if objective == "clip" else {})}
    spared = objective == "masked"
    assert ("entropy" in metrics, "sampling/logp_difference" in metrics) == (not spared, not spared)
    assert torch.equal(samples.logprobs * samples.action_mask, samples.sampled_logprobs * samples.action_mask) == spared
    logged = next(row for row in trainer.state.log_history if "ppo/ratio" in row)
    assert logged["ppo/ratio"] == pytest.approx(1, abs=1e-4) and logged["clip_ratio/policy"] == 0


def test_a_masked_run_masks(tmp_path):
    wide, narrow, clip = (
        train(tmp_path, cliprange=0.05, **config)
        for config in ({"objective": "masked", "cliprange_high": 5.0}, {"objective": "masked"}, {})
    )
    assert len({tuple(weights(trainer)[:50].tolist()) for trainer, _ in (wide, narrow, clip)}) == 3
    shares = [max(row.get("clip_ratio/policy", 0) for row in t.state.log_history) for t, _ in (wide, narrow)]
    assert 0 < shares[0] < shares[1]


# --- pessimism ---


def test_pessimism_by_hand():
    """-log((1 + e^-2) / 2) = 0.56622 for scores 0 and 2; shares 3 and 1 give -log((3 + e^-2) / 4) = 0.24356."""
    scores = torch.tensor([[0.0, 2.0]])
    close(algo.pessimistic_mean(scores, torch.ones(2), 1.0), [0.5662192])
    close(algo.pessimistic_mean(scores, torch.tensor([3.0, 1.0]), 1.0), [0.2435582])


def test_pessimism_and_its_limits_against_loops():
    scores = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    scores[0, 1], scores[1] = math.nan, math.nan
    found = {beta: algo.pessimistic_mean(scores, torch.ones(4), beta) for beta in (1e-3, 0.5, 1e4)}
    assert found[0.5][1].isnan()
    for row in [0, *range(2, 20)]:
        kept = [x for x in scores[row].tolist() if not math.isnan(x)]
        for beta in (0.5, 1e4):
            mean = sum(math.exp(-x / beta) for x in kept) / len(kept)
            assert found[beta][row].item() == pytest.approx(-beta * math.log(mean), abs=1e-3)
        average, variance = slow_moments(kept)
        assert found[1e4][row].item() == pytest.approx(average, abs=5e-3)
        assert found[1e-3][row].item() == pytest.approx(min(kept), abs=2e-3)
        assert algo.pessimistic_mean(scores[row : row + 1], torch.ones(4), 50.0).item() == pytest.approx(
            average - variance / 100, abs=1e-3
        )


def test_rewards_of_a_run_are_aggregated_pessimistically(tmp_path):
    kept = {}
    for beta in (None, 0.5):
        rollouts, rewards = Rollouts(), [count_e, lambda completions, **kwargs: [2.0] * len(completions)]
        config = {"max_steps": 1, "reward_pessimism": beta, "missing_eos_penalty": None}
        make_trainer(tmp_path, config=config, reward_funcs=rewards, callbacks=[rollouts]).train()
        kept[beta] = rollouts.kept[0]
    for row, given in zip(kept[0.5][0].sequence_scores.tolist(), kept[0.5][1].rewards.tolist(), strict=True):
        assert row == pytest.approx(-0.5 * math.log(sum(math.exp(-2 * r) for r in given) / 2), abs=1e-5)
    close(kept[None][0].sequence_scores, kept[None][1].rewards.sum(1))


def test_pessimism_over_rewards_of_tokens_is_refused(tmp_path):
    rewards = [lambda completion_ids, **kwargs: [[1.0] * len(ids) for ids in completion_ids], count_e]
    trainer = make_trainer(tmp_path, config={"reward_pessimism": 1.0, "max_steps": 1}, reward_funcs=rewards)
    with pytest.raises(ValueError, match="reward_pessimism"):
        trainer.train()


# --- a critic with a LoRA of its own ---


MLP = {"target_modules": ["gate_proj", "up_proj", "down_proj"], "r": 2}


def adapted(model, adapter):
    names = (name.split(".") for name, _ in model.policy.named_parameters() if ".lora_A." in name)
    return {name[-4] for name in names if name[-2] == adapter}


def test_a_critic_without_attention(tmp_path):
    trainer, _ = train(tmp_path, critic="adapter", critic_peft_config=MLP, critic_backbone_learning_rate=1e-2)
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert adapted(trainer.model, "critic") == set(MLP["target_modules"])
    assert adapted(trainer.model, "default") == {*MLP["target_modules"], *attention}
    assert {p.shape[0] for n, p in trainer.model.policy.named_parameters() if ".lora_A.critic" in n} == {2}
    trainer.save_model(str(tmp_path / "saved"))
    other = make_trainer(tmp_path, config={"critic": "adapter", "critic_peft_config": dict(MLP)})
    ids = torch.arange(4, 34).view(3, 10)
    with torch.no_grad():
        before = other.model.eval()(ids, torch.ones_like(ids), 4).values
        other.model.load_weights(tmp_path / "saved")
        wanted, found = (t.model.eval()(ids, torch.ones_like(ids), 4).values for t in (trainer, other))
    assert torch.equal(found, wanted) and not torch.equal(before, wanted)
    whole, _ = train(tmp_path, critic="adapter", critic_backbone_learning_rate=1e-2)
    assert adapted(whole.model, "critic") == adapted(whole.model, "default")


# --- several updates of the critic ---


ONE = {"critic": "adapter", "num_mini_batches": 1, "lr_scheduler_type": "constant", "cliprange_value": None,
       "critic_backbone_learning_rate": 1e-2}  # fmt: skip


def parts(trainer):
    model = trainer.model
    critic = [*model.value_head.parameters(), *model.critic_parameters()]
    return [torch.cat([p.detach().flatten() for p in group]) for group in (model.actor_parameters(), critic)]


def test_further_updates_are_steps_of_the_critic_and_leave_the_actor_alone(tmp_path):
    """Two PPO epochs of one minibatch with an actor that does not learn are two updates of the critic on that data."""
    twice = train(tmp_path, **ONE, num_critic_updates=2, num_ppo_epochs=1, max_steps=1)[0]
    oracle = train(tmp_path, **{**ONE, "learning_rate": 0.0}, num_ppo_epochs=2, max_steps=2)[0]
    once = train(tmp_path, **ONE, num_ppo_epochs=1, max_steps=1)[0]
    close(parts(twice)[1], parts(oracle)[1], atol=1e-5)
    assert (parts(once)[1] - parts(oracle)[1]).abs().max() > 1e-3
    assert torch.equal(parts(twice)[0], parts(once)[0])  # the actor's first step knows nothing of the critic's updates
    assert twice.state.global_step == 1
    steps = {int(state["step"]) for state in twice.optimizer.state.values()}
    assert steps == {1, 2}


def test_further_updates_need_weights_of_the_critics_own(tmp_path):
    with pytest.raises(ValueError, match="num_critic_updates=2 .*critic='shared'"):
        make_trainer(tmp_path, config={"num_critic_updates": 2})


# --- value pretraining ---


PRETRAINING = {"critic_warmup_steps": 40, "critic_warmup_explained_variance": 0.05, "lam": 0.5, "critic": "detached",
               "value_head_learning_rate": 0.05, "kl_coef": 0.0}  # fmt: skip


class Actors(Rollouts):
    """Keeps the actor's weights at the beginning of each rollout too."""

    def on_rollout_end(self, args, state, control, rollout, samples, metrics, model=None, **kwargs):
        super().on_rollout_end(args, state, control, rollout, samples, metrics)
        self.actors = [
            *getattr(self, "actors", []),
            torch.cat([p.detach().flatten() for p in model.actor_parameters()]),
        ]


def test_pretraining_ends_when_the_critic_explains_enough(tmp_path):
    callback = Actors()
    trainer = make_trainer(tmp_path, config={**PRETRAINING, "max_steps": 28}, callbacks=[callback])
    trainer.train()
    explained = [metrics["critic/explained_variance_mc"] for _, _, metrics in callback.kept]
    first = next(i for i, value in enumerate(explained) if value > 0.05)  # the rollout from which the actor learns
    assert 0 < first < len(explained) - 1
    same = [torch.equal(a, callback.actors[0]) for a in callback.actors]
    assert same == [True] * (first + 1) + [False] * (len(same) - first - 1)
    for index, (rollout, _, _) in enumerate(callback.kept):
        targets, lengths = rollout.returns, rollout.action_mask.sum(1).tolist()
        for row, length in enumerate(lengths):  # the score is paid at the last token, and nothing before it
            monte_carlo = torch.full((length,), rollout.sequence_scores[row].item())
            assert torch.allclose(targets[row, :length], monte_carlo, atol=1e-5) == (index <= first) or length == 1


def test_a_resumed_run_knows_that_pretraining_has_ended(tmp_path):
    config = {**PRETRAINING, "max_steps": 28, "save_strategy": "steps", "save_steps": 1}
    whole, kept = train(tmp_path / "whole", **config)
    first = 4 * next(i for i, (_, _, m) in enumerate(kept) if m["critic/explained_variance_mc"] > 0.05)
    checkpoint = tmp_path / "whole" / f"checkpoint-{first + 1}"  # inside the rollout that ended it
    ends = []
    for started in (True, False):
        state = json.loads((checkpoint / "ppo_state_0.json").read_text())
        assert state["actor_started"]
        if not started:
            (checkpoint / "ppo_state_0.json").write_text(json.dumps({**state, "actor_started": False}))
            write_manifest(checkpoint)
        trainer = make_trainer(tmp_path / f"{started}", config={**config, "save_strategy": "no"})
        trainer.train(resume_from_checkpoint=str(checkpoint))
        ends.append(weights(trainer))
    assert torch.equal(ends[0], weights(whole)) and not torch.equal(ends[1], weights(whole))


def test_without_a_bound_the_warm_up_takes_all_its_steps(tmp_path):
    callback = Actors()
    config = {**PRETRAINING, "critic_warmup_explained_variance": None, "max_steps": 12}
    with pytest.warns(UserWarning, match="critic_warmup_steps=40 covers"):
        trainer = make_trainer(tmp_path, config=config, callbacks=[callback])
    trainer.train()
    assert all(torch.equal(a, callback.actors[0]) for a in callback.actors)


@pytest.mark.parametrize("critic", ["detached", "adapter"])
def test_a_run_starts_with_the_critic_of_another(tmp_path, critic):
    config = {"critic": critic, "critic_warmup_steps": 4, "max_steps": 5, "critic_backbone_learning_rate": 1e-2}
    trainer, _ = train(tmp_path, **config)
    trainer.save_model(str(tmp_path / "earlier"))
    fresh = make_trainer(tmp_path, config=config)
    loaded = make_trainer(tmp_path, config={**config, "critic_checkpoint": str(tmp_path / "earlier")})
    assert torch.equal(parts(loaded)[1], parts(trainer)[1]) and not torch.equal(parts(fresh)[1], parts(trainer)[1])
    assert torch.equal(parts(loaded)[0], parts(fresh)[0])


@pytest.mark.parametrize("critic", ["detached", "adapter"])
def test_a_critic_with_nan_is_refused(tmp_path, critic):
    trainer, _ = train(tmp_path, critic=critic, max_steps=1)
    config = {"critic": critic, "critic_checkpoint": str(tmp_path / "earlier")}
    trainer.save_model(config["critic_checkpoint"])
    make_trainer(tmp_path, config=config)
    damaged = trainer.model.value_head if critic == "detached" else trainer.model
    for parameter in damaged.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(float("nan"))
    trainer.save_model(config["critic_checkpoint"])
    with pytest.raises(ValueError, match="critic_checkpoint=.*NaN"):
        make_trainer(tmp_path, config=config)


def test_a_critic_of_another_scaling_or_baseline_is_refused(tmp_path):
    """Its weights would be the same, and its values others."""
    config = {"critic": "adapter", "critic_peft_config": MLP, "max_steps": 1}
    trainer, _ = train(tmp_path, **config, save_strategy="steps", save_steps=1)
    folder = str(tmp_path / "checkpoint-1")
    for scaling in ({"lora_alpha": 64}, {"use_rslora": True}):
        other = {**config, "critic_peft_config": {**MLP, **scaling}}
        with pytest.raises(ValueError, match=f"{next(iter(scaling))}=.* critic_peft_config"):
            make_trainer(tmp_path / "other", config={**other, "critic_checkpoint": folder})
        with pytest.raises(ValueError, match=f"{next(iter(scaling))}=.* critic_peft_config"):
            make_trainer(tmp_path / "other", config=other).train(resume_from_checkpoint=folder)
    rloo = {**config, "num_generations": 2, "advantage_baseline": "rloo", "critic_checkpoint": folder}
    with pytest.raises(ValueError, match="critic_checkpoint=.*advantage_baseline='none'"):
        make_trainer(tmp_path / "other", config=rloo)
    same = make_trainer(tmp_path / "other", config={**config, "critic_checkpoint": folder})
    assert torch.equal(parts(same)[1], parts(trainer)[1])


# --- refused values ---


@pytest.mark.parametrize(
    ("name", "value"),
    [("lam_value", 1.2), ("lam_value", "1"), ("length_adaptive_alpha", 0.0), ("length_adaptive_alpha", True),
     ("critic_gate", "yes"), ("num_critic_updates", 0), ("critic_warmup_explained_variance", 1.5),
     ("critic_peft_config", 3), ("critic_checkpoint", 3), ("reward_pessimism", 0.0), ("objective", "sao"),
     ("positive_example_nll_weight", -0.1)],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value!r}"):
        make_config(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("config", "named"),
    [({"critic_peft_config": MLP}, "critic_peft_config .*critic='shared'"),
     ({"critic_warmup_explained_variance": 0.5}, "critic_warmup_steps=0"),
     ({"objective": "masked", "dual_clip": 3.0}, "dual_clip .*objective='masked'"),
     ({"reward_pessimism": 1.0, "reward_weights": [1.0, -1.0]}, "reward_weights"),
     ({"critic": "adapter", "critic_checkpoint": "nowhere"}, "critic_checkpoint='nowhere' .*value_head.*critic"),
     ({"critic": "adapter", "critic_peft_config": {"rank": 2}}, "critic_peft_config .*'rank'"),
     ({"critic": "adapter", "critic_peft_config": {"save_pretrained": 2}}, "critic_peft_config .*'save_pretrained'"),
     ({"critic": "adapter", "critic_peft_config": {"layers_to_transform": [0]}}, "critic_peft_config.*target_modules"),
     ({"critic": "adapter", "num_critic_updates": 2, "vf_coef": 0.0}, "num_critic_updates=2 .*vf_coef=0"),
     ({"critic_warmup_steps": 2, "vf_coef": 0.0}, "critic_warmup_steps=2 .*vf_coef=0"),
     ({"reward_pessimism": 1.0}, "reward_pessimism=1.0 .*there is one"),
     ({"max_tool_calling_iterations": 2}, "max_tool_calling_iterations=2 .*without tools"),
     ({"tool_timeout": 2.0}, "tool_timeout=2.0 .*without tools")],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(tmp_path, config, named):
    with pytest.raises(ValueError, match=named):
        make_trainer(tmp_path, config=config)

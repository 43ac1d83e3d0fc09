"""`functional` against formulas that others published, each rewritten here for one number at a time.

Where others differ among themselves, the test says whom we follow, and that the other way gives another number.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from conftest import close
from torch import tensor
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from ppo_plus import algo as pf
from ppo_plus.rollout.buffer import response_mask

SEEDS = range(3)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def each(function, *tensors):
    """A function of numbers, for every position."""
    flat = [function(*numbers) for numbers in zip(*(t.flatten().tolist() for t in tensors), strict=True)]
    return tensor(flat).view(tensors[0].shape)


class TestTRL011:
    """The numbers that TRL 0.11's own tests expect of its KL penalties (test_ppo_trainer_kl_penalty and _full_)."""

    policy, reference = tensor([[0.5, 0.2, 0.1], [0.6, 0.2, 0.1]]), tensor([[0.4, 0.3, 0.0], [0.7, 0.1, 0.3]])

    @pytest.mark.parametrize(
        ("theirs", "ours", "expected"),
        [
            ("kl", "k1", [[0.1, -0.1, 0.1], [-0.1, 0.1, -0.2]]),
            ("abs", "abs", [[0.1, 0.1, 0.1], [0.1, 0.1, 0.2]]),
            ("mse", "k2", [[0.005, 0.005, 0.005], [0.005, 0.005, 0.02]]),
        ],
    )
    def test_penalties_of_the_sampled_token(self, theirs, ours, expected):
        close(pf.kl_estimate(self.policy, self.reference, ours), expected, atol=1e-6)

    @pytest.mark.parametrize(
        ("policy", "reference", "expected"),
        [
            ([[0.1, 0.2, 0.7], [0.3, 0.4, 0.3]], [[0.1, 0.2, 0.7], [0.3, 0.4, 0.3]], [0.0, 0.0]),
            ([[0.98, 0.01, 0.01], [0.01, 0.98, 0.01]], [[0.01, 0.01, 0.98]] * 2, [4.4474, 4.4474]),
            ([[0.49, 0.02, 0.49]] * 2, [[0.01, 0.98, 0.01], [0.49, 0.02, 0.49]], [3.7361, 0.0]),
        ],
    )
    def test_full_penalty(self, policy, reference, expected):
        policy, reference = tensor([policy]).log(), tensor([reference]).log()
        close(pf.exact_kl(policy, reference), [expected], atol=1e-4)

    def test_the_direction_is_told_by_another_pair(self):
        """The pairs above give the same both ways; TRL's is the expectation under the policy."""
        policy, reference = [0.9, 0.05, 0.05], [0.4, 0.1, 0.5]
        expected = sum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True))
        logits = tensor([[policy]]).log(), tensor([[reference]]).log()
        close(pf.exact_kl(*logits), [[expected]])
        assert abs(pf.exact_kl(*reversed(logits)).item() - expected) > 0.01


class TestOfTheInstalledTRL:
    """Its own functions, called."""

    @pytest.mark.parametrize("seed", SEEDS)
    def test_logprobs_and_entropy(self, seed):
        logits = 3 * normal(2, 4, 11, seed=seed)
        tokens = torch.randint(0, 11, (2, 4), generator=torch.Generator().manual_seed(seed))
        close(pf.token_logprobs(logits, tokens), selective_log_softmax(logits, tokens))
        close(pf.entropy(logits), entropy_from_logits(logits))
        assert (pf.entropy(logits, temperature=2.0) - entropy_from_logits(logits)).abs().max() > 0.1


class TestKL:
    """GRPO (Shao et al. 2024, eq. 4): `pi_ref / pi - log(pi_ref / pi) - 1`; OpenRLHF and verl call it k3."""

    @pytest.mark.parametrize("seed", SEEDS)
    def test_k3(self, seed):
        policy, reference = normal(2, 3, 5, seed=seed)
        expected = each(
            lambda p, q: math.exp(q) / math.exp(p) - math.log(math.exp(q) / math.exp(p)) - 1, policy, reference
        )
        close(pf.kl_estimate(policy, reference, "k3"), expected)
        assert (pf.kl_estimate(reference, policy, "k3") - expected).abs().max() > 0.1


class TestGAE:
    """OpenAI's baselines and lm-human-preferences, TRL: one backward loop, nothing after the last token."""

    def one_row(self, rewards, values, gamma, lam):
        advantages, last = [0.0] * len(rewards), 0.0
        for t in reversed(range(len(rewards))):
            following = values[t + 1] if t + 1 < len(rewards) else 0.0
            advantages[t] = last = rewards[t] + gamma * following - values[t] + gamma * lam * last
        return advantages

    @pytest.mark.parametrize("seed", SEEDS)
    def test_rows_of_any_length(self, seed):
        lengths, width = [6, 1, 4], 6
        mask = torch.arange(width) < tensor(lengths)[:, None]
        rewards, values = normal(2, 3, width, seed=seed)
        advantages, returns = pf.gae(rewards, values, mask, gamma=0.97, lam=0.9)
        for row, length in enumerate(lengths):
            expected = self.one_row(rewards[row, :length].tolist(), values[row, :length].tolist(), 0.97, 0.9)
            close(advantages[row, :length], expected)
            close(returns[row, :length], (tensor(expected) + values[row, :length]))

    def test_is_the_lambda_return_less_the_value(self):
        """Seed 003's form: `(1 - lam) sum_n lam^(n-1) R^(n)`, where after the end every `R^(n)` is the whole return."""
        gamma, lam, rewards, values = 0.9, 0.7, [0.5, -1.0, 0.25, 2.0], [0.3, 0.1, -0.4, 0.8]

        def n_step(t, n):
            end = min(t + n, 4)
            bootstrap = gamma**n * values[t + n] if t + n < 4 else 0.0
            return sum(gamma ** (k - t) * rewards[k] for k in range(t, end)) + bootstrap

        expected = [(1 - lam) * sum(lam ** (n - 1) * n_step(t, n) for n in range(1, 200)) - values[t] for t in range(4)]
        advantages, _ = pf.gae(tensor([rewards]), tensor([values]), torch.ones(1, 4), gamma=gamma, lam=lam)
        close(advantages, [expected])

    def test_without_rewards_it_is_a_sum_of_differences(self):
        """Seed 000: `A = sum_t lam^t delta_t`, `delta_t = V(s_{t+1}) - V(s_t)`, no discount, no reward on the way."""
        values, lam = [0.1, 0.4, 0.2, 0.9], 0.8
        expected = sum(lam**t * (values[t + 1] - values[t]) for t in range(3)) + lam**3 * (1.0 - values[3])
        advantages, _ = pf.gae(tensor([[0.0, 0, 0, 1.0]]), tensor([values]), torch.ones(1, 4), gamma=1.0, lam=lam)
        assert advantages[0, 0].item() == pytest.approx(expected, abs=1e-6)


class TestWhitening:
    """lm-human-preferences: by the mean and biased variance of all values; the mean is added back for rewards only."""

    @pytest.mark.parametrize("shift_mean", [True, False])
    def test_by_the_population(self, shift_mean):
        values, mask = normal(3, 5), torch.arange(5) < tensor([5, 2, 3])[:, None]
        real = [values[b, t].item() for b in range(3) for t in range(5) if mask[b, t]]
        mean, deviation = statistics.fmean(real), statistics.pstdev(real)
        expected = each(lambda v: (v - mean) / deviation + (0.0 if shift_mean else mean), values) * mask
        close(pf.whiten(values, mask, shift_mean=shift_mean), expected)
        unbiased = each(lambda v: (v - mean) / statistics.stdev(real) + (0.0 if shift_mean else mean), values) * mask
        assert (unbiased - expected).abs().max() > 1e-2  # TRL's and CleanRL's differ by this much here


def verl_policy_loss(ratio, advantage, low, high, dual):
    """verl's core_algos, after Ye et al. 2020 (dual clip) and DAPO (two clip ranges)."""
    first = -advantage * ratio
    second = -advantage * min(max(ratio, 1 - low), 1 + high)
    upper = max(first, second)
    return min(-advantage * dual, upper) if advantage < 0 else upper


class TestPolicyLoss:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_verl(self, seed):
        new, old, advantages = normal(3, 4, 50, seed=seed)
        expected = each(lambda n, o, a: verl_policy_loss(math.exp(n - o), a, 0.2, 0.28, 3.0), new, old, advantages)
        loss, _ = pf.clipped_policy_loss(new, old, advantages, cliprange=0.2, cliprange_high=0.28, dual_clip=3.0)
        close(loss, expected, atol=1e-4)
        assert (pf.clipped_policy_loss(new, old, advantages)[0] - expected).abs().max() > 0.1

    @pytest.mark.parametrize("seed", SEEDS)
    def test_cleanrl_counts_ratios_we_count_tokens_without_gradient(self, seed):
        """CleanRL's clip fraction is of all ratios outside the range; half of them lose nothing by it."""
        new, old, advantages = normal(3, 4, 50, seed=seed)
        _, clipped = pf.clipped_policy_loss(new, old, advantages)
        outside = each(lambda n, o: abs(math.exp(n - o) - 1) > 0.2, new, old).bool()
        harmful = each(lambda n, o, a: (math.exp(n - o) - 1) * a > 0, new, old, advantages).bool()
        assert torch.equal(clipped, outside & harmful)
        assert (outside & ~harmful).any()

    def test_seed_003_moved_the_advantage_out_of_the_minimum(self):
        """Its `min(h, clip(h)) A` is another objective wherever the advantage is negative."""
        new, old, advantages = tensor([[math.log(0.5), math.log(1.5)]]), torch.zeros(1, 2), tensor([[-1.0, -1.0]])
        close(pf.clipped_policy_loss(new, old, advantages)[0], [[0.8, 1.5]])
        moved = each(lambda n, a: -min(math.exp(n), min(max(math.exp(n), 0.8), 1.2)) * a, new, advantages)
        close(moved, [[0.5, 1.2]])

    @pytest.mark.parametrize("seed", SEEDS)
    def test_gradient_at_the_first_minibatch_is_reinforce(self, seed):
        """Seed 001, eq. 1.2 and 2.1: where old and new agree, the gradient is `A grad log pi`."""
        old, advantages = normal(2, 3, 4, seed=seed)
        for loss in (
            lambda new: pf.clipped_policy_loss(new, old, advantages)[0],
            lambda new: pf.unclipped_policy_loss(new, old, advantages),
            lambda new: pf.kl_penalty_policy_loss(new, old, advantages, beta=0.7),
        ):
            new = old.clone().requires_grad_()
            loss(new).sum().backward()
            close(new.grad, -advantages)


class TestValueLoss:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_openai_and_trl(self, seed):
        """`0.5 max((V - G)^2, (V_old + clip(V - V_old, -c, c) - G)^2)`, as in baselines' ppo2 and in TRL."""

        def slow(new, old, target, c=0.2):
            bounded = old + min(max(new - old, -c), c)
            return 0.5 * max((new - target) ** 2, (bounded - target) ** 2)

        new, old, target = normal(3, 4, 50, seed=seed)
        close(pf.clipped_value_loss(new, old, target)[0], each(slow, new, old, target))
        assert (
            pf.clipped_value_loss(new, old, target, cliprange=None)[0] - each(slow, new, old, target)
        ).abs().max() > 0.1


class TestDiagnostics:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_explained_variance_of_stable_baselines(self, seed):
        returns = normal(2, 6, seed=seed)
        values = 0.5 * returns + 0.3 * normal(2, 6, seed=seed + 100)
        real, predicted = returns.flatten().tolist(), values.flatten().tolist()
        errors = [r - p for r, p in zip(real, predicted, strict=True)]
        expected = 1 - statistics.pvariance(errors) / statistics.pvariance(real)
        assert pf.explained_variance(values, returns, torch.ones(2, 6)).item() == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize(("kl", "coefficient"), [(3.0, 0.2 * (1 - 0.2 * 0.0256)), (6.6, 0.2 * (1 + 0.1 * 0.0256))])
    def test_adaptive_controller_of_lm_human_preferences(self, kl, coefficient):
        """`1 + clip(kl / target - 1, -0.2, 0.2) n / horizon`, from 0.2, target 6, 256 of 10,000 episodes."""
        found = pf.proportional_kl_coef(0.2, kl, target=6.0, horizon=10_000, episodes=256)
        assert found == pytest.approx(coefficient, rel=1e-6)


class TestSeeds:
    """Numbers worked in the documents that this project follows; more stand in test_functional.py."""

    def test_004_answer_two_eos(self):
        """Six new tokens `2 <eos> pad pad pad pad`: attention sees two of them, the action mask without EOS one."""
        answer = tensor([[120, 2, 0, 0, 0, 0]])
        assert response_mask(answer, [2]).long().tolist() == [[1, 1, 0, 0, 0, 0]]
        assert response_mask(answer, [2], include_stop=False).long().tolist() == [[1, 0, 0, 0, 0, 0]]

    def test_004_probabilities(self):
        """`logprob -0.1` is a probability of 0.90, `-5.0` one of 0.0067."""
        for logprob, probability, digits in ((-0.1, 0.90, 2), (-5.0, 0.0067, 4)):
            logits = tensor([[[logprob, math.log1p(-math.exp(logprob))]]])
            found = pf.token_logprobs(logits, tensor([[0]]))
            assert found.item() == pytest.approx(logprob, abs=1e-6)
            assert round(found.exp().item(), digits) == probability

    def test_002_one_more_than_foreseen(self):
        """The critic foresaw one, two came: the advantage is the one that is left, whatever lambda."""
        for lam in (0.0, 0.95, 1.0):
            advantages, returns = pf.gae(tensor([[2.0]]), tensor([[1.0]]), torch.ones(1, 1), gamma=1.0, lam=lam)
            assert (advantages.item(), returns.item()) == (1.0, 2.0)

    def test_003_table(self):
        """As printed there, to three digits: 0.7, 0.465, 0.342, 0.225, 0.114 (rounded at every row)."""
        advantages, _ = pf.gae(
            tensor([[0.0, 0, 0, 0, 0.8]]), tensor([[0.6, 0.5, 0.4, 0.3, 0.1]]), torch.ones(1, 5), gamma=1.0, lam=0.95
        )
        close(advantages, [[0.114, 0.225, 0.342, 0.465, 0.7]], atol=1e-3)

    def test_003_the_printed_loss_of_a_good_pair_goes_to_zero(self):
        good, bad = pf.pairwise_loss(tensor([20.0, -20.0]), tensor([-20.0, 20.0])).tolist()
        assert good < 1e-6
        assert bad == pytest.approx(40.0)

    def test_001_the_band(self):
        """Too little movement lowers beta, too much raises it."""
        found = [pf.band_kl_coef(0.4, kl, low=1.0, high=3.0) for kl in (0.5, 2.0, 5.0)]
        assert found == [0.2, 0.4, 0.8]

    def test_004_the_whole_objective(self):
        """`L = E[L_clip - c1 L_value + c2 S]`, by hand: ratio 1.5 (clipped at 1.2), A 2, error 0.5, entropy log 2."""
        clip, _ = pf.clipped_policy_loss(tensor([[math.log(1.5)]]), torch.zeros(1, 1), tensor([[2.0]]))
        value, _ = pf.clipped_value_loss(tensor([[1.0]]), tensor([[1.0]]), tensor([[1.5]]))
        bonus = pf.entropy(torch.zeros(1, 1, 2))
        close(clip + 0.1 * 2 * value - 0.01 * bonus, [[-2.4 + 0.1 * 0.25 - 0.01 * math.log(2)]])

"""Worked examples by hand, slow loops as oracles, invariants, negative controls; tolerances up to 1e-4."""

import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import close
from torch import tensor

from ppo_plus import algo as pf

NAN, INF, LOG2 = float("nan"), float("inf"), math.log(2)


def differ(a, b, by=1e-2):
    return (a - b).abs().max().item() > by


def ragged(lengths, width, seed=0):
    """Random values `(B, R)` and their mask of ones, then zeros."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(width) < tensor(lengths)[:, None]
    return torch.randn(len(lengths), width, generator=generator), mask


def real_tokens(values, mask):
    """The masked positions as one list of Python floats, found by a loop."""
    return [
        values[b, t].item() for b in range(values.shape[0]) for t in range(values.shape[1]) if mask[b, t].item() == 1
    ]


def slow_moments(numbers):
    mean = sum(numbers) / len(numbers)
    return mean, sum((number - mean) ** 2 for number in numbers) / len(numbers)


def slow_softmax(row):
    exps = [math.exp(x) for x in row]
    return [e / sum(exps) for e in exps]


def slow_kl(p_row, q_row):
    return sum(p * (math.log(p) - math.log(q)) for p, q in zip(p_row, q_row, strict=True))


class AllReduce:
    """Sums over threads that play processes; times out, not hangs, if they call it unequally often."""

    def __init__(self, world):
        self.barrier, self.parts = threading.Barrier(world, timeout=20), [None] * world

    def of_rank(self, rank):
        def reduce(value):
            self.parts[rank] = value
            self.barrier.wait()
            total = torch.stack(self.parts).sum(0)
            self.barrier.wait()
            return total

        return reduce


def on_every_process(function, shards):
    """`function(shard, reduce)` on one thread per shard."""
    group = AllReduce(len(shards))
    with ThreadPoolExecutor(len(shards)) as pool:
        futures = [pool.submit(function, shard, group.of_rank(i)) for i, shard in enumerate(shards)]
        return [future.result() for future in futures]


# --- masked statistics ---


class TestMaskedStatistics:
    def test_moments_by_hand(self):
        values, mask = tensor([[1.0, 3.0, 50.0], [5.0, 7.0, -50.0]]), tensor([[1, 1, 0], [1, 1, 0]])
        mean, var = pf.masked_moments(values, mask)
        assert mean.item() == 4.0
        assert var.item() == 5.0  # (9 + 1 + 1 + 9) / 4; the unbiased one would be 20 / 3

    @pytest.mark.parametrize("seed", range(5))
    def test_moments_against_a_loop(self, seed):
        values, mask = ragged([7, 1, 4, 0], 7, seed)
        mean, var = slow_moments(real_tokens(values, mask))
        close(pf.masked_moments(values, mask)[0], mean)
        close(pf.masked_moments(values, mask)[1], var)

    def test_one_valid_token_has_variance_zero(self):
        mean, var = pf.masked_moments(tensor([[3.0, 8.0]]), tensor([[1, 0]]))
        assert (mean.item(), var.item()) == (3.0, 0.0)

    def test_no_valid_token_is_zero_not_nan(self):
        mean, var = pf.masked_moments(torch.ones(2, 2), torch.zeros(2, 2))
        assert (mean.item(), var.item()) == (0.0, 0.0)

    def test_two_passes_survive_a_large_mean(self):
        values = tensor([[10_000.0, 10_001.0, 10_002.0]])
        one_pass = values.square().mean() - values.mean().square()
        close(pf.masked_moments(values, torch.ones(1, 3))[1], 2 / 3)
        assert abs(one_pass.item() - 2 / 3) > 0.1  # E[x^2] - E[x]^2 in float32

    @pytest.mark.parametrize("constant", [0.1, 0.7, 1234.567])
    @pytest.mark.parametrize("count", [3, 7, 1001])
    def test_equal_values_have_variance_zero(self, constant, count):
        values, mask = torch.full((1, count), constant), torch.ones(1, count)
        assert pf.masked_moments(values, mask)[1].item() == 0.0
        assert pf.whiten(values, mask).abs().max().item() == 0.0

    def test_low_precision_is_accumulated_in_float32(self):
        values = torch.full((1, 1000), 1.0, dtype=torch.bfloat16)
        mean, var = pf.masked_moments(values, torch.ones(1, 1000))
        assert mean.dtype == var.dtype == torch.float32
        assert (mean.item(), var.item()) == (1.0, 0.0)
        assert pf.masked_moments(tensor([[1, 2]]), tensor([[1, 1]]))[0].item() == 1.5  # integers, such as lengths

    @pytest.mark.parametrize("junk", [0.0, 1e9, -1e9, INF, NAN])
    def test_padding_does_not_count(self, junk):
        values, mask = ragged([5, 2, 3], 6)
        padded = values.masked_fill(~mask, junk)
        for statistic in (pf.masked_moments, pf.whiten):
            torch.testing.assert_close(statistic(padded, mask), statistic(values, mask), rtol=0, atol=0)
        assert junk == 0.0 or not math.isclose(padded.mean().item(), values.mean().item())

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
    def test_any_dtype_of_mask(self, dtype):
        values, mask = ragged([5, 2, 3], 6)
        assert torch.equal(pf.whiten(values, mask.to(dtype)), pf.whiten(values, mask))


class TestWhiten:
    def test_by_hand(self):
        values, mask = tensor([[1.0, 3.0, 9.0], [5.0, 7.0, 9.0]]), tensor([[1, 1, 0], [1, 1, 0]])
        root = math.sqrt(5)  # mean 4, variance 5
        close(pf.whiten(values, mask), [[-3 / root, -1 / root, 0], [1 / root, 3 / root, 0]])
        kept = [[4 - 3 / root, 4 - 1 / root, 0], [4 + 1 / root, 4 + 3 / root, 0]]
        close(pf.whiten(values, mask, shift_mean=False), kept)

    @pytest.mark.parametrize("seed", range(5))
    def test_mean_zero_and_variance_one(self, seed):
        values, mask = ragged([6, 3, 5], 6, seed)
        mean, var = slow_moments(real_tokens(pf.whiten(10 * values + 4, mask), mask))
        assert mean == pytest.approx(0, abs=1e-5)  # torchtune adds the mean back: 4
        assert var == pytest.approx(1, abs=1e-5)

    def test_without_shift_the_mean_is_kept(self):
        values, mask = ragged([6, 3, 5], 6)
        values = 10 * values + 4
        before, _ = slow_moments(real_tokens(values, mask))
        mean, var = slow_moments(real_tokens(pf.whiten(values, mask, shift_mean=False), mask))
        assert mean == pytest.approx(before, abs=1e-5)
        assert var == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize("shift_mean, expected", [(True, 0.0), (False, 3.0)])
    def test_single_valid_token_is_finite(self, shift_mean, expected):
        """TRL: the unbiased variance of one token is 0 / 0, and one step later so were the weights."""
        values, mask = tensor([[3.0, 8.0]]), tensor([[1, 0]])
        assert pf.whiten(values, mask, shift_mean=shift_mean).tolist() == [[expected, 0.0]]

    def test_zero_outside_the_mask(self):
        values, mask = ragged([6, 3, 5], 6)
        for shift_mean in (True, False):
            assert pf.whiten(values + 4, mask, shift_mean=shift_mean)[~mask].abs().sum().item() == 0.0


class TestManyProcesses:
    """Processes with 6, 1 and 0 tokens must see the statistics of all 7."""

    whole = tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask = tensor([[1, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0]])
    rows = (slice(0, 2), slice(2, 3), slice(3, 4))

    def test_moments(self):
        def moments(rows, reduce):
            return pf.masked_moments(self.whole[rows], self.mask[rows], reduce=reduce)

        mean, var = slow_moments([1, 2, 4, 8, 16, 32, 64])
        for part in on_every_process(moments, self.rows):
            close(part[0], mean)
            close(part[1], var)

    @pytest.mark.parametrize("shift_mean", [True, False])
    def test_whiten(self, shift_mean):
        def whiten(rows, reduce):
            return pf.whiten(self.whole[rows], self.mask[rows], shift_mean=shift_mean, reduce=reduce)

        together = torch.cat(on_every_process(whiten, self.rows))
        close(together, pf.whiten(self.whole, self.mask, shift_mean=shift_mean))
        alone = torch.cat([whiten(rows, None) for rows in self.rows])
        assert differ(alone, together)

    def test_explained_variance(self):
        values = self.whole + tensor([1.0, -1.0, 0.5])
        alone = pf.explained_variance(values, self.whole, self.mask)
        for part in on_every_process(
            lambda rows, reduce: pf.explained_variance(values[rows], self.whole[rows], self.mask[rows], reduce=reduce),
            self.rows,
        ):
            close(part, alone.item())


# --- distributions over the vocabulary ---


class TestDistributions:
    logits = tensor([[[0.0, 0.0, 0.0, 0.0], [math.log(3), 0.0, -INF, -INF]]])

    def test_logprobs_by_hand(self):
        close(pf.token_logprobs(self.logits, tensor([[2, 1]])), [[-math.log(4), -math.log(4)]])
        close(pf.token_logprobs(self.logits, tensor([[2, 0]])), [[-math.log(4), math.log(3 / 4)]])

    def test_temperature_divides_the_logits(self):
        logits = tensor([[[2 * math.log(3), 0.0]]])
        close(pf.token_logprobs(logits, tensor([[0]]), temperature=2.0), [[math.log(3 / 4)]])
        close(pf.token_logprobs(logits, tensor([[0]])), [[math.log(9 / 10)]])
        close(pf.entropy(logits, temperature=2.0), pf.entropy(logits / 2))
        close(pf.entropy(torch.tensor([[[1e4, 0.0]]]), temperature=1e9), [[LOG2]])

    def test_logprobs_against_a_loop(self):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(2, 3, 5, generator=generator)
        targets = torch.randint(5, (2, 3), generator=generator)
        slow = [
            [math.log(slow_softmax((logits[b, t] / 0.7).tolist())[targets[b, t]]) for t in range(3)] for b in range(2)
        ]
        close(pf.token_logprobs(logits, targets, temperature=0.7), slow)

    def test_half_precision_logits_are_summed_in_float32(self):
        logits = torch.zeros(1, 1, 50_000, dtype=torch.bfloat16)
        assert pf.token_logprobs(logits, tensor([[7]])).dtype == torch.float32
        close(pf.token_logprobs(logits, tensor([[7]])), [[-math.log(50_000)]])
        close(pf.entropy(logits), [[math.log(50_000)]])
        close(pf.exact_kl(logits, logits), [[0.0]])
        assert differ(F.log_softmax(logits, -1)[..., 0].float(), tensor(-math.log(50_000)), by=1e-4)

    def test_entropy_by_hand(self):
        # uniform over 4: log 4; (3/4, 1/4): log 4 - 3/4 log 3
        close(pf.entropy(self.logits), [[math.log(4), math.log(4) - 0.75 * math.log(3)]])

    def test_entropy_of_a_certain_token_is_zero(self):
        close(pf.entropy(tensor([[[1e4, 0.0, 0.0]]])), [[0.0]])

    def test_impossible_tokens_leave_finite_gradients(self):
        logits = self.logits.clone().requires_grad_()
        (pf.entropy(logits) + pf.exact_kl(logits, self.logits)).sum().backward()
        assert torch.isfinite(logits.grad).all()
        # dH/dz_v = -p_v (log p_v + H), by hand for (3/4, 1/4)
        h = math.log(4) - 0.75 * math.log(3)
        close(logits.grad[0, 1, :2], [-0.75 * (math.log(3 / 4) + h), -0.25 * (math.log(1 / 4) + h)])

    def test_full_kl_by_hand(self):
        p, q = tensor([[[math.log(3), 0.0]]]), tensor([[[0.0, 0.0]]])  # (3/4, 1/4) and (1/2, 1/2)
        close(pf.exact_kl(p, q), [[0.75 * math.log(1.5) + 0.25 * math.log(0.5)]])  # 0.1308
        close(pf.exact_kl(q, p), [[0.5 * math.log(2 / 3) + 0.5 * math.log(2)]])  # 0.1438
        assert differ(pf.exact_kl(p, q), pf.exact_kl(q, p))

    def test_full_kl_where_a_token_is_impossible(self):
        p, q = tensor([[[0.0, -INF]]]), tensor([[[0.0, 0.0]]])
        close(pf.exact_kl(p, q), [[LOG2]])
        close(pf.exact_kl(p, p), [[0.0]])
        assert pf.exact_kl(q, p).item() == INF

    def test_full_kl_of_seed_000(self):
        """Its pseudo code is the expectation under the original model."""
        generator = torch.Generator().manual_seed(1)
        original, current = torch.randn(2, 2, 3, 6, generator=generator)
        slow = [
            [slow_kl(slow_softmax(original[b, t].tolist()), slow_softmax(current[b, t].tolist())) for t in range(3)]
            for b in range(2)
        ]
        close(pf.exact_kl(original, current), slow)
        assert differ(pf.exact_kl(current, original), pf.exact_kl(original, current))


# --- estimators of the KL ---


class TestKL:
    def test_by_hand(self):
        """The policy gives the two tokens 1/2 and 1/4, the reference 1/4 and 1/2: r is 1/2 and 2."""
        policy, ref = tensor([[0.5, 0.25]]).log(), tensor([[0.25, 0.5]]).log()
        close(pf.kl_estimate(policy, ref), [[LOG2, -LOG2]])
        close(pf.kl_estimate(policy, ref, "k1"), [[LOG2, -LOG2]])
        close(pf.kl_estimate(policy, ref, "abs"), [[LOG2, LOG2]])
        close(pf.kl_estimate(policy, ref, "k2"), [[0.2402265, 0.2402265]])  # (log 2)^2 / 2
        close(pf.kl_estimate(policy, ref, "k3"), [[-0.5 + LOG2, 1 - LOG2]])  # 0.1931, 0.3069

    def test_seed_004(self):
        policy, ref = tensor([[-0.1, -5.0, -20.0]]), tensor([[-0.2, -4.5, -20.0]])
        close(pf.kl_estimate(policy, ref), [[0.1, -0.5, 0.0]])

    @pytest.mark.parametrize("seed", range(4))
    def test_expectation_under_the_policy(self, seed):
        """Enumerated, not sampled: k1 and k3 are unbiased, k2 and abs are not, and the direction matters."""
        policy_logits, ref_logits = torch.randn(2, 1, 1, 6, generator=torch.Generator().manual_seed(seed))
        p, q = slow_softmax(policy_logits.flatten().tolist()), slow_softmax(ref_logits.flatten().tolist())
        every_token = torch.arange(6)[:, None]
        logprobs = pf.token_logprobs(policy_logits.expand(6, 1, 6), every_token)
        ref_logprobs = pf.token_logprobs(ref_logits.expand(6, 1, 6), every_token)
        mean = {
            name: sum(
                weight * kl
                for weight, kl in zip(p, pf.kl_estimate(logprobs, ref_logprobs, name).flatten().tolist(), strict=True)
            )
            for name in pf.KL_ESTIMATORS
        }
        assert mean["k1"] == pytest.approx(slow_kl(p, q), abs=1e-5)
        assert mean["k3"] == pytest.approx(slow_kl(p, q), abs=1e-5)
        assert pf.exact_kl(policy_logits, ref_logits).item() == pytest.approx(slow_kl(p, q), abs=1e-5)
        assert abs(mean["k1"] - slow_kl(q, p)) > 1e-3
        assert abs(mean["k2"] - slow_kl(p, q)) > 1e-3
        assert mean["abs"] > slow_kl(p, q) + 1e-3

    def test_signs(self):
        policy, ref = -torch.rand(2, 1, 1000, generator=torch.Generator().manual_seed(0)) * 5
        for name in ("k2", "k3", "abs"):
            assert pf.kl_estimate(policy, ref, name).min().item() >= 0
        assert pf.kl_estimate(policy, ref, "k1").min().item() < -1
        assert (pf.kl_estimate(policy, ref, "abs") >= pf.kl_estimate(policy, ref, "k1")).all()

    @pytest.mark.parametrize("name", pf.KL_ESTIMATORS)
    def test_zero_for_equal_models(self, name):
        logprobs = -torch.rand(2, 5, generator=torch.Generator().manual_seed(0)) * 20
        assert pf.kl_estimate(logprobs, logprobs, name).abs().max().item() == 0.0

    def test_k3_keeps_its_digits_near_zero(self):
        policy, ref = torch.full((1, 1), -1e-3), torch.zeros(1, 1)
        true = math.expm1(1e-3) - 1e-3  # 5.0017e-7
        assert pf.kl_estimate(policy, ref, "k3").item() == pytest.approx(true, rel=1e-3)

    def test_unknown_name(self):
        with pytest.raises(ValueError, match=r"'k4'.*k1, k2, k3, abs"):
            pf.kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


# --- rewards and advantages ---


class TestShapeRewards:
    kl = tensor([[0.1, -0.5, 0.0, 0.0], [0.2, 0.3, 0.4, 0.5]])
    scores = tensor([1.5, -2.0])

    def test_seed_004(self):
        """Answer `2 <eos>`, kl (0.1, -0.5), score 1.5, price 0.1: EOS is the last action, or `2` is."""
        with_eos = pf.shape_rewards(self.scores[:1], self.kl[:1], tensor([[1, 1, 0, 0]]), 0.1)
        close(with_eos, [[-0.01, 0.05 + 1.5, 0.0, 0.0]])
        without_eos = pf.shape_rewards(self.scores[:1], self.kl[:1], tensor([[1, 0, 0, 0]]), 0.1)
        close(without_eos, [[-0.01 + 1.5, 0.0, 0.0, 0.0]])

    @pytest.mark.parametrize("length", range(5))
    def test_score_lands_on_the_last_real_token(self, length):
        """TRL put it one slot after EOS. An empty row gets nothing, a full one has no slot after."""
        mask = (torch.arange(4) < length)[None]
        expected = torch.zeros(1, 4)
        if length:
            expected[0, length - 1] = 1.5
        assert torch.equal(pf.shape_rewards(self.scores[:1], torch.zeros(1, 4), mask, 0.1), expected)

    def test_last_one_of_a_mask_with_holes(self):
        rewards = pf.shape_rewards(self.scores[:1], torch.zeros(1, 4), tensor([[1, 0, 1, 0]]), 0.1)
        close(rewards, [[0.0, 0.0, 1.5, 0.0]])

    def test_token_rewards_are_added(self):
        mask = tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
        token_rewards = torch.full((2, 4), 10.0)
        rewards = pf.shape_rewards(self.scores, self.kl, mask, 1.0, token_rewards=token_rewards)
        close(rewards, [[9.9, 10.5 + 1.5, 0.0, 0.0], [9.8, 9.7, 9.6, 9.5 - 2.0]])

    def test_sum_is_score_minus_price_times_kl(self):
        kl, mask = ragged([4, 1, 7], 7)
        scores = tensor([1.0, -2.0, 3.0])
        total = pf.shape_rewards(scores, kl, mask, 0.3).sum(1)
        slow = [
            scores[b].item() - 0.3 * sum(kl[b, t].item() for t in range(length)) for b, length in enumerate([4, 1, 7])
        ]
        close(total, slow)

    @pytest.mark.parametrize("junk", [7.0, INF, NAN])
    def test_padding_does_not_count(self, junk):
        kl, mask = ragged([4, 0, 7], 7)
        scores = tensor([1.0, junk, 3.0])  # the score of an empty response goes nowhere either
        padded = kl.masked_fill(~mask, junk)
        rewards = pf.shape_rewards(scores, padded, mask, 0.3, token_rewards=padded)
        expected = pf.shape_rewards(tensor([1.0, 0.0, 3.0]), kl, mask, 0.3, token_rewards=kl)
        assert torch.equal(rewards, expected)
        assert rewards[~mask].abs().sum().item() == 0.0


def slow_gae(rewards, values, gamma, lam):
    """Eq. 16 as it is written: a double sum over the TD errors of one unpadded response."""
    length = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < length else 0.0) - values[t] for t in range(length)]
    return [sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, length)) for t in range(length)]


def slow_batch_gae(rewards, values, lengths, gamma, lam):
    expected = torch.zeros_like(values)
    for b, length in enumerate(lengths):
        row = slow_gae(rewards[b, :length].tolist(), values[b, :length].tolist(), gamma, lam)
        expected[b, :length] = tensor(row)
    return expected


class TestGAE:
    lengths = (7, 1, 4, 0)

    @pytest.fixture
    def batch(self):
        rewards, mask = ragged(self.lengths, 7, seed=1)
        values, _ = ragged(self.lengths, 7, seed=2)
        return rewards, values, mask

    def test_an_observation_between_two_turns_is_skipped(self):
        """By hand, gamma 0.5 and lambda 0.5: two actions, two tokens of a tool's answer, one action.

        deltas: 0 + 0.5 * 4 - 2 = 0; 1 + 0.5 * 6 - 4 = 0 (V at the first token of the next turn, reward of the turn);
        8 - 6 = 2. Advantages backward with gamma * lambda = 0.25: 2; 0 + 0.5 = 0.5; 0 + 0.125.
        """
        rewards = tensor([[0.0, 1.0, 77.0, 77.0, 8.0]])
        values = tensor([[2.0, 4.0, 99.0, -99.0, 6.0]])
        mask = tensor([[True, True, False, False, True]])
        advantages, returns = pf.gae(rewards, values, mask, gamma=0.5, lam=0.5)
        assert advantages.tolist() == [[0.125, 0.5, 0.0, 0.0, 2.0]]
        assert returns.tolist() == [[2.125, 4.5, 0.0, 0.0, 8.0]]

    def test_gae_with_holes_is_gae_of_the_actions_alone(self):
        """A slow loop over the actions, and the negative control: a GAE that walks through observations differs."""
        generator = torch.Generator().manual_seed(3)
        rewards, values = torch.randn(2, 20, 12, generator=generator)
        mask = torch.rand(20, 12, generator=generator) < 0.6
        mask[0] = False
        advantages, returns = pf.gae(rewards, values, mask, gamma=0.9, lam=0.8)
        expected = torch.zeros_like(values)
        for row in range(20):
            keep = mask[row]
            expected[row, keep] = tensor(slow_gae(rewards[row, keep].tolist(), values[row, keep].tolist(), 0.9, 0.8))
        close(advantages, expected)
        close(returns, torch.where(mask, expected + values, 0.0))
        through, _ = pf.gae(rewards * mask, values * mask, torch.ones_like(mask), gamma=0.9, lam=0.8)
        assert (through - advantages)[mask].abs().max() > 0.1

    def test_rewards_of_observations_are_paid_at_the_action_before_them(self):
        mask = tensor([[False, True, True, False, False, True, False], [False] * 7])
        moved = pf.move_to_actions(tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], [1.0] * 7]), mask)
        assert moved.tolist() == [[0.0, 3.0, 28.0, 0.0, 0.0, 96.0, 0.0], [0.0] * 7]

    def test_table_of_seed_003(self):
        rewards = tensor([[0.0, 0.0, 0.0, 0.0, 0.8]])
        values = tensor([[0.6, 0.5, 0.4, 0.3, 0.1]])
        advantages, returns = pf.gae(rewards, values, torch.ones(1, 5), gamma=1.0, lam=0.95)
        # 0.7; -0.2 + 0.95 * 0.7; -0.1 + 0.95 * 0.465; -0.1 + 0.95 * 0.34175; -0.1 + 0.95 * 0.2246625
        close(advantages, [[0.113429375, 0.2246625, 0.34175, 0.465, 0.7]])
        close(advantages, [[0.1134, 0.2247, 0.3418, 0.465, 0.7]], atol=1e-4)
        close(returns, [[0.713429375, 0.7246625, 0.74175, 0.765, 0.8]])

    @pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.99, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0)])
    def test_against_the_definition(self, batch, gamma, lam):
        rewards, values, mask = batch
        advantages, returns = pf.gae(rewards, values, mask, gamma=gamma, lam=lam)
        expected = slow_batch_gae(rewards, values, self.lengths, gamma, lam)
        close(advantages, expected)
        close(returns, expected + values * mask)

    def test_lambda_one_is_monte_carlo(self, batch):
        rewards, values, mask = batch
        advantages, returns = pf.gae(rewards, values, mask, gamma=0.9, lam=1.0)
        for b, length in enumerate(self.lengths):
            for t in range(length):
                future = sum(0.9 ** (k - t) * rewards[b, k].item() for k in range(t, length))
                assert returns[b, t].item() == pytest.approx(future, abs=1e-5)
                assert advantages[b, t].item() == pytest.approx(future - values[b, t].item(), abs=1e-5)

    def test_lambda_zero_is_one_step_td(self, batch):
        rewards, values, mask = batch
        advantages, _ = pf.gae(rewards, values, mask, gamma=0.9, lam=0.0)
        for b, length in enumerate(self.lengths):
            for t in range(length):
                after = values[b, t + 1].item() if t + 1 < length else 0.0
                delta = rewards[b, t].item() + 0.9 * after - values[b, t].item()
                assert advantages[b, t].item() == pytest.approx(delta, abs=1e-5)

    def test_gamma_and_lambda_are_not_the_same(self, batch):
        a, _ = pf.gae(*batch, gamma=0.5, lam=1.0)
        b, _ = pf.gae(*batch, gamma=1.0, lam=0.5)
        assert differ(a, b)

    @pytest.mark.parametrize("junk", [5.0, INF, NAN])
    def test_padding_does_not_count(self, batch, junk):
        rewards, values, mask = batch
        clean = pf.gae(rewards, values, mask, gamma=0.9, lam=0.95)
        dirty = pf.gae(rewards.masked_fill(~mask, junk), values.masked_fill(~mask, junk), mask, gamma=0.9, lam=0.95)
        for a, b in zip(clean, dirty, strict=True):
            assert torch.equal(a, b)
            assert a[~mask].abs().sum().item() == 0.0

    def test_bootstrapping_from_padding_would_differ(self, batch):
        rewards, values, mask = batch
        right, _ = pf.gae(rewards, values, mask, gamma=1.0, lam=0.95)
        wrong, _ = pf.gae(rewards * mask, values, torch.ones_like(mask), gamma=1.0, lam=0.95)
        assert differ(right, wrong * mask)

    def test_width_of_the_padding_does_not_count(self, batch):
        rewards, values, mask = batch
        wide, _ = pf.gae(
            F.pad(rewards, (0, 3), value=9.0),
            F.pad(values, (0, 3), value=9.0),
            F.pad(mask, (0, 3)),
            gamma=1.0,
            lam=0.95,
        )
        narrow, _ = pf.gae(rewards, values, mask, gamma=1.0, lam=0.95)
        assert torch.equal(wide[:, :7], narrow)


# --- losses ---


def policy_loss_of(ratio, advantage, **options):
    """Loss, flag and gradient by logprob of one token."""
    logprobs = tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    loss, clipped = pf.clipped_policy_loss(logprobs, tensor([[-1.0]]), tensor([[advantage]]), **options)
    loss.sum().backward()
    return loss.item(), clipped.item(), logprobs.grad.item()


class TestClippedPolicyLoss:
    @pytest.mark.parametrize(
        "ratio, advantage, options, loss, clipped, gradient",
        [
            (1.0, 1.0, {}, -1.0, False, -1.0),
            (1.1, 2.0, {}, -2.2, False, -2.2),
            (1.5, 1.0, {}, -1.2, True, 0.0),
            (0.5, 1.0, {}, -0.5, False, -0.5),
            (1.5, -1.0, {}, 1.5, False, 1.5),
            (0.5, -1.0, {}, 0.8, True, 0.0),
            (0.9, -1.0, {}, 0.9, False, 0.9),
            (0.7, -1.0, {"cliprange": 0.4}, 0.7, False, 0.7),
            (1.25, 1.0, {"cliprange_high": 0.28}, -1.25, False, -1.25),
            (1.25, 1.0, {}, -1.2, True, 0.0),
            (1.5, 1.0, {"cliprange_high": 0.28}, -1.28, True, 0.0),
            (0.75, -1.0, {"cliprange_high": 0.28}, 0.8, True, 0.0),
            (1.1, 1.0, {"cliprange_high": 0.0}, -1.0, True, 0.0),
            (5.0, -1.0, {}, 5.0, False, 5.0),
            (5.0, -1.0, {"dual_clip": 3.0}, 3.0, True, 0.0),
            (5.0, -2.0, {"dual_clip": 3.0}, 6.0, True, 0.0),
            (2.0, -1.0, {"dual_clip": 3.0}, 2.0, False, 2.0),
            (0.5, -1.0, {"dual_clip": 3.0}, 0.8, True, 0.0),
            (5.0, 1.0, {"dual_clip": 3.0}, -1.2, True, 0.0),
            (0.1, 1.0, {"dual_clip": 3.0}, -0.1, False, -0.1),
        ],
    )
    def test_by_hand(self, ratio, advantage, options, loss, clipped, gradient):
        actual = policy_loss_of(ratio, advantage, **options)
        assert actual[0] == pytest.approx(loss, abs=1e-5)
        assert actual[1] is clipped
        assert actual[2] == pytest.approx(gradient, abs=1e-5)

    @pytest.mark.parametrize("options", [{}, {"cliprange": 0.1, "cliprange_high": 0.4}, {"dual_clip": 1.5}])
    def test_gradient_is_zero_exactly_where_clipped(self, options):
        generator = torch.Generator().manual_seed(0)
        old, advantages = torch.randn(2, 8, 50, generator=generator)
        logprobs = (old + 0.5 * torch.randn(8, 50, generator=generator)).requires_grad_()
        loss, clipped = pf.clipped_policy_loss(logprobs, old, advantages, **options)
        loss.sum().backward()
        assert torch.equal(logprobs.grad == 0, clipped)
        assert clipped.dtype == torch.bool
        assert 0 < clipped.sum().item() < clipped.numel()

    def test_against_a_loop(self):
        generator = torch.Generator().manual_seed(3)
        old, advantages, step = torch.randn(3, 4, 6, generator=generator)
        loss, clipped = pf.clipped_policy_loss(old + step, old, advantages, cliprange=0.2, cliprange_high=0.3)
        for b in range(4):
            for t in range(6):
                ratio, advantage = math.exp(step[b, t].item()), advantages[b, t].item()
                bounded = min(max(ratio, 0.8), 1.3)
                expected = -min(ratio * advantage, bounded * advantage)
                assert loss[b, t].item() == pytest.approx(expected, abs=1e-5)
                assert clipped[b, t].item() == (bounded * advantage < ratio * advantage)

    def test_first_minibatch(self):
        """Right after the rollout the ratio is 1: nothing is clipped and the gradient is REINFORCE's."""
        advantages, _ = ragged([5, 5], 5)
        logprobs = torch.full((2, 5), -2.0, requires_grad=True)
        loss, clipped = pf.clipped_policy_loss(logprobs, logprobs.detach(), advantages)
        loss.sum().backward()
        assert torch.equal(loss, -advantages)
        assert torch.equal(logprobs.grad, -advantages)
        assert not clipped.any()

    def test_zero_advantage_is_a_tie_not_a_clip(self):
        assert policy_loss_of(9.0, 0.0)[1] is False

    @pytest.mark.parametrize("dual_clip", [1.0, 0.5])
    def test_dual_clip_at_most_one_is_refused(self, dual_clip):
        with pytest.raises(ValueError, match="above 1"):
            policy_loss_of(1.0, 1.0, dual_clip=dual_clip)


class TestOtherPolicyLosses:
    @pytest.mark.parametrize("ratio, advantage", [(1.0, 2.0), (5.0, 1.0), (0.1, 1.0), (5.0, -1.0)])
    def test_unclipped(self, ratio, advantage):
        logprobs = tensor([[math.log(ratio) - 1.0]], requires_grad=True)
        loss = pf.unclipped_policy_loss(logprobs, tensor([[-1.0]]), tensor([[advantage]]))
        loss.sum().backward()
        assert loss.item() == pytest.approx(-ratio * advantage, abs=1e-5)
        assert logprobs.grad.item() == pytest.approx(-ratio * advantage, abs=1e-5)

    def test_kl_penalty_by_hand(self):
        """r = 2, A = 1, beta = 0.5: -2 + 0.5 (2 - 1 - log 2); gradient -2 + 0.5 (2 - 1)."""
        logprobs = tensor([[LOG2 - 1.0]], requires_grad=True)
        loss = pf.kl_penalty_policy_loss(logprobs, tensor([[-1.0]]), tensor([[1.0]]), beta=0.5)
        loss.sum().backward()
        assert loss.item() == pytest.approx(-1.8465736, abs=1e-5)
        assert logprobs.grad.item() == pytest.approx(-1.5, abs=1e-5)

    def test_kl_penalty_is_that_of_old_and_policy(self):
        """Enumerated over the vocabulary: value and gradient of KL(old || policy), not of its reverse."""
        generator = torch.Generator().manual_seed(0)
        old_logits, logits = torch.randn(2, 1, 1, 5, generator=generator)
        logits.requires_grad_()
        every_token, old_probs = torch.arange(5)[:, None], old_logits.softmax(-1).flatten()
        old = pf.token_logprobs(old_logits.expand(5, 1, 5), every_token)
        new = pf.token_logprobs(logits.expand(5, 1, 5), every_token)
        loss = pf.kl_penalty_policy_loss(new, old, torch.zeros(5, 1), beta=1.0).flatten()
        expectation = (old_probs * loss).sum()
        expectation.backward()
        p, q = slow_softmax(old_logits.flatten().tolist()), slow_softmax(logits.flatten().tolist())
        assert expectation.item() == pytest.approx(slow_kl(p, q), abs=1e-5)
        assert abs(expectation.item() - slow_kl(q, p)) > 1e-3
        # d KL(p || q) / d logits of q = q - p
        close(logits.grad.flatten(), [b - a for a, b in zip(p, q, strict=True)])

    def test_without_penalty_it_is_the_unclipped_loss(self):
        old, advantages = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
        new = old + 0.3
        free = pf.unclipped_policy_loss(new, old, advantages)
        assert torch.equal(pf.kl_penalty_policy_loss(new, old, advantages, beta=0.0), free)
        assert differ(pf.kl_penalty_policy_loss(new, old, advantages, beta=1.0), free)


class TestClippedValueLoss:
    @pytest.mark.parametrize(
        "value, target, cliprange, loss, clipped, gradient",
        [  # the old value is 0
            (0.1, 1.0, 0.2, 0.405, False, -0.9),  # 0.9^2 / 2
            (0.5, 1.0, 0.2, 0.32, True, 0.0),  # moved to 0.5, counts as 0.2: 0.8^2 / 2
            (0.5, -1.0, 0.2, 1.125, False, 1.5),  # moved the wrong way: 1.5^2 / 2 is the larger
            (-0.5, -1.0, 0.2, 0.32, True, 0.0),
            (0.5, 1.0, 0.4, 0.18, True, 0.0),
            (0.5, 1.0, None, 0.125, False, -0.5),
            (3.0, 1.0, None, 2.0, False, 2.0),
        ],
    )
    def test_by_hand(self, value, target, cliprange, loss, clipped, gradient):
        values = tensor([[value]], requires_grad=True)
        old, returns = torch.zeros(1, 1), tensor([[target]])
        actual, flag = pf.clipped_value_loss(values, old, returns, cliprange=cliprange)
        actual.sum().backward()
        assert actual.item() == pytest.approx(loss, abs=1e-5)
        assert flag.item() is clipped
        assert values.grad.item() == pytest.approx(gradient, abs=1e-5)

    def test_against_a_loop(self):
        old, step, returns = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
        loss, clipped = pf.clipped_value_loss(old + step, old, returns, cliprange=0.3)
        for b in range(4):
            for t in range(6):
                before, target = old[b, t].item(), returns[b, t].item()
                value = before + step[b, t].item()
                bounded = before + min(max(step[b, t].item(), -0.3), 0.3)
                errors = (value - target) ** 2, (bounded - target) ** 2
                assert loss[b, t].item() == pytest.approx(max(errors) / 2, abs=1e-5)
                if abs(errors[0] - errors[1]) > 1e-4:
                    assert clipped[b, t].item() == (errors[1] > errors[0])
        assert clipped.any() and not clipped.all()

    def test_small_moves_are_never_counted_as_clipped(self):
        """old + clamp(new - old) rounds, and would flag some of these."""
        generator = torch.Generator().manual_seed(0)
        old, new, returns = torch.rand(3, 100, 100, generator=generator)
        old, new = 0.1 * old, 0.01 * new
        naive = old + (new - old).clamp(-0.2, 0.2)
        assert ((naive - returns).square() > (new - returns).square()).any()
        assert not pf.clipped_value_loss(new, old, returns)[1].any()


class TestOneReduction:
    """One token count for the whole minibatch: 8 x 1, 4 x 2 and 1 x 8 responses are the same gradient."""

    lengths = (7, 1, 4, 2, 6, 3, 5, 1)

    def accumulated(self, micro, per_micro_mean=False):
        generator = torch.Generator().manual_seed(0)
        old, advantages, values, old_values, returns = torch.randn(5, 8, 7, generator=generator)
        mask = torch.arange(7) < tensor(self.lengths)[:, None]
        logprobs = (old + 0.3 * torch.randn(8, 7, generator=generator)).requires_grad_()
        total = 0.0
        for start in range(0, 8, micro):
            rows = slice(start, start + micro)
            policy, _ = pf.clipped_policy_loss(logprobs[rows], old[rows], advantages[rows])
            value, _ = pf.clipped_value_loss(values[rows], old_values[rows], returns[rows])
            loss = policy + 0.1 * value
            loss = loss[mask[rows]].mean() * micro / 8 if per_micro_mean else (loss * mask[rows]).sum() / mask.sum()
            loss.backward()
            total += loss.item()
        return total, logprobs.grad

    @pytest.mark.parametrize("micro", [1, 2, 4])
    def test_split_does_not_count(self, micro):
        loss, gradient = self.accumulated(micro)
        whole_loss, whole_gradient = self.accumulated(8)
        assert loss == pytest.approx(whole_loss, abs=1e-5)
        close(gradient, whole_gradient)

    @pytest.mark.parametrize("micro", [1, 2, 4])
    def test_a_mean_per_micro_batch_would(self, micro):
        loss, gradient = self.accumulated(micro, per_micro_mean=True)
        whole_loss, whole_gradient = self.accumulated(8)
        assert abs(loss - whole_loss) > 1e-3
        assert differ(gradient, whole_gradient, by=1e-3)


class TestPairwiseLoss:
    def test_by_hand(self):
        chosen, rejected = tensor([1.0, 1.0, 0.0]), tensor([1.0, 0.0, 2.0])
        close(pf.pairwise_loss(chosen, rejected), [LOG2, 0.3132617, 2.1269280])

    @pytest.mark.parametrize("chosen, rejected", [(0.3, -1.2), (-2.0, 1.5), (4.0, 4.0)])
    def test_is_the_log_of_one_plus_exp(self, chosen, rejected):
        loss = pf.pairwise_loss(tensor([chosen]), tensor([rejected])).item()
        assert loss == pytest.approx(math.log(1 + math.exp(-(chosen - rejected))), abs=1e-5)

    def test_seed_003_lost_a_bracket(self):
        """`log(1 + exp(-r+ - r-))`, its second form, would rate a pair by its level and not by its gap."""
        chosen, rejected = tensor([3.0]), tensor([2.0])
        printed = torch.log1p(torch.exp(-chosen - rejected))
        close(pf.pairwise_loss(chosen, rejected), pf.pairwise_loss(chosen - 2, rejected - 2))
        assert differ(pf.pairwise_loss(chosen, rejected), printed)

    def test_margin_is_subtracted_from_the_gap(self):
        chosen, rejected = tensor([2.0, 2.0]), tensor([1.0, 1.0])
        close(pf.pairwise_loss(chosen, rejected, margin=tensor([1.0, 0.0])), [LOG2, 0.3132617])
        close(pf.pairwise_loss(chosen, rejected, margin=1.0), [LOG2, LOG2])
        close(pf.pairwise_loss(chosen, rejected, margin=torch.zeros(2)), [0.3132617, 0.3132617])

    def test_centring_pulls_the_sum_to_zero(self):
        close(pf.pairwise_loss(tensor([3.0]), tensor([3.0]), center_coefficient=0.01), [LOG2 + 0.36])
        close(pf.pairwise_loss(tensor([3.0]), tensor([-3.0]), center_coefficient=0.01), [math.log1p(math.exp(-6))])

    def test_extreme_gaps_stay_finite(self):
        close(pf.pairwise_loss(tensor([0.0, 1e4]), tensor([1e4, 0.0])), [1e4, 0.0])


# --- diagnostics and controllers ---


class TestExplainedVariance:
    mask = tensor([[1, 1, 1, 1, 0]])
    returns = tensor([[1.0, 2.0, 3.0, 4.0, 99.0]])

    @pytest.mark.parametrize(
        "values, expected",
        [
            ([1.0, 2.0, 3.0, 4.0, -7.0], 1.0),  # perfect
            ([6.0, 7.0, 8.0, 9.0, -7.0], 1.0),  # perfect but for the level
            ([2.5, 2.5, 2.5, 2.5, -7.0], 0.0),  # a constant
            ([4.0, 3.0, 2.0, 1.0, -7.0], -3.0),  # residuals -3, -1, 1, 3: 1 - 5 / 1.25
            ([1.0, 2.0, 3.0, 2.0, -7.0], 0.4),  # residuals 0, 0, 0, 2: 1 - 0.75 / 1.25
        ],
    )
    def test_by_hand(self, values, expected):
        result = pf.explained_variance(tensor([values]), self.returns, self.mask)
        assert result.shape == ()
        close(result, expected)

    @pytest.mark.parametrize("constant", [0.0, 0.7, 1234.567])
    def test_zero_where_the_returns_do_not_vary(self, constant):
        """Also where rounding in the mean would leave a variance of 1e-17 and a result of -1e16."""
        for count in (1, 3, 7, 1000):
            values = torch.randn(1, count, generator=torch.Generator().manual_seed(0))
            returns, mask = torch.full((1, count), constant), torch.ones(1, count)
            assert pf.explained_variance(values, returns, mask).item() == 0.0

    def test_no_token_at_all(self):
        assert pf.explained_variance(self.returns, self.returns, torch.zeros(1, 5)).item() == 0.0


class TestControllers:
    @pytest.mark.parametrize(
        "kl, expected",
        [
            (6.0, 0.1),  # on target
            (6.6, 0.1 * 1.001),  # 10 % too high, 100 of 10,000 episodes: + 0.1 * 0.01
            (600.0, 0.1 * 1.002),  # the error is clipped to 20 %
            (0.0, 0.1 * 0.998),
            (-5.0, 0.1 * 0.998),
            (5.4, 0.1 * 0.999),
        ],
    )
    def test_proportional(self, kl, expected):
        coef = pf.proportional_kl_coef(0.1, kl, target=6.0, horizon=10_000, episodes=100)
        assert coef == pytest.approx(expected, rel=1e-9)

    def test_proportional_error_bound(self):
        coef = pf.proportional_kl_coef(1.0, 60.0, target=6.0, horizon=100, episodes=100, max_error=0.5)
        assert coef == pytest.approx(1.5, rel=1e-9)

    def test_proportional_finds_the_price_that_gives_the_target(self):
        """A policy whose KL is 0.3 / price reaches 6 nats at a price of 0.05."""
        coef = 0.5
        for _ in range(2000):
            coef = pf.proportional_kl_coef(coef, 0.3 / coef, target=6.0, horizon=10_000, episodes=256)
        assert coef == pytest.approx(0.05, rel=1e-4)

    @pytest.mark.parametrize("kl, expected", [(0.5, 0.05), (1.0, 0.1), (2.0, 0.1), (4.0, 0.1), (4.1, 0.2)])
    def test_band(self, kl, expected):
        """Seed 001: below the band the penalty is too strong, above it too weak."""
        assert pf.band_kl_coef(0.1, kl, low=1.0, high=4.0) == pytest.approx(expected, rel=1e-9)

    def test_band_factor(self):
        assert pf.band_kl_coef(1.0, 9.0, low=1.0, high=4.0, factor=1.5) == pytest.approx(1.5, rel=1e-9)
        assert pf.band_kl_coef(1.5, 0.0, low=1.0, high=4.0, factor=1.5) == pytest.approx(1.0, rel=1e-9)

    def test_ema(self):
        assert pf.ema(10.0, 20.0, 0.9) == pytest.approx(11.0, rel=1e-9)
        assert pf.ema(10.0, 20.0, 1.0) == 10.0
        assert pf.ema(10.0, 20.0, 0.0) == 20.0
        close(pf.ema(tensor([0.0, 4.0]), tensor([8.0, 4.0]), 0.75), [2.0, 4.0])

    def test_ema_approaches_a_constant(self):
        average = random.Random(0).uniform(-5, 5)
        start = average
        for _ in range(10):
            average = pf.ema(average, 3.0, 0.8)
        assert average - 3.0 == pytest.approx(0.8**10 * (start - 3.0), rel=1e-9)


def test_importance_weights_by_hand():
    gap = torch.tensor([[0.0, 0.0005, -0.0005, 0.5, -0.5, 3.0]])
    found = pf.truncated_importance_weights(gap - 2.0, torch.full((1, 6), -2.0), cap=2.0)
    assert found[0, :3].tolist() == [1.0, 1.0, 1.0]  # rounding weighs exactly 1
    assert torch.allclose(found[0, 3:], torch.tensor([1.6487213, 0.6065307, 2.0]))

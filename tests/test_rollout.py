"""The rollout's tensors, masks, orders and seeds: what they hold, by hand, and what they must not depend on."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch

from ppo_plus.data.batching import PromptSampler, micro_batch_indices, minibatch_indices
from ppo_plus.data.seeding import derive_seed, isolated_rng, sampling_uniforms
from ppo_plus.rollout.buffer import LeftPaddedLayout, Rollout, response_mask
from ppo_plus.rollout.responses import Responses, Segments

PER_TOKEN = ("action_mask", "logprobs", "ref_logprobs", "values", "value_baselines", "advantages", "returns")

# Responses


@pytest.mark.parametrize(
    ("tokens", "stops", "with_stop", "without_stop"),
    [
        ([5, 6, 2, 0, 0], [2], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]),
        ([5, 6, 7, 8, 9], [2], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]),
        ([5, 6, 7, 8, 2], [2], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]),
        ([5, 2, 2, 2, 2], [2], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]),  # padded with EOS
        ([5, 0, 6, 2, 0], [2], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]),  # the padding's id is also a token that was sampled
        ([5, 7, 2, 0, 0], [2, 7], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]),  # the first of several stop tokens
        ([5, 2, 7, 0, 0], [2, 7], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]),
        ([2, 0, 0, 0, 0], [2], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]),  # nothing but the stop token keeps it
    ],
)
def test_a_response_ends_with_its_first_stop_token(tokens, stops, with_stop, without_stop):
    responses = torch.tensor([tokens])
    assert response_mask(responses, stops).int().tolist() == [with_stop]
    assert response_mask(responses, stops, include_stop=False).int().tolist() == [without_stop]


def test_the_mask_agrees_with_a_slow_loop():
    responses = torch.randint(0, 6, (200, 7), generator=torch.Generator().manual_seed(0))
    mask = response_mask(responses, [2, 5])
    for row, found in zip(responses.tolist(), mask.tolist(), strict=True):
        alive, expected = True, []
        for token in row:
            expected.append(alive)
            alive = alive and token not in (2, 5)
        assert found == expected
    assert mask.dtype == torch.bool


# The container


def make_rollout(prompts=(2, 4, 3), responses=(3, 1, 2), longest_prompt=5, longest_response=6) -> Rollout:
    """Every number says where it is: row, then column, so that nothing can be cut or moved unseen."""
    n, width = len(prompts), longest_prompt + longest_response
    columns = torch.arange(width)
    starts = longest_prompt - torch.tensor(prompts)[:, None]
    ends = longest_prompt + torch.tensor(responses)[:, None]
    place = torch.arange(n)[:, None] * 100 + columns
    mask = (columns[longest_prompt:] < ends).bool()
    per_token = {name: place[:, longest_prompt:] + i / 10 for i, name in enumerate(PER_TOKEN[1:])}
    return Rollout(
        input_ids=place,
        attention_mask=((columns >= starts) & (columns < ends)).long(),
        action_mask=mask,
        sequence_scores=torch.arange(n) + 0.5,
        sequence_kl=torch.arange(n) - 0.25,
        **per_token,
    )


def test_sizes_of_a_rollout():
    rollout = make_rollout()
    assert (len(rollout), rollout.prompt_length, rollout.response_length) == (3, 5, 6)
    assert rollout.lengths().tolist() == [5, 5, 5]
    with pytest.raises(dataclasses.FrozenInstanceError):
        rollout.sequence_scores = rollout.sequence_kl


@pytest.mark.parametrize("rows", [[0, 1, 2], [0], [1], [2, 0], [2, 1], [2, 2]])
def test_take_moves_rows_to_the_right_and_cuts_what_is_padding_in_all(rows):
    prompts, responses = (2, 4, 3), (3, 1, 2)
    rollout = make_rollout(prompts, responses)
    taken = rollout.micro_batch(torch.tensor(rows))
    width, end = max(prompts[r] + responses[r] for r in rows), max(responses[r] for r in rows)
    assert taken["input_ids"].shape == taken["attention_mask"].shape == (len(rows), width)
    for i, row in enumerate(rows):
        length, response = prompts[row] + responses[row], responses[row]
        first = 5 - prompts[row]
        assert taken["input_ids"][i, -length:].tolist() == [100 * row + c for c in range(first, first + length)]
        assert taken["attention_mask"][i].tolist() == [0] * (width - length) + [1] * length
        for name in PER_TOKEN:
            expected = [0] * (end - response) + getattr(rollout, name)[row, :response].tolist()
            assert taken[name][i].tolist() == pytest.approx(expected)
    assert taken["seq_lens"] == [(prompts[row] + responses[row], responses[row]) for row in rows]
    assert taken["response_mask"].tolist() == [[False] * (end - responses[r]) + [True] * responses[r] for r in rows]
    assert set(taken) == {"input_ids", "attention_mask", "response_mask", "seq_lens", *PER_TOKEN}


def test_rows_of_several_ranks_are_concatenated_in_their_order():
    """One rank has shorter prompts and responses, and the other observations."""
    short = make_rollout((2, 1), (1, 3), longest_prompt=2, longest_response=3)
    long = make_rollout((4, 3), (5, 2), longest_prompt=4, longest_response=5)
    long = dataclasses.replace(long, input_ids=long.input_ids + 1000, observation_mask=torch.eye(2, 5).bool())
    both = Rollout.concatenate([short, long], pad_token_id=7)
    assert (len(both), both.prompt_length, both.response_length) == (4, 4, 5)
    assert both.input_ids[0].tolist() == [7, 7, *short.input_ids[0].tolist(), 7, 7]
    for part, rows in ((short, [0, 1]), (long, [2, 3])):
        found, expected = both.micro_batch(torch.tensor(rows)), part.micro_batch(torch.arange(2))
        mask = expected["attention_mask"].bool()
        assert torch.equal(found["input_ids"][mask], expected["input_ids"][mask])
        for name in (*PER_TOKEN, "attention_mask", "response_mask"):
            assert torch.equal(found[name], expected[name]), name
    assert both.sequence_scores.tolist() == [0.5, 1.5, 0.5, 1.5]
    second = both.select(slice(2, 4))
    assert second.sequence_scores.tolist() == [0.5, 1.5] and second.observation_mask.equal(long.observation_mask)
    swapped = Rollout.concatenate([long, short], pad_token_id=7)  # negative control
    assert not torch.equal(
        swapped.micro_batch(torch.arange(2))["input_ids"], both.micro_batch(torch.arange(2))["input_ids"]
    )


def test_take_keeps_an_unlearned_stop_token_that_is_attended():
    rollout = make_rollout()
    shorter = rollout.action_mask & (torch.arange(6) < torch.tensor([[2], [1], [1]]))
    taken = dataclasses.replace(rollout, action_mask=shorter).micro_batch(torch.tensor([0, 2]))
    assert taken["action_mask"].tolist() == [[True, True, False], [False, True, False]]
    assert taken["input_ids"].shape == (2, 5)


def test_take_keeps_the_columns_of_a_response_that_is_left_out():
    rollout = make_rollout()
    nothing = torch.zeros_like(rollout.action_mask)
    taken = dataclasses.replace(rollout, action_mask=nothing).micro_batch(torch.tensor([1, 2]))
    assert taken["action_mask"].shape == (2, 2)
    assert not taken["action_mask"].any()


def test_observations_are_read_and_not_scored():
    """Tokens 1 and 2 of a response of five are a tool's answer; the other response has none."""
    rollout = make_rollout(prompts=(2, 4), responses=(5, 3))
    observed = torch.zeros(2, 6, dtype=torch.bool)
    observed[0, 1:3] = True
    actions = rollout.action_mask & ~observed
    taken = dataclasses.replace(rollout, action_mask=actions, observation_mask=observed).micro_batch(torch.arange(2))
    plain = rollout.micro_batch(torch.arange(2))
    expected = [[True, False, False, True, True], [False, False, True, True, True]]
    assert taken["response_mask"].tolist() == taken["action_mask"].tolist() == expected
    assert taken["seq_lens"] == [(7, 3), (7, 3)]
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(taken[name], plain[name])
    assert taken["logprobs"].tolist() == plain["logprobs"].masked_fill(~torch.tensor(expected), 0).tolist()
    assert plain["seq_lens"] == [(7, 5), (7, 3)]


@pytest.mark.parametrize("observed", [False, True])
def test_a_rollout_comes_back_from_disk_to_the_bit(tmp_path, observed):
    rollout = make_rollout()
    if observed:
        rollout = dataclasses.replace(rollout, observation_mask=torch.rand(3, 6) < 0.5)
    rollout = dataclasses.replace(rollout, values=torch.randn(3, 12)[:, ::2] * 1e-38)  # strided, with subnormals
    rollout.save(tmp_path / "rollout.safetensors")
    loaded = Rollout.load(tmp_path / "rollout.safetensors")
    assert loaded.frozen_hidden_states is None and loaded.explained_variance is None  # not needed inside a rollout
    for field in dataclasses.fields(Rollout):
        expected, found = getattr(rollout, field.name), getattr(loaded, field.name)
        if expected is None or field.name == "explained_variance":
            assert found is None
            continue
        assert expected.dtype == found.dtype
        assert torch.equal(expected, found)


# Prompts


def sampler(num_prompts=21, n=4, micro_batches=6, **overrides) -> PromptSampler:
    return PromptSampler(num_prompts, n, micro_batches, **{"seed": 7, **overrides})


def batches(prompts: PromptSampler, epoch: int = 0) -> list[list[int]]:
    prompts.set_epoch(epoch)
    return list(prompts)


@pytest.mark.parametrize(
    ("num_prompts", "n", "micro_batches", "processes", "length"),
    [(21, 4, 6, 1, 30), (20, 4, 6, 1, 30), (19, 4, 6, 1, 24), (4, 4, 1, 1, 1), (3, 4, 6, 1, 0), (21, 4, 6, 2, 12)],
)
def test_it_is_as_long_as_training_has_micro_batches(num_prompts, n, micro_batches, processes, length):
    prompts = sampler(num_prompts, n, micro_batches, num_processes=processes)
    assert len(prompts) == len(list(prompts)) == length  # floor(D / (N * processes)) * micro-batches


def test_all_prompts_of_a_rollout_come_with_its_first_micro_batch():
    sizes = [len(batch) for batch in sampler()]
    assert sizes == [4, 0, 0, 0, 0, 0] * 5


def test_an_epoch_draws_each_prompt_at_most_once_and_leaves_out_the_remainder():
    drawn = [i for batch in sampler() for i in batch]
    assert len(drawn) == len(set(drawn)) == 20
    assert set(drawn) < set(range(21))


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    one = batches(sampler(), epoch=3)
    torch.rand(100)
    assert batches(sampler(), epoch=3) == one
    assert batches(sampler(), epoch=4) != one
    assert batches(sampler(seed=8), epoch=3) != one
    used = sampler()
    list(used)
    next(iter(used))
    assert batches(used, epoch=3) == one


def test_every_prompt_is_drawn_in_some_epoch():
    drawn = {i for epoch in range(20) for batch in batches(sampler(), epoch) for i in batch}
    assert drawn == set(range(21))


def test_without_shuffling_prompts_come_in_their_order_in_every_epoch():
    prompts = sampler(shuffle=False)
    assert [i for batch in batches(prompts, 0) for i in batch] == list(range(20))
    assert batches(prompts, 5) == batches(prompts, 0)


def test_processes_share_each_rollout_of_one_process_with_their_joint_batch():
    shares = [batches(sampler(process_index=p, num_processes=2)) for p in (0, 1)]
    whole = batches(sampler(n=8))
    for left, right, both in zip(*shares, whole, strict=True):
        assert left + right == both


def test_skipping_micro_batches_leaves_the_rest_of_the_epoch_unchanged():
    """What Trainer does on a resume in the middle of an epoch: it draws and drops."""
    from accelerate import skip_first_batches
    from torch.utils.data import DataLoader

    prompts = sampler()
    prompts.set_epoch(2)
    loader = DataLoader(list(range(21)), batch_sampler=prompts, collate_fn=list)
    whole = list(loader)
    for skipped in (0, 1, 6, 8, 29):
        assert list(skip_first_batches(loader, skipped)) == whole[skipped:]


# Minibatches


@pytest.mark.parametrize(("n", "parts"), [(8, 2), (8, 1), (8, 8), (12, 3)])
def test_minibatches_are_a_partition_into_equal_parts(n, parts):
    found = minibatch_indices(n, parts, seed=1, rollout_index=0, ppo_epoch=0)
    assert [len(rows) for rows in found] == [n // parts] * parts
    assert sorted(torch.cat(found).tolist()) == list(range(n))


def test_minibatches_are_another_permutation_for_each_epoch_rollout_and_seed():
    positions = [(seed, r, e) for seed in range(3) for r in range(3) for e in range(3)]

    def order(seed, rollout_index, ppo_epoch):
        rows = minibatch_indices(32, 2, seed=seed, rollout_index=rollout_index, ppo_epoch=ppo_epoch)
        return tuple(torch.cat(rows).tolist())

    orders = [order(*position) for position in positions]
    assert len(set(orders)) == len(positions)
    torch.rand(1)
    assert [order(*position) for position in positions] == orders
    assert tuple(range(32)) not in orders


@pytest.mark.parametrize(("processes", "parts"), [(2, 2), (4, 2), (2, 4), (8, 1)])
def test_processes_hold_together_the_minibatches_of_one_process(processes, parts):
    position = {"seed": 5, "rollout_index": 3, "ppo_epoch": 1}
    whole, share = minibatch_indices(32, parts, **position), 32 // processes
    shares = [minibatch_indices(share, parts, **position, process_index=p) for p in range(processes)]
    for minibatch in range(parts):
        rows = torch.cat([shares[p][minibatch] + p * share for p in range(processes)])
        assert torch.equal(rows, whole[minibatch])
    alike = [minibatch_indices(share, parts, **position)] * processes  # negative control: all think they are the first
    assert parts == 1 or not torch.equal(torch.cat([alike[p][0] + p * share for p in range(processes)]), whole[0])


def test_each_row_goes_to_each_minibatch_equally_often():
    counts = torch.zeros(12, 3)
    for epoch in range(600):
        for minibatch, rows in enumerate(minibatch_indices(12, 3, seed=0, rollout_index=0, ppo_epoch=epoch)):
            counts[rows, minibatch] += 1
    assert (counts / 600 - 1 / 3).abs().max() < 0.07  # five standard deviations of a binomial share


def test_micro_batches_are_cut_where_it_costs_fewest_tokens():
    """Lengths 1, 3 | 6 | 8, 9 take 6 + 6 + 18 tokens; rows two by two, 1, 3 | 6, 8 | 9, would take 31."""
    lengths = torch.tensor([9, 3, 7, 1, 8, 2, 6, 5])
    rows = torch.tensor([0, 3, 6, 1, 4])
    assert [m.tolist() for m in micro_batch_indices(rows, lengths, 2)] == [[3, 1], [6], [4, 0]]


def tokens_of(parts, lengths) -> list[int]:
    """What each micro-batch takes, padding included."""
    return [len(part) * int(lengths[part].max()) for part in parts]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_of_sorted_rows_takes_fewer_tokens(seed):
    """All ways to cut 8 rows into 4 micro-batches, none larger than 2 of the longest rows."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (20,), generator=generator)
    rows = torch.randperm(20, generator=generator)[:8]
    ordered = sorted(rows.tolist(), key=lambda row: int(lengths[row]))
    most = 2 * int(lengths[rows].max())
    costs = []
    for cuts in itertools.combinations(range(1, 8), 3):
        parts = [ordered[a:b] for a, b in itertools.pairwise([0, *cuts, 8])]
        tokens = tokens_of(parts, lengths)
        costs.append(sum(tokens) if max(tokens) <= most else math.inf)
    parts = micro_batch_indices(rows, lengths, 2)
    assert sorted(torch.cat(parts).tolist()) == sorted(rows.tolist())
    assert len(parts) == 4 and max(tokens_of(parts, lengths)) <= most
    assert sum(tokens_of(parts, lengths)) == min(costs) < math.inf


@pytest.mark.parametrize(("n", "batch_size"), [(1, 1), (1, 4), (7, 3), (600, 4), (600, 300), (300, 7), (5, 1)])
def test_there_are_as_many_micro_batches_as_trainer_expects(n, batch_size):
    lengths = torch.randint(1, 100, (n,), generator=torch.Generator().manual_seed(n))
    parts = micro_batch_indices(torch.arange(n), lengths, batch_size)
    assert len(parts) == math.ceil(n / batch_size)
    assert sorted(torch.cat(parts).tolist()) == list(range(n))
    assert min(len(part) for part in parts) >= 1
    assert max(tokens_of(parts, lengths)) <= batch_size * int(lengths.max())


def uneven_rollout(n, seed):
    """Prompts and responses of log-normal lengths, about 30 and 60 tokens in the median."""
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = (
        torch.randn(n, generator=generator).mul(spread).add(math.log(median)).exp().long().clamp(1, 500)
        for median, spread in ((30, 0.3), (60, 0.8))
    )
    return make_rollout(prompts.tolist(), responses.tolist(), int(prompts.max()), int(responses.max()))


def padding(micro_batches) -> float:
    """Padding over real tokens."""
    masks = [m["attention_mask"] for m in micro_batches]
    return sum(m.numel() for m in masks) / int(sum(m.sum() for m in masks)) - 1


@pytest.mark.parametrize("seed", range(5))
def test_padding_is_under_5_percent_of_the_tokens_on_uneven_data(seed):
    """A minibatch of 64 in micro-batches of 4."""
    rollout = uneven_rollout(256, seed)
    for rows in minibatch_indices(256, 4, seed=seed, rollout_index=0, ppo_epoch=0):
        parts = micro_batch_indices(rows, rollout.lengths(), 4)
        assert len(parts) == 16
        assert padding(map(rollout.micro_batch, parts)) < 0.05
        # Sorted but cut into equal parts, and not sorted at all.
        equal = rows[rollout.lengths()[rows].argsort()].split(4)
        assert padding(map(rollout.micro_batch, equal)) > 0.05
        assert padding(map(rollout.micro_batch, rows.split(4))) > 0.4


def test_rows_of_equal_length_keep_their_order():
    rows = torch.tensor([5, 2, 9, 0])
    assert [m.tolist() for m in micro_batch_indices(rows, torch.full((10,), 4), 2)] == [[5, 2], [9, 0]]


# Seeds


def test_a_seed_is_a_function_of_its_position_and_of_nothing_else():
    """The number itself is promised: another one would make every old checkpoint continue differently."""
    import hashlib

    text = b"(42, 'rollout', 3, 0)"
    expected = int(hashlib.blake2b(text, digest_size=8).hexdigest(), 16) // 2
    assert derive_seed(42, "rollout", 3, 0) == expected
    assert 0 <= expected < 2**63


def test_seeds_of_different_positions_differ():
    positions = [(seed, kind, i, j) for seed in range(5) for kind in ("a", "b") for i in range(20) for j in range(20)]
    assert len({derive_seed(*p) for p in positions}) == len(positions)
    assert derive_seed(1, 23) != derive_seed(12, 3) != derive_seed(1, 2, 3)
    assert derive_seed(0, "1") != derive_seed(0, 1)


def draw() -> tuple:
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_an_isolated_block_is_seeded_and_leaves_no_trace():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    draw()
    expected = draw(), draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    draw()
    before = draw()
    with isolated_rng(5):
        inside = draw()
        for _ in range(10):
            draw()
    after = draw()
    assert (before, after) == expected
    with isolated_rng(5):
        assert draw() == inside
    with isolated_rng(6):
        again = draw()
    assert all(a != b for a, b in zip(again, inside, strict=True))


def test_an_isolated_block_leaves_no_trace_after_an_error():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with pytest.raises(KeyError), isolated_rng(5):
        draw()
        raise KeyError
    assert draw() == expected


def test_isolation_takes_any_seed_that_a_position_gives():
    drawn = []
    for seed in (2**63 - 1, 0, 2**63 - 1):
        with isolated_rng(seed):
            drawn.append(draw())
    assert drawn[0] == drawn[2] != drawn[1]


def test_noise_of_a_row_does_not_depend_on_how_many_rows_follow():
    many = sampling_uniforms(3, 64, 11)
    assert torch.equal(sampling_uniforms(3, 5, 11), many[:5])
    assert many.dtype == torch.float64
    assert ((many >= 0) & (many < 1)).all()
    assert not torch.equal(sampling_uniforms(4, 64, 11), many)


def test_rows_of_a_pass_stand_on_the_right_and_what_it_finds_goes_back():
    #        prompt on the right of its 3 columns, response on the left of its 4
    ids = torch.tensor([[0, 11, 12, 13, 0, 0, 0], [21, 22, 23, 24, 25, 0, 0], [0, 0, 31, 32, 33, 34, 0]])
    aligned = LeftPaddedLayout.from_attention_mask((ids > 0).long(), 4)
    assert aligned.align_tokens(ids).tolist() == [[0, 0, 11, 12, 13], [21, 22, 23, 24, 25], [0, 31, 32, 33, 34]]
    assert aligned.align_responses(ids[:, 3:]).tolist() == [[0, 0, 13], [0, 24, 25], [32, 33, 34]]
    states = ids[:, :-1, None].float() * torch.ones(2)
    assert aligned.align_states(states)[..., 1].tolist() == [[0, 0, 11, 12], [21, 22, 23, 24], [0, 31, 32, 33]]
    found = aligned.align_tokens(ids)[:, -3:]  # a pass has a number in every column
    assert aligned.restore_responses(found).tolist() == [[13, 0, 0, 0], [24, 25, 0, 0], [32, 33, 34, 0]]
    back = aligned.restore_states(aligned.align_states(states), 6)
    assert torch.equal(aligned.align_states(back), aligned.align_states(states))


def test_noise_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    sampling_uniforms(3, 5, 11)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_response_does_not_depend_on_the_decode_batch(size, tmp_path):
    from conftest import make_trainer

    def responses(generation_batch_size):
        trainer = make_trainer(tmp_path, config={"generation_batch_size": generation_batch_size})
        rows = [trainer.train_dataset[i] for i in range(8)]
        noise = sampling_uniforms(11, 8, 8)
        samples = trainer.collector.sample(rows, noise, {})
        alone = trainer.collector.sample(rows[5:6], noise[5:6], {})
        return samples.completions.completion_ids, alone.completions.completion_ids[0]

    together, alone = responses(size)
    assert together == responses(64)[0]
    assert alone == together[5]
    assert len({tuple(ids) for ids in together}) > 4


# Responses of several turns


@pytest.mark.parametrize("train_on_eos", [True, False])
def test_stop_tokens_end_turns_and_the_last_one_the_response(train_on_eos):
    """7 is the stop token: two turns around an observation; a turn of the stop token alone; a row that was cut off."""
    segments = [Segments() for _ in range(3)]
    segments[0].add_turn([5, 7], [-1.0, -2.0])
    segments[0].add_observation([9, 7, 9])
    segments[0].add_turn([6, 7], [-3.0, -4.0])
    segments[1].add_turn([7], [-1.0])
    segments[2].add_turn([5, 7], [-1.0, -1.0])
    segments[2].add_observation([9])
    found = Responses.from_segments([{}] * 3, segments, [7], 0, train_on_eos=train_on_eos)
    assert found.stopped.tolist() == [True, True, False]
    assert found.mask.sum(1).tolist() == [7, 1, 3]
    actions = [[1, 1, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]]
    if not train_on_eos:  # a response without any other token keeps it
        actions = [[1, 0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
    assert found.action_mask.int().tolist() == actions
    assert found.observation_mask.int().tolist() == [[0, 0, 1, 1, 1, 0, 0], [0] * 7, [0, 0, 1, 0, 0, 0, 0]]
    assert found.turn_ends() == [[1, 6], [0], [1]]
    assert found.logprobs[0].tolist() == [-1, -2, 0, 0, 0, -3, -4]

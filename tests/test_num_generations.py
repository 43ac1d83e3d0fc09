"""Several responses to each prompt: who gets which, and what stays as it is with one."""

from __future__ import annotations

import pytest
import torch
from conftest import Recorder, close, make_config, make_prompts, make_trainer

from ppo_plus import algo
from ppo_plus.data.batching import micro_batch_indices, minibatch_indices
from ppo_plus.data.seeding import derive_seed, sampling_uniforms

ANSWERS = 4


def trained(folder, **options):
    seen = Recorder()
    config = {"num_generations": ANSWERS, **options.pop("config", {})}
    trainer = make_trainer(folder, config=config, callbacks=[seen], **options)
    trainer.train()
    return trainer, seen


# Minibatches and micro-batches


@pytest.mark.parametrize(("processes", "parts"), [(1, 3), (2, 2), (4, 1)])
def test_a_minibatch_has_all_responses_to_its_prompts_however_many_processes_hold_them(processes, parts):
    position, n = {"seed": 5, "rollout_index": 3, "ppo_epoch": 1}, 12 * parts * ANSWERS
    whole = minibatch_indices(n, parts, **position, num_generations=ANSWERS)
    assert sorted(torch.cat(whole).tolist()) == list(range(n)) and {len(rows) for rows in whole} == {n // parts}
    prompts = minibatch_indices(n // ANSWERS, parts, **position)  # one response each: the same draw, over prompts
    for rows, drawn in zip(whole, prompts, strict=True):
        assert rows.tolist() == [prompt * ANSWERS + i for prompt in drawn.tolist() for i in range(ANSWERS)]
    share = n // processes
    shares = [
        minibatch_indices(share, parts, **position, process_index=p, num_generations=ANSWERS) for p in range(processes)
    ]
    for minibatch, rows in enumerate(whole):
        assert torch.equal(torch.cat([shares[p][minibatch] + p * share for p in range(processes)]), rows)
    torn = minibatch_indices(n, parts, **position)[0]  # negative control
    assert parts == 1 or len({row // ANSWERS for row in torn.tolist()}) > len(torn) // ANSWERS


@pytest.mark.parametrize(("batch_size", "together"), [(1, 1), (2, 2), (4, 4), (8, 4)])
def test_a_micro_batch_has_as_many_responses_to_a_prompt_as_fit(batch_size, together):
    lengths = torch.randint(1, 40, (32,), generator=torch.Generator().manual_seed(0))
    rows = torch.cat([torch.arange(8, 24), torch.arange(28, 32)])
    parts = micro_batch_indices(rows, lengths, batch_size, ANSWERS)
    assert sorted(torch.cat(parts).tolist()) == rows.tolist()
    assert len(parts) == -(-len(rows) // batch_size)
    for part in parts:
        assert len(part) * lengths[part].max() <= batch_size * lengths[rows].max()
        for prompt in set((part // ANSWERS).tolist()):
            assert sum(part // ANSWERS == prompt) == together


@pytest.mark.parametrize(("rows", "accumulation"), [(3, 4), (6, 2), (2, 3)])
def test_sizes_that_would_tear_a_group_apart_are_refused(rows, accumulation, tmp_path):
    assert make_config(tmp_path, num_generations=ANSWERS, per_device_train_batch_size=8).prompts_per_rollout == 8
    sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    with pytest.raises(ValueError, match=f"num_generations=4 .* per_device_train_batch_size={rows}"):
        make_config(tmp_path, num_generations=ANSWERS, **sizes)


@pytest.mark.parametrize("value", [0, -1, 2.0, None])
def test_a_number_of_responses_is_a_whole_number(value, tmp_path):
    with pytest.raises(ValueError, match=f"num_generations .* got {value}"):
        make_config(tmp_path, num_generations=value)


# Rollouts


def test_each_prompt_of_a_rollout_is_answered_by_its_own_noise(tmp_path):
    trainer, seen = trained(tmp_path, config={"max_steps": 5})
    assert len(seen.rollouts) == 2 and trainer.args.rollout_batch_size == 8
    for index, (rollout, samples) in enumerate(zip(seen.rollouts, seen.samples, strict=True)):
        prompts = samples.completions.prompts
        assert len(rollout) == 8 and prompts == [prompts[0]] * 4 + [prompts[4]] * 4 and prompts[0] != prompts[4]
        assert samples.completions.columns["wanted"][:4] == [samples.completions.columns["wanted"][0]] * 4
        assert len({tuple(ids) for ids in samples.completions.completion_ids}) == 8
        if index == 0:  # the oracle: each response alone, by the numbers of its row
            uniforms = sampling_uniforms(derive_seed(trainer.args.seed, "rollout", 0, 0), 8, 8)
            fresh = make_trainer(tmp_path / "fresh", config={"num_generations": ANSWERS})
            rows = {text: row for row, text in zip(fresh.train_dataset, fresh.train_dataset["prompt"], strict=True)}
            for row in range(8):
                alone = fresh.collector.sample([rows[prompts[row]]], uniforms[row : row + 1], {})
                assert alone.completions.completion_ids[0] == samples.completions.completion_ids[row]
    assert seen.samples[0].completions.prompts[0] not in seen.samples[1].completions.prompts


@pytest.mark.parametrize("size", [1, 3, 64])
def test_responses_do_not_depend_on_the_decode_batch(size, tmp_path):
    ids = [
        trained(tmp_path, config={"max_steps": 1, "generation_batch_size": n})[1].samples[0].completions.completion_ids
        for n in (size, 8)
    ]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(("config", "steps"), [({"max_steps": -1}, 32), ({"max_steps": -1, "total_episodes": 17}, 12)])
def test_epochs_count_prompts_and_episodes_count_responses(config, steps, tmp_path):
    """16 prompts are 8 rollouts of 2 prompts x 4 responses, of 4 steps each; 17 responses begin a third rollout."""
    trainer, seen = trained(tmp_path, config={"num_train_epochs": 1, "response_length": 2, **config})
    assert trainer.state.global_step == steps and len(seen.rollouts) == steps // 4
    answered = [prompt for samples in seen.samples for prompt in samples.completions.prompts[::ANSWERS]]
    assert len(answered) == 2 * len(seen.rollouts)
    assert steps < 32 or sorted(answered) == sorted(make_prompts()["prompt"])


def test_a_stream_gives_each_prompt_once(tmp_path):
    _, seen = trained(tmp_path, train_dataset=make_prompts().to_iterable_dataset())
    answered = [prompt for samples in seen.samples for prompt in samples.completions.prompts[::ANSWERS]]
    assert answered == make_prompts()["prompt"][:4]


def test_too_few_prompts_are_counted_as_prompts(tmp_path):
    trained(tmp_path, train_dataset=make_prompts(2), config={"max_steps": 1})
    with pytest.raises(ValueError, match="has 1 prompts, but one rollout takes 2 .* num_generations 4"):
        trained(tmp_path, train_dataset=make_prompts(1))


def test_an_evaluation_answers_each_prompt_once_and_as_ever(tmp_path):
    several, one = (
        make_trainer(tmp_path, config={"num_generations": n}, eval_dataset=make_prompts(5)) for n in (ANSWERS, 1)
    )
    found, expected = several.generate_completions(), one.generate_completions()
    assert len(found) == 5 and found.completions.completion_ids == expected.completions.completion_ids


# Leave one out


def test_a_baseline_is_the_mean_of_the_other_responses():
    """Returns 1, 2, 3, 6: the others of the first have mean 11/3; k/(k - 1) (G - mean) is 4/3 (1 - 3) = -8/3."""
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0])
    baselines = algo.leave_one_out_mean(returns, 4, torch.ones(8, dtype=torch.bool))
    close(baselines, [11 / 3, 10 / 3, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0])
    close((returns - baselines)[:4], (returns[:4] - 3) * 4 / 3)


def test_an_excluded_response_is_in_no_baseline():
    returns = torch.tensor([1.0, 2.0, torch.nan, 6.0, torch.nan, 4.0, torch.nan, torch.nan])
    close(algo.leave_one_out_mean(returns, 4, ~returns.isnan())[[0, 1, 3, 5]], [4.0, 3.5, 1.5, 0.0])


def test_the_baseline_does_not_depend_on_the_response_itself():
    """Negative control: with the response in it, it would."""
    returns = torch.randn(12, generator=torch.Generator().manual_seed(0))
    changed = returns.clone()
    changed[5] += 10
    found, other = (algo.leave_one_out_mean(x, 3, torch.ones(12, dtype=torch.bool)) for x in (returns, changed))
    assert ((found - other).abs() > 1e-4).nonzero().flatten().tolist() == [3, 4]


def answers_with_mask(env_mask):
    """A `rollout_func` that gives a group of four responses one, two, three and four letters e."""

    def rollout_func(prompts, trainer):
        ids = trainer.processing_class(prompts)["input_ids"]
        e, a = trainer.processing_class.convert_tokens_to_ids(["e", "a"])
        answers = [[e] * (1 + i % 4) + [a] * (3 - i % 4) + [2] for i in range(len(prompts))]
        logprobs = [[None] * len(answer) for answer in answers]
        masks = [env_mask] * len(prompts)
        return {"prompt_ids": ids, "completion_ids": answers, "logprobs": logprobs, "env_mask": masks}

    return rollout_func


@pytest.mark.parametrize("env_mask", [[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 1, 1, 1]])
def test_a_response_that_begins_with_an_observation_has_the_same_baseline(env_mask, tmp_path):
    """The others of the first have 2, 3 and 4 letters, so a mean of 3; those of the last have a mean of 2."""
    config = {"advantage_baseline": "rloo", "kl_coef": 0.0, "max_steps": 1}
    _, seen = trained(tmp_path, config=config, rollout_func=answers_with_mask(env_mask))
    rollout, expected = seen.rollouts[0], torch.tensor([3, 8 / 3, 7 / 3, 2] * 2)[:, None] * torch.tensor(env_mask)
    close(rollout.value_baselines, expected)


def test_without_a_critic_advantages_are_those_of_rloo(tmp_path):
    """The oracle is a slow loop; whitening is undone by comparing up to scale and shift."""
    config = {"advantage_baseline": "rloo", "lam": 1.0, "vf_coef": 0.0, "max_steps": 1, "importance_sampling_cap": None}
    _, seen = trained(tmp_path, config={**config, "kl_coef": 0.0, "missing_eos_penalty": None})
    rollout, scores = seen.rollouts[0], seen.samples[0].scores.tolist()
    assert rollout.values[rollout.action_mask].std() > 0  # the baselines; the head is at zero
    expected = torch.zeros(8, 1)
    for row in range(8):
        others = [scores[i] for i in range(row // 4 * 4, row // 4 * 4 + 4) if i != row]
        expected[row] = scores[row] - sum(others) / 3
    mask = rollout.action_mask
    expected = expected.expand(mask.shape)[mask]
    close(rollout.advantages[mask], (expected - expected.mean()) / expected.std(unbiased=False), atol=1e-4)
    assert (rollout.returns[mask] - rollout.values[mask] - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({}, "num_generations=1"),
        ({"num_generations": 2, "prefix_reward_baseline": True}, "prefix_reward_baseline=True"),
    ],
)
def test_a_baseline_without_effect_or_beside_another_is_refused(config, named, tmp_path):
    with pytest.raises(ValueError, match=f"advantage_baseline='rloo' .* {named}"):
        make_config(tmp_path, advantage_baseline="rloo", **config)

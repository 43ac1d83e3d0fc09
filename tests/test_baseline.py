"""Values that start from what the reward adapter says of prefixes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import Recorder, classifier, make_prompts, make_trainer
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ppo_plus.algo.prefix_reward_baseline import SHRINKAGE, TIME_CONSTANT, RewardBaseline
from ppo_plus.data.padding import unpad
from ppo_plus.models.actor_critic import ActorCritic
from ppo_plus.rewards import Completions


def run(folder, base, reward_adapter, resume=None, **overrides):
    """A trained run on the tiny base with its reward adapter, and what was recorded of it."""
    recorder = Recorder()
    options = {"reward_funcs": str(reward_adapter), "callbacks": [recorder], **overrides}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer = make_trainer(folder, model=model, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


# --- the line ---


def fitted(rollouts, kept=None) -> tuple[float, float]:
    """The same line by numpy, from all tokens at once: each weighted by its age, the slope then shrunk.

    `kept` is how many responses of the last rollout count for the age of those before it, if not those of its mask.
    """
    sizes = [mask.any(1).sum().item() for _, _, mask in rollouts]
    counted = [*sizes[:-1], kept or sizes[-1]]
    ages = [sum(counted[i + 1 :]) for i in range(len(sizes))]
    x = np.concatenate([scores[mask].numpy() for scores, _, mask in rollouts])
    y = np.concatenate([returns[mask].numpy() for _, returns, mask in rollouts])
    weights = np.concatenate(
        [np.full(int(m.sum()), math.exp(-a / TIME_CONSTANT)) for (_, _, m), a in zip(rollouts, ages, strict=True)]
    )
    slope, _ = np.polyfit(x, y, 1, w=np.sqrt(weights))
    responses = sum(n * math.exp(-a / TIME_CONSTANT) for n, a in zip(sizes, ages, strict=True))
    slope *= responses / (responses + SHRINKAGE)
    return slope, np.average(y, weights=weights) - slope * np.average(x, weights=weights)


def drawn(rows, seed, slope=0.7, noise=0.5):
    torch.manual_seed(seed)
    scores, lengths = torch.randn(rows, 6), torch.randint(1, 7, (rows, 1))
    return scores, slope * scores + 0.3 + noise * torch.randn(rows, 6), torch.arange(6) < lengths


def test_the_line_is_that_of_weighted_least_squares():
    baseline, rollouts = RewardBaseline(), [drawn(rows, seed) for seed, rows in enumerate((32, 8, 64))]
    for i, rollout in enumerate(rollouts):
        baseline.fit_predict(*rollout)
        assert baseline.line() == pytest.approx(fitted(rollouts[: i + 1]), rel=1e-6)
    assert 0.5 < baseline.line()[0] < 0.75


def test_each_response_has_the_line_of_all_others():
    baseline, before = RewardBaseline(), []
    for seed, rows in enumerate((12, 3)):
        scores, returns, mask = drawn(rows, seed)
        found = baseline.fit_predict(scores, returns, mask)
        for row in range(rows):
            others = mask & (torch.arange(rows) != row)[:, None]
            slope, intercept = fitted([*before, (scores, returns, others)], kept=rows)
            wanted = (slope * scores[row] + intercept) * mask[row]
            assert torch.allclose(found[row], wanted.float(), rtol=1e-5, atol=1e-6)
            slope, intercept = fitted([*before, (scores, returns, mask)])
            assert not torch.allclose(found[row], (slope * scores[row] + intercept) * mask[row], rtol=1e-5, atol=1e-6)
        before.append((scores, returns, mask))


def test_a_return_is_in_every_baseline_but_its_own():
    found = []
    for mc_returns in (0.0, 100.0):
        scores, returns, mask = drawn(8, seed=3)
        returns[5] += mc_returns
        found.append(RewardBaseline().fit_predict(scores, returns, mask))
    same = torch.isclose(*found, rtol=1e-5).all(1)
    assert same.tolist() == [row == 5 for row in range(8)]


def test_one_response_alone_is_foretold_nothing():
    scores, returns, mask = drawn(1, seed=0)
    baseline = RewardBaseline()
    assert not baseline.fit_predict(scores, returns, mask).any()
    assert baseline.fit_predict(scores, returns, mask)[mask].all()  # by the first


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_it_follows_the_scale_of_the_returns(scale):
    """Callbacks may normalize scores; the reward adapter knows nothing of that."""
    plain, scaled = RewardBaseline(), RewardBaseline()
    scores, returns, mask = drawn(64, seed=0)
    found = plain.fit_predict(scores, returns, mask)
    assert torch.allclose(scaled.fit_predict(scores, returns * scale, mask), found * scale, rtol=1e-4)
    assert scaled.line() == pytest.approx([scale * number for number in plain.line()])


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_scores_that_foretell_nothing_count_little(rows):
    slopes = []
    for seed in range(50):
        baseline = RewardBaseline()
        baseline.fit_predict(*drawn(rows, seed, slope=0.0))
        slopes.append(abs(baseline.line()[0]))
    assert np.median(slopes) < 0.1


def test_equal_scores_leave_the_mean():
    baseline = RewardBaseline()
    returns = torch.tensor([[1.0, 1.0], [2.0, 2.0], [6.0, 6.0]])
    found = baseline.fit_predict(torch.full((3, 2), 1e3), returns, torch.ones(3, 2) > 0)
    assert baseline.line() == (0.0, 3.0)
    assert torch.equal(found, torch.tensor([[4.0, 4.0], [3.5, 3.5], [1.5, 1.5]]))


def test_two_processes_with_half_the_rows_each_learn_the_same():
    scores, returns, mask = drawn(16, seed=1)
    whole, seen = RewardBaseline(), []
    found = whole.fit_predict(scores, returns, mask)
    halves = slice(0, 8), slice(8, 16)
    for half in halves:
        RewardBaseline().fit_predict(scores[half], returns[half], mask[half], lambda sums: seen.append(sums) or sums)
    for half in halves:
        one = RewardBaseline()
        part = one.fit_predict(scores[half], returns[half], mask[half], lambda _: seen[0] + seen[1])
        assert one.line() == pytest.approx(whole.line(), rel=1e-12)
        assert torch.allclose(part, found[half], rtol=1e-6)


# --- prefix scores ---


def test_they_are_what_the_reward_model_alone_says_of_each_prefix(tmp_path, base, reward_adapter):
    """One forward pass of the stand-alone model for each prefix: prompts and responses are of uneven length."""
    _, recorder = run(tmp_path, base, reward_adapter, config={"max_steps": 4, "stop_token_id": 7, "temperature": 2.0})
    alone = PeftModel.from_pretrained(classifier(base), reward_adapter).eval()
    (samples,) = recorder.samples
    lengths = samples.attention_mask[:, -samples.action_mask.shape[1] :].sum(1)
    assert len(lengths.unique()) > 1
    for ids, mask, length, found in zip(
        samples.input_ids, samples.attention_mask.bool(), lengths.tolist(), samples.prefix_scores, strict=True
    ):
        row = ids[mask]
        with torch.no_grad():
            wanted = [alone(input_ids=row[None, : len(row) - length + t]).logits[0, 0] for t in range(length)]
        assert torch.allclose(found[:length], torch.tensor(wanted), rtol=1e-4, atol=1e-5)
        assert not found[length:].any()


CHAT = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}b{% endfor %}"


@pytest.mark.parametrize("spoil", [False, True], ids=["as scored", "other tokens"])
@pytest.mark.parametrize("chat", [False, True], ids=["text", "messages"])
@pytest.mark.parametrize("stopped", [False, True], ids=["cut", "stopped"])
def test_they_cost_a_pass_only_where_the_text_has_other_tokens(tmp_path, base, reward_adapter, spoil, chat, stopped):
    trainer, _ = run(tmp_path, base, reward_adapter, config={"max_steps": 4})
    reward, tokenizer = trainer.collector.rewards.rewards[0], trainer.processing_class
    prompts, completions = ["the film ", "a "], ["was good", "b c d"]
    between = tokenizer.eos_token + "b" if chat else ""
    texts = [p + between + c + tokenizer.eos_token * stopped for p, c in zip(prompts, completions, strict=True)]
    sequences = [tokenizer(text)["input_ids"] for text in texts]
    if chat:
        tokenizer.chat_template = CHAT
        prompts = [[{"role": "user", "content": text}] for text in prompts]
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    reward(Completions(prompts, completions, [s[-3:] for s in sequences]))
    passes, inner = [], trainer.model.prefix_rewards
    trainer.model.prefix_rewards = lambda *args: passes.append(len(args[2])) or inner(*args)
    if spoil:
        sequences[1] = sequences[1][::-1]
    found = reward.prefix_scores(sequences)
    assert passes == ([1] if spoil else [])
    for sequence, scores in zip(sequences, found, strict=True):
        ids = torch.tensor([sequence])
        alone = inner(reward.name, reward.head, ids, torch.ones_like(ids))[0]
        end = len(sequence) - (stopped and sequence[-1] == tokenizer.eos_token_id)
        assert torch.allclose(scores, alone[:end], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stopped", [False, True], ids=["cut", "stopped"])
def test_prompts_that_are_token_ids_are_scored_as_they_are(tmp_path, base, reward_adapter, stopped):
    """No tokenizer would make these ids of their text, in which the special tokens are missing."""
    trainer, _ = run(tmp_path, base, reward_adapter, config={"max_steps": 4})
    reward, tokenizer = trainer.collector.rewards.rewards[0], trainer.processing_class
    eos, model = tokenizer.eos_token_id, trainer.model
    prompts, sampled = [[9, 2, 5, 9], [1, 8]], [[6, 4], [7, 11, 12]]
    completions = [ids + [eos] * stopped for ids in sampled]
    texts = [tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in (prompts, completions)]
    sequences = [torch.tensor([[*p, *c, eos]]) for p, c in zip(prompts, sampled, strict=True)]
    alone = PeftModel.from_pretrained(classifier(base), reward_adapter).eval()
    with torch.no_grad():
        wanted = [alone(input_ids=ids).logits.item() for ids in sequences]
    by_text = reward(Completions(*texts, completions))
    assert by_text != pytest.approx(wanted, rel=1e-2)  # negative control
    assert reward(Completions(*texts, completions, prompt_ids=prompts)) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    inner, model.prefix_rewards = model.prefix_rewards, None  # what follows asks nobody
    found = reward.prefix_scores([p + c for p, c in zip(prompts, completions, strict=True)])
    for ids, scores in zip(sequences, found, strict=True):
        wanted = inner(reward.name, reward.head, ids, torch.ones_like(ids))[0, :-1]
        assert torch.allclose(scores, wanted, rtol=1e-4, atol=1e-5)


def test_a_dataset_of_token_ids_is_scored_in_one_look(tmp_path, base, reward_adapter):
    dataset = Dataset.from_dict({"input_ids": [[9, 2, 5, 9], [8, 6], [1, 4, 4], [10]] * 4})
    looks, inner = [], ActorCritic.prefix_rewards

    def counted(model, name, head, input_ids, attention_mask, lengths, prefixes):
        looks.append(unpad(input_ids, attention_mask))
        return inner(model, name, head, input_ids, attention_mask, lengths, prefixes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActorCritic, "prefix_rewards", counted)
        trainer, recorder = run(tmp_path, base, reward_adapter, train_dataset=dataset, config={"max_steps": 4})
    (samples,), (look,), eos = recorder.samples, looks, trainer.processing_class.eos_token_id
    rows = unpad(samples.input_ids, samples.attention_mask)
    assert sorted(look) == sorted(ids if ids[-1] == eos else [*ids, eos] for ids in rows)


def test_several_adapters_count_by_their_weights_and_functions_not_at_all(tmp_path, base, reward_adapter):
    rewards = [str(reward_adapter), lambda completions, **kw: [1.0] * len(completions), str(reward_adapter)]
    found = []
    for weights, funcs in (([1.0], rewards[:1]), ([0.5, 7.0, 2.0], rewards)):
        config = {"max_steps": 4, "reward_weights": weights}
        found.append(run(tmp_path, base, reward_adapter, reward_funcs=funcs, config=config)[1].samples[0])
    assert torch.equal(found[0].input_ids, found[1].input_ids)
    assert torch.allclose(found[1].prefix_scores, 2.5 * found[0].prefix_scores, rtol=1e-5)


# --- values ---


def test_values_are_the_critics_and_the_line_of_other_responses(tmp_path, base, reward_adapter):
    _, recorder = run(tmp_path, base, reward_adapter, config={"max_steps": 12, "kl_coef": 0.5})
    line = RewardBaseline()
    for rollout, samples in zip(recorder.rollouts, recorder.samples, strict=True):
        # What each token's return was, by hand: the KL penalty at each token, and the score at the last.
        rewards = -0.5 * (samples.logprobs - samples.ref_logprobs) * rollout.action_mask
        rewards[torch.arange(8), rollout.action_mask.sum(1) - 1] += rollout.sequence_scores
        found = line.fit_predict(samples.prefix_scores, rewards.flip(1).cumsum(1).flip(1), rollout.action_mask)
        assert torch.allclose(rollout.value_baselines, found, atol=1e-6) and found.std() > 0
        assert torch.allclose(rollout.values, samples.values + rollout.value_baselines, atol=1e-6)


def test_the_critic_learns_what_the_baseline_lacks(tmp_path, base, reward_adapter):
    """The first loss of a rollout, before anything was learned from it, is that of the values in the rollout."""
    config = {"max_steps": 3, "num_ppo_epochs": 1, "num_mini_batches": 1, "gradient_accumulation_steps": 4,
              "cliprange_value": None}  # fmt: skip
    trainer, recorder = run(tmp_path, base, reward_adapter, config=config)
    logged = [row["ppo/value_loss"] for row in trainer.state.log_history if "ppo/value_loss" in row]
    for rollout, loss in zip(recorder.rollouts, logged, strict=True):
        wanted = 0.5 * ((rollout.values - rollout.returns)[rollout.action_mask] ** 2).mean().item()
        assert loss == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("telling", [True, False])
def test_scores_that_tell_make_values_that_foresee(tmp_path, telling):
    """The reward counts a letter; a prefix is scored by its count so far, or by numbers that mean nothing."""
    config = {"max_steps": 16, "learning_rate": 0.0, "value_head_learning_rate": 0.0, "per_device_train_batch_size": 16,
              "kl_coef": 0.0, "missing_eos_penalty": None, "logging_steps": 4}  # fmt: skip
    trainer = make_trainer(tmp_path, config=config, train_dataset=make_prompts(64))
    (letter,) = trainer.processing_class("e")["input_ids"]

    def prefix_scores(sequences):
        rows = [torch.tensor(sequence) for sequence in sequences]
        return [(row == letter).float().cumsum(0) if telling else torch.randn(len(row)) for row in rows]

    trainer.collector.rewards.prefix_scores = prefix_scores
    trainer.train()
    foreseen = [row["critic/explained_variance"] for row in trainer.state.log_history if "loss" in row]
    assert (np.mean([float(value) for value in foreseen]) > 0.1) == telling


@pytest.mark.parametrize(
    ("config", "on"),
    [({}, True), ({"critic": "detached"}, True), ({"critic": "adapter"}, False),
     ({"critic": "adapter", "prefix_reward_baseline": True}, True), ({"prefix_reward_baseline": False}, False)],
    ids=str,
)  # fmt: skip
def test_who_gets_one(tmp_path, base, reward_adapter, config, on):
    _, recorder = run(tmp_path, base, reward_adapter, config={"max_steps": 8, **config})
    assert (recorder.samples[0].prefix_scores is not None) == on
    assert bool(recorder.rollouts[1].value_baselines.any()) == on


def test_without_a_reward_adapter_there_is_none(tmp_path):
    recorder = Recorder()
    make_trainer(tmp_path, callbacks=[recorder]).train()
    assert not any(rollout.value_baselines.any() for rollout in recorder.rollouts)
    with pytest.raises(ValueError, match="prefix_reward_baseline=True reads the scores of a reward adapter"):
        make_trainer(tmp_path, config={"prefix_reward_baseline": True})


def test_evaluations_ask_for_none(tmp_path, base, reward_adapter):
    trainer, _ = run(tmp_path, base, reward_adapter, config={"max_steps": 4})
    asked, inner = [], trainer.collector.rewards.prefix_scores
    trainer.collector.rewards.prefix_scores = lambda sequences: asked.append(len(sequences)) or inner(sequences)
    trainer.evaluate(trainer.train_dataset)
    assert not asked
    trainer.train()  # negative control
    assert asked == [8]


# --- resuming ---


@pytest.mark.parametrize("forget", [False, True], ids=["whole", "negative control"])
@pytest.mark.parametrize("step", [4, 6])
def test_training_resumes_to_the_same_bits(tmp_path, base, reward_adapter, step, forget):
    config = {"save_strategy": "steps", "save_steps": 2, "max_steps": 10}
    whole, _ = run(tmp_path / "whole", base, reward_adapter, config=config)
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    if forget:
        file = checkpoint / "ppo_state_0.json"
        state = json.loads(file.read_text())
        assert state["baseline"]["responses"] > 0
        file.write_text(json.dumps(state | {"baseline": {}}))
        from ppo_plus.training.checkpoint import write_manifest

        write_manifest(checkpoint)
    resumed, _ = run(tmp_path / "resumed", base, reward_adapter, resume=str(checkpoint), config=config)
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs if a.requires_grad) != forget

"""Reward functions are asked once, before the first rollout, about answers that take no work."""

from __future__ import annotations

import asyncio
import random
import warnings

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, as_text, classifier, close, count_e, make_tokenizer, make_trainer
from datasets import Dataset

from ppo_plus.rewards.cheap_answers import CheapAnswers, mean_by_kind, pays
from ppo_plus.rollout.collector import RolloutCollector

NAN = float("nan")
FOUR = {"gradient_accumulation_steps": 1, "max_steps": 4}  # one rollout, of four prompts


class Recorder:
    """A reward function that keeps what it is called with; the score is of a completion's text."""

    __name__ = "recorder"

    def __init__(self, score=lambda text: float(text.count("e"))):
        self.score, self.calls = score, []

    def __call__(self, prompts, completions, completion_ids, **kwargs):
        self.calls.append({"prompts": prompts, "completions": completions, "ids": completion_ids, **kwargs})
        return [self.score(as_text(completion)) for completion in completions]


def pays_silence(prompts, completions, **kwargs):
    return [float(not as_text(completion)) for completion in completions]


def rows(*prompts) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts), "number": list(range(len(prompts)))})


@pytest.mark.parametrize(
    ("score", "first", "paid"),
    [
        (1.0, [0.0, 0.0, 0.0, 1.0], True),  # as much as the best answer, and most earn less
        (1.0, [1.0, 1.0, 1.0, 1.0], True),  # a format that everything has
        (0.5, [0.0, 0.0, 0.0, 1.0], True),
        (0.5, [0.0, 0.0, 1.0, 1.0], False),  # half of the answers earn more
        (0.5, [0.2, 0.6, 0.7, 0.9], False),  # the middle of a probability
        (0.0, [0.0, 0.0, 0.0, 0.0], False),  # nothing is paid for anything
        (0.0, [0.0, 0.0, 0.0, -1.0], False),  # a penalty that spares most answers
        (0.0, [-3.0, -5.0, -4.0, -9.0], True),  # a distance, and 0 where there is nothing to measure
        (-1.0, [-1.0, -1.0, -1.0, 1.0], False),  # wrong, as most answers
        (-2.0, [-3.0, -5.0, -4.0, -9.0], True),
        (0.1 + 0.2, [0.3, 0.3, 0.3, 0.3], True),  # equal up to rounding
        (0.3, [NAN, 0.3, NAN, NAN], True),
        (0.3, [NAN, 0.4, NAN, NAN], False),
        (0.3, [NAN, NAN], False),
        (NAN, [0.0, 0.0], False),
    ],
)
def test_what_counts_as_paid(score, first, paid):
    assert pays(torch.tensor(score), torch.tensor(first)) is paid


def test_a_warning_names_functions_and_values_by_their_weighted_scores():
    first = torch.tensor([[0.0, -1.0, 0.0], [0.0, -2.0, 0.0], [0.0, -3.0, 0.0], [1.0, -6.0, 0.0]])
    scores = torch.tensor([[0.0, 0.0, 0.75], [0.625, -9.0, 0.0]])

    def said(weights):
        return CheapAnswers(["right", "cost", "unused"], torch.tensor(weights), scores).warning(first)

    said_all = said([1.0, 1.0, 1.0])
    assert "'right' returns 0.625 for the prompt repeated; its mean over the first rollout is 0.25" in said_all
    assert "'cost' returns 0 for an empty answer; its mean over the first rollout is -3" in said_all
    assert "'unused' returns 0.75 for an empty answer" in said_all and "-9" not in said_all
    # A weight below 0 makes a penalty of a reward, and one of 0 makes nothing of it.
    assert "'cost' returns -9 for the prompt repeated" in said([0.0, -1.0, 0.0])
    assert "'right'" not in said([0.0, -1.0, 0.0]) and "'unused'" not in said([0.0, -1.0, 0.0])
    assert said([0.0, 0.0, 0.0]) is None


def test_means_are_over_the_prompts_that_have_a_score():
    close(mean_by_kind(torch.tensor([[1.0, NAN], [2.0, 4.0], [0.0, NAN], [5.0, NAN]])[:, :1]), [[1.5], [2.5]])
    both = mean_by_kind(torch.tensor([[1.0, NAN], [2.0, 4.0], [0.0, NAN], [5.0, NAN]]))
    assert both[0].tolist() == [1.5, 4.0] and both[1, 0] == 2.5 and both[1, 1].isnan()


def test_one_call_comes_before_the_first_rollout(tmp_path):
    reward = Recorder()
    trainer = make_trainer(
        tmp_path, reward_funcs=reward, train_dataset=rows("the film", "a cat", "go", "so it was a very long day"),
        config={**FOUR, "response_length": 12, "max_steps": 8},
    )  # fmt: skip
    assert not reward.calls  # a trainer that is only made asks nobody
    trainer.train()
    assert len(reward.calls) == 1 + 2  # 8 steps are two rollouts of 4
    first, *rollouts = reward.calls
    assert first["completions"][:4] == [""] * 4 and first["ids"][:4] == [[2]] * 4
    assert first["prompts"][:4] == first["prompts"][4:] and first["number"][:4] == first["number"][4:]
    prompts = dict(enumerate(["the film", "a cat", "go", "so it was a very long day"]))
    assert first["prompts"] == [prompts[number] for number in first["number"]]
    assert first["prompts"] == (rollouts[0]["prompts"][:4]) * 2
    for prompt, answer, ids in zip(first["prompts"][4:], first["completions"][4:], first["ids"][4:], strict=True):
        # As the policy could say it: within response_length, and with EOS where that is left.
        assert answer == prompt[:12]
        assert len(ids) == min(len(prompt) + 1, 12) and (ids[-1] == 2) is (len(prompt) < 12)


def test_scores_are_logged_once(tmp_path):
    trainer = make_trainer(
        tmp_path, reward_funcs=[Recorder(), pays_silence], train_dataset=rows("eel", "e", "see", "be"),
        config={**FOUR, "max_steps": 8},
    )  # fmt: skip
    with pytest.warns(UserWarning, match="'pays_silence' returns 1 for an empty answer; its mean .* is 0\\."):
        trainer.train()
    history = trainer.state.log_history
    by_step = {entry["step"]: entry for entry in history if "rewards/recorder/empty_answer" in entry}
    assert list(by_step) == [1]
    assert by_step[1]["rewards/recorder/empty_answer"] == 0
    assert by_step[1]["rewards/recorder/repeated_prompt"] == (2 + 1 + 2 + 1) / 4
    assert by_step[1]["rewards/pays_silence/empty_answer"] == 1
    assert by_step[1]["rewards/pays_silence/repeated_prompt"] == 0


def test_a_reward_that_pays_for_work_is_not_named(tmp_path):
    trainer = make_trainer(tmp_path, reward_funcs=Recorder(lambda text: float("u" in text)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*pays for a trivial answer.*")
        trainer.train()
    assert trainer.state.global_step == 8


def test_conversations_are_answered_by_messages(tmp_path):
    reward = Recorder()
    prompts = [[{"role": "system", "content": "be kind"}, {"role": "user", "content": text}] for text in ("hi", "go")]
    trainer = make_trainer(
        tmp_path, reward_funcs=reward, train_dataset=rows(*prompts, *prompts),
        processing_class=make_tokenizer(CHAT_TEMPLATE), config=FOUR,
    )  # fmt: skip
    trainer.train()
    first = reward.calls[0]
    assert first["completions"][:4] == [[{"role": "assistant", "content": ""}]] * 4
    for prompt, answer in zip(first["prompts"][4:], first["completions"][4:], strict=True):
        assert answer == [{"role": "assistant", "content": prompt[-1]["content"]}]


def test_prompts_of_token_ids_are_repeated_as_text(tmp_path):
    reward = Recorder()
    dataset = Dataset.from_dict({"input_ids": [[1, 4, 5, 6]] * 8})  # <bos> a b c
    make_trainer(tmp_path, reward_funcs=reward, train_dataset=dataset, config={"max_steps": 4}).train()
    assert reward.calls[0]["completions"] == [""] * 4 + ["abc"] * 4
    assert reward.calls[0]["ids"][4:] == [[4, 5, 6, 2]] * 4


def draws(prompts, completions, log_metric, log_extra, **kwargs):
    """A score at random; what it logs counts rollouts."""
    log_metric("calls", float(len(completions)))
    log_extra("drawn", [random.random() for _ in completions])
    return [random.random() + np.random.rand() + torch.rand(()).item() for _ in completions]


def test_training_is_the_same_without_the_question(tmp_path, monkeypatch):
    def weights():
        trainer = make_trainer(tmp_path, reward_funcs=draws, config={"max_steps": 4})
        trainer.train()
        calls = [entry["calls"] for entry in trainer.state.log_history if "calls" in entry]
        return calls, [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]

    calls, asked = weights()
    assert calls == [8.0]  # of the rollout's 8 answers alone
    nothing = CheapAnswers(["draws"], torch.ones(1), torch.full((2, 1), NAN))
    monkeypatch.setattr(RolloutCollector, "ask_about_cheap_answers", lambda self, rows, context: nothing)
    without = weights()
    assert without[0] == calls
    assert all(torch.equal(one, other) for one, other in zip(asked, without[1], strict=True))


def test_a_resumed_run_does_not_ask_again(tmp_path):
    first, second = Recorder(), Recorder()
    config = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, reward_funcs=first, config=config).train()
    again = make_trainer(tmp_path, reward_funcs=second, config=config)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [call["completions"][0] == "" for call in first.calls] == [True, False, False]
    assert [call["completions"] for call in second.calls] == [first.calls[2]["completions"]]


async def async_silence(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return [float(not completion) for completion in completions]


def tokens_of_prompts(prompts, completions, completion_ids, **kwargs):
    """One number a token, or nothing to say of an empty answer."""
    return [
        [0.5] * len(ids) if completion else None for completion, ids in zip(completions, completion_ids, strict=True)
    ]


def test_async_functions_token_scores_and_none(tmp_path):
    trainer = make_trainer(
        tmp_path, reward_funcs=[async_silence, tokens_of_prompts], train_dataset=rows("abc", "de", "fg", "hij"),
        config={**FOUR, "reward_timeout": 60.0},
    )  # fmt: skip
    with pytest.warns(UserWarning, match="'async_silence' returns 1 for an empty answer"):
        trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/async_silence/empty_answer"] == 1
    assert "rewards/tokens_of_prompts/empty_answer" not in logged
    assert logged["rewards/tokens_of_prompts/repeated_prompt"] == 0.5 * (4 + 3 + 3 + 4) / 4  # with EOS


def needs_text(prompts, completions, **kwargs):
    return [float(ord(completion[0])) for completion in completions]


def test_an_error_stops_training_before_anything_is_generated(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, reward_funcs=needs_text, config={"max_steps": 4})
    monkeypatch.setattr(trainer.collector, "_generate", lambda *_: pytest.fail("generated"))
    with pytest.raises(IndexError) as raised:
        trainer.train()
    assert any("needs_text" in note for note in raised.value.__notes__)
    assert any("empty, or repeat the prompt" in note for note in raised.value.__notes__)


def test_an_error_is_skipped_where_errors_are(tmp_path):
    trainer = make_trainer(
        tmp_path, reward_funcs=[needs_text, count_e], config={"max_steps": 4, "on_reward_error": "skip"}
    )
    with pytest.warns(UserWarning, match="'needs_text' is skipped"):
        trainer.train()
    assert trainer.state.global_step == 4
    logged = trainer.state.log_history[0]
    assert "rewards/needs_text/empty_answer" not in logged and logged["rewards/count_e/empty_answer"] == 0


def test_reward_models_are_not_asked(tmp_path, base, monkeypatch):
    trainer = make_trainer(tmp_path, reward_funcs=[classifier(base), count_e], config={"max_steps": 4})
    trainer.train()
    logged = trainer.state.log_history[0]
    assert {name for name in logged if name.endswith("empty_answer")} == {"rewards/count_e/empty_answer"}
    monkeypatch.setattr(RolloutCollector, "ask_about_cheap_answers", lambda *_: pytest.fail("asked"))
    make_trainer(tmp_path, reward_funcs=classifier(base), config={"max_steps": 4}).train()

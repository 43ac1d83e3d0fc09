"""The contract of rewards: one number per response or per token, async functions side by side, encoders by pairs."""

from __future__ import annotations

import asyncio
import functools
import warnings

import pytest
import torch
from conftest import CHAT_TEMPLATE, LETTERS, count_e, make_tokenizer, make_trainer
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from ppo_plus import PPOCallback, RewardNormalizationCallback
from ppo_plus.rewards import ClassifierReward, Completions, FunctionReward, RewardSet
from ppo_plus.rewards.tokenization import max_input_length

PLAIN = {"missing_eos_penalty": None, "kl_coef": 0.0, "gamma": 1.0, "lam": 1.0, "max_steps": 4}
BATCH = Completions(["p", "q", "r"], ["ab", "c", "def"], [[4, 5], [6], [7, 8, 9]])


def even_ids(completion_ids, **kwargs):
    """Reward per token: a quarter for an even id, minus one for an odd one."""
    return [[0.25 if i % 2 == 0 else -1.0 for i in ids] for ids in completion_ids]


class Keep(PPOCallback):
    """Keeps rollouts and samples."""

    def __init__(self):
        self.seen = []

    def on_rollout_end(self, args, state, control, rollout, samples, metrics, **kwargs):
        self.seen.append((rollout, samples, metrics))


def collected(tmp_path, config=None, callbacks=(), **overrides):
    keep = Keep()
    trainer = make_trainer(tmp_path, config={**PLAIN, **(config or {})}, callbacks=[*callbacks, keep], **overrides)
    trainer.train()
    return keep.seen[0]


def paid(rollout):
    """Rewards per token: with gamma = lambda = 1 the return of a token is what it and those after it were paid."""
    returns = torch.where(rollout.action_mask, rollout.returns, 0.0)
    return returns - torch.cat([returns[:, 1:], torch.zeros(len(returns), 1)], 1)


# One number per token


def test_a_reward_per_token_is_paid_at_its_token_and_a_score_at_the_last(tmp_path):
    config = {"reward_weights": [1.0, 2.0]}
    rollout, samples, metrics = collected(tmp_path, config, reward_funcs=[count_e, even_ids])
    expected, totals = torch.zeros_like(rollout.returns), []
    for row, ids in enumerate(samples.completions.completion_ids):
        for position, i in enumerate(ids):
            expected[row, position] = 2.0 * (0.25 if i % 2 == 0 else -1.0)
        totals.append(float(samples.completions.completions[row].count("e")) + expected[row].sum().item())
        expected[row, len(ids) - 1] += samples.completions.completions[row].count("e")
    assert torch.allclose(paid(rollout), expected, atol=1e-5)
    assert rollout.sequence_scores.tolist() == pytest.approx(totals)
    assert metrics["reward"] == pytest.approx(sum(totals) / len(totals))
    assert metrics["rewards/even_ids/mean"] * 2 + metrics["rewards/count_e/mean"] == pytest.approx(metrics["reward"])


def test_the_same_total_in_one_number_is_paid_at_the_end(tmp_path):
    """Negative control: where a reward is paid matters."""

    def total(**kwargs):
        return [sum(rewards) for rewards in even_ids(**kwargs)]

    per_token, _, _ = collected(tmp_path, reward_funcs=even_ids)
    in_one, _, _ = collected(tmp_path, reward_funcs=total)
    assert in_one.sequence_scores.tolist() == pytest.approx(per_token.sequence_scores.tolist())
    assert torch.allclose(in_one.returns[:, 0], per_token.returns[:, 0], atol=1e-5)
    assert (in_one.returns - per_token.returns).abs().max() > 0.1


def test_what_falls_on_a_stop_token_that_is_no_action_is_paid_at_the_last_action(tmp_path):
    rollout, samples, _ = collected(tmp_path, {"train_on_eos": False, "response_length": 40}, reward_funcs=even_ids)
    ended = [row for row, ids in enumerate(samples.completions.completion_ids) if ids[-1] == 2 and len(ids) > 1]
    assert ended
    for row in ended:
        *_, before, stop = samples.completions.completion_ids[row]
        last = int(rollout.action_mask[row].sum()) - 1
        worth = sum(0.25 if i % 2 == 0 else -1.0 for i in (before, stop))
        assert paid(rollout)[row, last].item() == pytest.approx(worth, abs=1e-5)


def test_normalization_scales_tokens_and_score_alike(tmp_path):
    rollout, samples, _ = collected(
        tmp_path, callbacks=[RewardNormalizationCallback(clip=None)], reward_funcs=[count_e, even_ids]
    )
    raw = [c.count("e") + sum(e) for c, e in zip(samples.completions.completions,
           even_ids(samples.completions.completion_ids), strict=True)]  # fmt: skip
    std = torch.tensor(raw).std(unbiased=False).item()
    mean = sum(raw) / len(raw)
    assert rollout.returns[:, 0].tolist() == pytest.approx([(x - mean) / std for x in raw], abs=1e-4)
    for row, rewards in enumerate(even_ids(samples.completions.completion_ids)):
        if len(rewards) > 1:
            assert paid(rollout)[row, 0].item() == pytest.approx(rewards[0] / std, abs=1e-4)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([[1.0, 2.0], [1.0, 2.0], 3.0], "returned 2 numbers for prompt 'q', whose completion has 1 tokens"),
        ([[1.0, float("nan")], 1.0, 3.0], r"returned \[1.0, nan\] for prompt 'p'"),
        ([1.0, ["1"], 3.0], r"returned \['1'\] for prompt 'q'"),
        ([[1.0, None], 1.0, 3.0], r"returned \[1.0, None\] for prompt 'p'"),
    ],
)
def test_a_list_that_is_not_one_number_per_token_is_named(returned, message):
    with pytest.raises(ValueError, match=message):
        FunctionReward(lambda **kwargs: returned, "mine")(BATCH)


def test_rewards_per_turn_are_paid_at_the_ends_of_their_turns():
    batch = Completions(["q", "r"], ["a", "b"], [[1] * 6, [1] * 3], turn_ends=[[1, 5], [2]])
    scores = RewardSet([FunctionReward(lambda **_: [{"turn": [0.5, 2.0]}, {"turn": (3,)}], "steps")], [2.0])(batch)
    assert scores.per_token.tolist() == [[0, 1, 0, 0, 0, 4], [0, 0, 6, 0, 0, 0]]
    assert scores.total.tolist() == [5.0, 6.0]
    one_turn = Completions(["q"], ["a"], [[1] * 4])
    scores = RewardSet([FunctionReward(lambda **_: [{"turn": [2.0]}], "steps")], None)(one_turn)
    assert scores.per_token.tolist() == [[0, 0, 0, 2]]


@pytest.mark.parametrize("returned", [{"turn": [1.0]}, {"turn": 1.0}, {"turns": [1.0, 2.0]}, {"turn": [1.0, None]}])
def test_rewards_that_are_not_one_number_per_turn_are_named(returned):
    batch = Completions(["q"], ["a"], [[1] * 6], turn_ends=[[1, 5]])
    with pytest.raises(ValueError, match="'steps' returned"):
        RewardSet([FunctionReward(lambda **_: [returned], "steps")], None)(batch)


def test_tensors_lists_numbers_and_none_mix():
    scores = RewardSet([FunctionReward(lambda **k: [torch.tensor([1.0, 2.0]), None, 4], "mixed")], [0.5])(BATCH)
    assert scores.by_function[:, 0].tolist()[::2] == [3.0, 4.0] and scores.by_function[1, 0].isnan()
    assert scores.per_token.tolist() == [[0.5, 1.0, 0.0], [0.0] * 3, [0.0] * 3]
    assert scores.total.tolist()[::2] == [1.5, 2.0] and scores.total[1].isnan()


# Async functions


def test_async_functions_run_side_by_side():
    """Each waits for the other: one after the other they would wait without end."""
    barrier = asyncio.Barrier(2)

    async def meet(number, **kwargs):
        await asyncio.wait_for(barrier.wait(), 20)
        return [number] * 3

    rewards = [FunctionReward(functools.partial(meet, float(i)), str(i)) for i in (1, 2)]
    plain = FunctionReward(lambda **kwargs: [7.0] * 3, "plain")
    scores = RewardSet([rewards[0], plain, rewards[1]], None)(BATCH)
    assert scores.by_function.tolist() == [[1.0, 7.0, 2.0]] * 3


def test_what_an_async_function_opened_serves_the_next_rollout_too():
    loops = []

    class Judge:
        async def __call__(self, **kwargs):
            loops.append(asyncio.get_running_loop())
            return [0.0] * 3

    reward = FunctionReward(Judge(), "judge")
    reward(BATCH), reward(BATCH)
    assert loops[0] is loops[1] and not loops[0].is_closed()


@pytest.mark.parametrize("moment", ["called", "awaited"])
def test_a_failing_async_function_is_named_or_left_out(moment):
    async def fails(**kwargs):
        if moment == "awaited":
            await asyncio.sleep(0)
        raise KeyError("oops")

    rewards = [FunctionReward(fails, "fails"), FunctionReward(lambda **k: [1.0, 2.0, 3.0], "plain")]
    with pytest.raises(KeyError) as error:
        RewardSet(rewards, None)(BATCH)
    assert any("'fails', called with 3 completions" in note for note in error.value.__notes__)
    with pytest.warns(UserWarning, match="'fails' is skipped in this rollout: KeyError"):
        assert RewardSet(rewards, None, "skip")(BATCH).total.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize("is_async", [True, False])
def test_a_function_that_exits_is_named_or_left_out(is_async, timeout):
    """It may run code of the policy, and a status of the policy's choice would end the run without a word."""

    def leaves(**kwargs):
        raise SystemExit(0)

    async def leaves_later(**kwargs):
        await asyncio.sleep(0)
        raise SystemExit(0)

    async def stays(**kwargs):
        return [1.0, 2.0, 3.0]

    function = leaves_later if is_async else leaves
    rewards = [FunctionReward(function, "leaves", timeout), FunctionReward(stays, "stays")]
    with pytest.raises(RuntimeError, match=r"sys\.exit\(0\)") as error:
        RewardSet(rewards, None)(BATCH)
    assert any("'leaves', called with 3 completions" in note for note in error.value.__notes__)
    with pytest.warns(UserWarning, match="'leaves' is skipped"):
        assert RewardSet(rewards, None, "skip")(BATCH).total.tolist() == [1.0, 2.0, 3.0]


# Encoders read pairs


def pair_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    """`<bos> question <eos> answer <eos>`, with token types 0 and 1."""
    backend = make_tokenizer().backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<bos>:0 $A:0 <eos>:0",
        pair="<bos>:0 $A:0 <eos>:0 $B:1 <eos>:1",
        special_tokens=[("<bos>", 1), ("<eos>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"], **kwargs,
    )  # fmt: skip


SIZES = {
    "vocab_size": 4 + len(LETTERS),
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "num_labels": 1,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}


def encoder(kind):
    torch.manual_seed(0)
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**SIZES)).eval()
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
    return DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES, **relative, type_vocab_size=0)).eval()


def reward_of(model, tokenizer, size=2):
    return ClassifierReward(model, tokenizer, "encoder", batch_size=size, chat_template_kwargs={})


@torch.no_grad()
def alone(model, **inputs):
    return model(**{name: torch.tensor([ids]) for name, ids in inputs.items()}).logits.item()


def ids(text):
    return [4 + LETTERS.index(letter) for letter in text]


@pytest.mark.parametrize("kind", ["bert", "deberta"])
def test_an_encoder_reads_question_and_answer_as_a_pair(kind):
    model = encoder(kind)
    questions, answers = ["ab", "a question?", "no"], ["cd", "x", "a longer answer"]
    found = reward_of(model, pair_tokenizer())(Completions(questions, answers, [[4]] * 3))
    for question, answer, score in zip(questions, answers, found, strict=True):
        q, a = [1, *ids(question), 2], [*ids(answer), 2]
        pair = alone(model, input_ids=q + a, token_type_ids=[0] * len(q) + [1] * len(a))
        in_one = alone(model, input_ids=[1, *ids(question + answer), 2])
        assert score == pytest.approx(pair, abs=1e-5)
        assert abs(score - in_one) > 1e-3  # negative control: as one text it is another score


def test_a_conversation_becomes_a_pair_of_texts_for_an_encoder():
    model = encoder("bert")
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "why"}]}]
    answer = [{"role": "assistant", "content": "so"}]
    found = reward_of(model, pair_tokenizer())(Completions([prompt], [answer], [[4]]))
    assert found == reward_of(model, pair_tokenizer())(Completions(["be brief\nwhy"], ["so"], [[4]]))


def test_an_encoder_with_a_chat_template_reads_its_own_rendering():
    model, tokenizer = encoder("bert"), pair_tokenizer(chat_template=CHAT_TEMPLATE)
    batch = Completions([[{"role": "user", "content": "why"}]], [[{"role": "assistant", "content": "so"}]], [[4]])
    text = tokenizer.apply_chat_template(batch.prompts[0] + batch.completions[0], tokenize=False)
    inputs = tokenizer(text, add_special_tokens=False)
    expected = alone(model, input_ids=inputs["input_ids"])
    assert reward_of(model, tokenizer)(batch) == [pytest.approx(expected, abs=1e-5)]


def test_a_pair_that_is_too_long_for_the_encoder_is_cut():
    model = encoder("bert")
    batch = Completions(["a" * 100], ["b"], [[4]])
    with pytest.warns(UserWarning, match="'encoder' is 48 tokens"):
        cut = reward_of(model, pair_tokenizer(model_max_length=48))(batch)
    assert cut == reward_of(model, pair_tokenizer())(Completions(["a" * 44], ["b"], [[4]]))


def absolute(kind, positions=32):
    """A classifier with learned positions: beyond them it fails."""
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"vocab_size": 4 + len(LETTERS), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": positions}
        return GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=1, pad_token_id=0)).eval()
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**{**SIZES, "max_position_embeddings": positions})).eval()
    config = RobertaConfig(**{**SIZES, "max_position_embeddings": positions + 1})  # its first position is padding's + 1
    return RobertaForSequenceClassification(config).eval()


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_a_text_that_is_too_long_keeps_its_first_special_token_and_its_end(kind):
    model = absolute(kind)
    template = CHAT_TEMPLATE if kind == "roberta" else None  # with a template it reads one text too
    prompt, answer = "beginning, " * 5, "a good answer."
    tokenizer = pair_tokenizer(chat_template=template)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    reward = reward_of(model, tokenizer)
    batch = Completions([prompt, "short", "b" * 15], [answer, "x", "c" * 15], [[4]] * 3)
    with pytest.warns(UserWarning, match="'encoder' is 32 tokens, but .* up to 71: the start of the prompt"):
        found = reward(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert reward(batch) == found
    expected = [1, *ids(prompt + answer)[-30:], 2]
    assert len(expected) == 32 and answer in prompt + answer
    assert found[0] == pytest.approx(alone(model, input_ids=expected), abs=1e-5)
    assert abs(found[0] - alone(model, input_ids=[1, *ids(prompt + answer)[:30], 2])) > 1e-3  # negative control
    assert found[1] == pytest.approx(alone(model, input_ids=[1, *ids("shortx"), 2]), abs=1e-5)
    assert found[2] == pytest.approx(alone(model, input_ids=[1, *ids("b" * 15 + "c" * 15), 2]), abs=1e-5)  # just fits
    reward.tokenize.max_length = None
    with pytest.raises((IndexError, RuntimeError)):  # nowhere to look a position up, or a buffer that ends
        reward(batch)


@pytest.mark.parametrize(("of_tokenizer", "most"), [(None, 32), (20, 20), (40, 32), (0, 32)])
def test_a_classifier_reads_what_its_tokenizer_says_and_no_more_than_it_has_positions_for(of_tokenizer, most):
    tokenizer = pair_tokenizer()
    if of_tokenizer is not None:
        tokenizer.model_max_length = of_tokenizer
    assert max_input_length(absolute("bert"), tokenizer) == most
    assert max_input_length(torch.nn.Linear(1, 1), tokenizer) == (of_tokenizer or None)


def test_a_pair_that_is_too_long_is_cut_also_where_the_tokenizer_knows_no_limit():
    with pytest.warns(UserWarning, match="'encoder' is 64 tokens.*the longer of the two is truncated"):
        cut = reward_of(encoder("bert"), pair_tokenizer())(Completions(["a" * 100], ["b"], [[4]]))
    assert cut == reward_of(encoder("bert"), pair_tokenizer())(Completions(["a" * 60], ["b"], [[4]]))


def test_training_against_an_encoder(tmp_path):
    trainer = make_trainer(
        tmp_path, reward_funcs=encoder("deberta"), reward_processing_classes=pair_tokenizer(), config={"max_steps": 4}
    )
    trainer.train()
    assert trainer.state.log_history[0]["rewards/DebertaV2ForSequenceClassification/std"] > 0

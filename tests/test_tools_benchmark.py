"""The benchmark of tools: its rewards and counts by hand, and a short run of each side with a tiny model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
from agents import make_tool_model, tool_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import tools

CALL = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": "2 * 3 + 1"}}}


def conversation(*turns):
    """Messages of the policy (a text, or None for a call) and of the tool (a number)."""
    messages = []
    for turn in turns:
        if isinstance(turn, int):
            messages.append({"role": "tool", "name": "calculate", "content": str(turn)})
        else:
            messages.append({"role": "assistant", "content": turn or "", **({} if turn else {"tool_calls": [CALL]})})
    return messages


@pytest.mark.parametrize(
    ("turns", "rewards"),
    [
        ((None, 7, "It is 7"), [0.5, 1.0]),
        ((None, 7, "It is 8"), [0.5, 0.0]),
        ((None, 8, "It is 7"), [0.0, 1.0]),
        (("It is 7",), [1.0]),
        ((None, 7), [0.5]),  # cut after the call: the tool's message is no answer of the policy
        ((None, 7, None, 7, "It is 7"), [0.5, 0.0, 1.0]),  # a call is paid once
    ],
)
def test_rewards_of_turns_by_hand(turns, rewards):
    assert tools.turn_rewards(conversation(*turns), 7) == rewards


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny model as a folder, whose tokenizer has the template of the benchmark."""
    folder = str(tmp_path_factory.mktemp("start") / "model")
    tool_tokenizer(tools.TEMPLATE).save_pretrained(folder)
    make_tool_model(trained=False).save_pretrained(folder)
    return folder


def test_only_tokens_of_the_policy_are_counted_and_only_of_whole_generations(start):
    tokenizer = tools.load_tokenizer(start)
    messages = conversation(None, 7, "It is 7")
    rendered = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    prompt = [{"role": "user", "content": "q"}]
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(prompt + messages, return_dict=True)["input_ids"]
    ids, sampled = whole[len(before) :], sum(rendered["assistant_masks"])
    rewards = tools.Rewards(tokenizer, per_turn=True)
    assert rewards([messages] * 2, [ids] * 2, [7] * 2) == [{"turn": [0.5, 1.0]}] * 2
    assert rewards.tokens == 0 and not rewards.curve
    rewards([messages] * tools.RESPONSES, [ids] * tools.RESPONSES, [7] * tools.RESPONSES)
    assert rewards.tokens == sampled * tools.RESPONSES < len(ids) * tools.RESPONSES
    assert rewards.curve == [{"tokens": rewards.tokens, "reward": 1.5, "right": 1.0}]
    assert tools.Rewards(tokenizer, per_turn=False)([messages], [ids], [7]) == [1.5]


def test_the_evaluation_runs_the_tool_and_reads_the_last_message(start, monkeypatch):
    """One question of two is called rightly and answered rightly, the other is answered without a call."""
    tokenizer, asked = tools.load_tokenizer(start), []
    rows = tools.make_rows(2, seed=1)
    call = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "%s"}}\n</tool_call><|im_end|>'
    turns = iter([[call % rows[0]["expression"], "no idea<|im_end|>"], [f"It is {rows[0]['answer']}<|im_end|>"]])

    def greedy(model, tokenizer, prefixes):
        asked.append([tokenizer.decode(prefix) for prefix in prefixes])
        return [tokenizer(text)["input_ids"] for text in next(turns)]

    monkeypatch.setattr(tools, "greedy", greedy)
    assert tools.evaluate(make_tool_model(trained=False), tokenizer, rows) == {"right": 0.5, "right_call": 0.5}
    assert [len(prompts) for prompts in asked] == [2, 1]
    assert f"tool\n{rows[0]['answer']}<|im_end|>" in asked[1][0]


@pytest.mark.parametrize("side", ["start", *tools.SIDES])
def test_every_side_samples_until_its_tokens_are_spent(start, side):
    args = argparse.Namespace(
        model=start, seed=0, tokens=tools.RESPONSES + 1, held_out=2, dtype="float32", learning_rate=1e-3, top_layers=1,
        temperature=1.0, warm_up_steps=0,
    )  # fmt: skip
    found = tools.run(side, args)
    if side == "start":
        assert found == {"right": 0.0, "right_call": 0.0}
        return
    assert found["steps"] == 4 * len(found["curve"]) and found["tokens"] == found["curve"][-1]["tokens"]
    assert args.tokens <= found["tokens"] <= len(found["curve"]) * tools.RESPONSES * tools.LENGTH
    assert all(point["tokens"] < args.tokens for point in found["curve"][:-1])

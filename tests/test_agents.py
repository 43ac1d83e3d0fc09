"""Turns, tools and environments: TRL's own loop is the oracle, and training on them is checked by invariants."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import re
import signal
import threading
import time
import warnings
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from agents import (
    TEMPLATE,
    add,
    add_slowly,
    call,
    make_tool_model,
    question,
    questions,
    right_sum,
    tool_tokenizer,
)
from conftest import (
    CHAT_TEMPLATE,
    Recorder,
    count_e,
    make_config,
    make_prompts,
    make_tokenizer,
    make_trainer,
    trained_weights,
)
from datasets import Dataset, Features, Json, Value
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import start_event_loop_in_daemon

from ppo_plus import PPOConfig, PPOTrainer
from ppo_plus.callbacks.completions import messages_to_text
from ppo_plus.data.tool_templates import prepare_tool_tokenizer, tool_suffix_ids
from ppo_plus.models.generation import GenerateOutput
from ppo_plus.rewards.checks import check_templates
from ppo_plus.rollout.decoding import CompletionDecoder
from ppo_plus.rollout.environments import EnvironmentPool
from ppo_plus.rollout.turns import TurnLoop, template_kwargs

R = 160  # tokens of a response


def fail(a: int, b: int) -> int:
    """Raise an error.

    Args:
        a: The first number.
        b: The second number.
    """
    raise ZeroDivisionError(f"{a} and {b}")


def repeat(text: str, times: int) -> str:
    """Repeat a text.

    Args:
        text: The text.
        times: How often.
    """
    return text * times


TOOLS = [add, add_slowly, fail, repeat]


class Script:
    """Samples what it is told: the n-th turn of a conversation is the n-th text after its question."""

    def __init__(self, tokenizer, turns: dict[str, list[str]]) -> None:
        self.tokenizer, self.turns = tokenizer, turns

    def next_turn(self, prefix: list[int]) -> list[int]:
        text = self.tokenizer.decode(prefix)
        asked = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
        return self.tokenizer(self.turns[asked][text.count("<|im_start|>assistant\n") - 1])["input_ids"]

    def generate(self, prefixes, uniforms, turn_caches=None, on_row_end=None) -> GenerateOutput:
        tokens = torch.zeros(uniforms.shape, dtype=torch.int64)
        for row, prefix in enumerate(prefixes):
            ids = self.next_turn(prefix)[: int((~uniforms[row].isnan()).sum())]
            tokens[row, : len(ids)] = torch.tensor(ids)
        return GenerateOutput(tokens, torch.full(uniforms.shape, -0.5))


def run_loop(
    tmp_path, turns, tools=TOOLS, response_length=R, context=None, factory=None, rows=None, script=Script, **config
):  # fmt: skip
    """Our loop on scripted turns."""
    tokenizer = prepare_tool_tokenizer(tool_tokenizer())
    args = make_config(tmp_path, response_length=response_length, **config)
    pool = EnvironmentPool(factory, tools)
    rows = rows or [{"prompt": [{"role": "user", "content": asked}]} for asked in turns]
    for row in rows:
        kwargs = template_kwargs(pool, args, row)
        prompt = row.get("prompt", question(0, 0))
        row["input_ids"] = tokenizer.apply_chat_template(
            prompt, tokenize=True, return_dict=True, add_generation_prompt=True, **kwargs
        )["input_ids"]
    loop = TurnLoop(pool, tokenizer, args, [tokenizer.eos_token_id], (context, len(tokenizer)))
    uniforms = torch.zeros(len(rows), response_length, dtype=torch.float64)
    return loop(rows, uniforms, script(tokenizer, turns).generate)


def run_trl(turns, tools=TOOLS, response_length=R, context=10_000, iterations=10**9):
    """TRL's loop on the same turns, without its trainer's other parts."""
    tokenizer = prepare_tool_tokenizer(tool_tokenizer())
    script, (_, async_loop, ready) = Script(tokenizer, turns), start_event_loop_in_daemon(name="oracle")
    ready.wait()
    named = {tool.__name__: tool for tool in tools}
    is_async = inspect.iscoroutinefunction
    trainer = SimpleNamespace(
        processing_class=tokenizer, _tokenizer=tokenizer, chat_template=None, chat_template_kwargs={}, _is_vlm=False,
        max_completion_length=response_length, max_tool_calling_iterations=iterations, use_vllm=False, tools=tools,
        model=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=context)), environment_factories=None,
        _sync_tool_dicts=[{n: t for n, t in named.items() if not is_async(t)}] * len(turns),
        _async_tool_dicts=[{n: t for n, t in named.items() if is_async(t)}] * len(turns), async_loop=async_loop,
        _generate_single_turn=lambda ids, *_, **__: ([script.next_turn(p)[:response_length] for p in ids], None),
    )  # fmt: skip
    trainer._get_tool_suffix_ids = lambda messages: GRPOTrainer._get_tool_suffix_ids(trainer, messages)
    prompts = [[{"role": "user", "content": asked}] for asked in turns]
    prompt_ids = tokenizer.apply_chat_template(
        prompts, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    completion_ids = [script.next_turn(ids)[:response_length] for ids in prompt_ids]
    from trl.chat_template_utils import parse_response

    completions = [
        [parse_response(tokenizer, c, prefix=p, tools=tools)] for c, p in zip(completion_ids, prompt_ids, strict=True)
    ]
    mask, completions, ids, _, calls, failures, _ = GRPOTrainer._tool_call_loop(
        trainer, prompts, prompt_ids, completion_ids, completions, None, [None] * len(turns), {}
    )
    return mask, completions, ids, calls, failures


def suffix_of(text: str) -> str:
    return f"\n<|im_start|>tool\n{text}<|im_end|>\n<|im_start|>assistant\n"


END = "<|im_end|>"
TURNS = {
    "nothing": ["hello" + END],
    "one": [call(1, 2), "it is 3" + END],
    "two": [call(1, 2), call(3, 4), "ok" + END],
    "both": [call(1, 2, "add_slowly").removesuffix(END) + call(3, 4), "3 and 7" + END],
    "unknown": [call(1, 2, "divide"), "none" + END],
    "raises": [call(1, 2, "fail"), "hm" + END],
    "arguments": ['<tool_call>\n{"name": "add", "arguments": {"c": 1}}\n</tool_call>' + END, "hm" + END],
    "malformed": ['<tool_call>\n{"name": "add"\n</tool_call>' + END],
    "endless": [call(1, 2)] * 9,
    "cut": ["x" * 300],
    "long": ['<tool_call>\n{"name": "repeat", "arguments": {"text": "ab", "times": 100}}\n</tool_call>' + END],
}


@pytest.mark.parametrize("options", [{}, {"iterations": 1}, {"iterations": 0}, {"context": 150}], ids=str)
def test_the_loop_does_what_trls_loop_does(tmp_path, options):
    config = {"max_tool_calling_iterations": options["iterations"]} if "iterations" in options else {}
    ours = run_loop(tmp_path, TURNS, context=options.get("context"), **config)
    mask, completions, ids, calls, failures = run_trl(TURNS, **options)
    assert ours.messages == completions
    for row, name in enumerate(TURNS):
        assert ours.tokens[row][ours.mask[row]].tolist() == ids[row], name
        assert ours.action_mask[row][ours.mask[row]].int().tolist() == mask[row], name
    assert ours.tool_counts.sum(0).tolist() == [calls, failures]
    assert calls > 0 or "iterations" in options


def test_a_result_that_fills_the_response_ends_it(tmp_path):
    """One token less, and the result is rolled back."""
    tokenizer = tool_tokenizer()
    filled = len(tokenizer(call(1, 2) + suffix_of("3"))["input_ids"])
    for length, messages, stopped in ((filled, 2, False), (filled - 1, 1, True)):
        turns = {"one": TURNS["one"]}
        ours = run_loop(tmp_path, turns, response_length=length)
        _, completions, ids, *_ = run_trl(turns, response_length=length)
        assert ours.messages == completions
        assert ours.tokens[0][ours.mask[0]].tolist() == ids[0]
        assert (len(ours.messages[0]), bool(ours.stopped[0])) == (messages, stopped)


def test_a_megabyte_is_rolled_back_without_being_tokenized(tmp_path, monkeypatch):
    turns = {"big": [call(1, 2, "big")]}

    def big(a: int, b: int) -> str:
        """Return ten megabytes.

        Args:
            a: A number.
            b: A number.
        """
        return "x" * 10_000_000

    found = run_loop(tmp_path, turns, tools=[big])
    assert [m["role"] for m in found.messages[0]] == ["assistant"]
    assert found.observation_mask is None and found.tool_counts.tolist() == [[1, 0]]


class NoText:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("result", "content", "failures"),
    [
        (NoText(), "{'error': 'no text'}", 1),
        ("a\udc80b", "a?b", 0),
        ([{"type": "text", "text": "a\udc80b"}], [{"type": "text", "text": "a?b"}], 0),
        (ValueError("a\udc80b"), r"{'error': 'a\udc80b'}", 1),
        (None, "None", 0),
    ],
)
def test_results_without_text_or_that_no_tokenizer_encodes_are_answers(tmp_path, result, content, failures):
    def get(a: int, b: int) -> str:
        """Return the result.

        Args:
            a: A number.
            b: A number.
        """
        if isinstance(result, Exception):
            raise result
        return result

    found = run_loop(tmp_path, {"get": [call(1, 2, "get"), "ok" + END]}, tools=[get])
    assert found.messages[0][1]["content"] == content and found.tool_counts.tolist() == [[1, failures]]


def test_signature_and_defaults_are_trls():
    ours, trls = (inspect.signature(cls.__init__).parameters for cls in (PPOTrainer, GRPOTrainer))
    names = list(trls)
    assert list(ours)[: len(names)] == names
    for name in ("tools", "rollout_func", "environment_factory"):
        assert (ours[name].default, ours[name].kind) == (trls[name].default, trls[name].kind)
    fields = {field.name: field for field in dataclasses.fields(GRPOConfig)}
    found = {field.name: field for field in dataclasses.fields(PPOConfig)}
    assert found["max_tool_calling_iterations"].default is fields["max_tool_calling_iterations"].default is None


# Ids are concatenated


def test_tokens_are_never_tokenized_again(tmp_path):
    """The policy wrote `add` as three tokens, where the tokenizer has one; another merges the seam of two turns."""
    tokenizer = tool_tokenizer()
    written = tokenizer(call(1, 2))["input_ids"]
    tokenizer.add_tokens(["add", "\n3"])
    prepared = prepare_tool_tokenizer(tokenizer)
    suffix = tool_suffix_ids([{"role": "tool", "name": "add", "content": "3"}], prepared, {})
    args, pool = make_config(tmp_path, response_length=R), EnvironmentPool(None, [add])
    loop = TurnLoop(pool, prepared, args, [2], (None, len(tokenizer)))
    turns = iter([written, tokenizer("3" + END)["input_ids"]])

    def generate(prefixes, uniforms, turn_caches=None, on_row_end=None):
        ids = torch.tensor([next(turns)])
        return GenerateOutput(ids, torch.zeros(ids.shape))

    ids = prepared.apply_chat_template(question(1, 2), add_generation_prompt=True, return_dict=True)["input_ids"]
    row = {"prompt": question(1, 2), "input_ids": ids}
    found = loop([row], torch.zeros(1, R, dtype=torch.float64), generate)
    ids = found.tokens[0].tolist()
    assert ids == written + suffix + tokenizer("3" + END)["input_ids"]
    assert len(tokenizer(tokenizer.decode(ids))["input_ids"]) == len(ids) - 2 - 1  # the control
    assert found.action_mask[0].tolist() == [True] * len(written) + [False] * len(suffix) + [True] * 2


FORGETFUL = TEMPLATE.replace("{{ m.content }}", "{% if loop.last %}thought {% endif %}{{ m.content }}")


def test_a_template_that_changes_earlier_turns_is_refused():
    with pytest.raises(ValueError, match=r"answer follows.*processing_class.chat_template"):
        prepare_tool_tokenizer(tool_tokenizer(FORGETFUL))


def test_a_known_template_that_changes_earlier_turns_is_replaced_by_trls():
    from trl.chat_template_utils import is_chat_template_prefix_preserving, qwen3_chat_template

    tokenizer = tool_tokenizer(qwen3_chat_template, response_template=None)
    assert not is_chat_template_prefix_preserving(tokenizer)  # the control
    with pytest.warns(UserWarning, match="training template"):
        prepared = prepare_tool_tokenizer(tokenizer)
    assert is_chat_template_prefix_preserving(prepared)
    assert tokenizer.chat_template == qwen3_chat_template and prepared.response_template is not None


# Time


def hang(a: int, b: int) -> int:
    """Wait.

    Args:
        a: A number.
        b: A number.
    """
    time.sleep(5)
    return 0


async def hang_slowly(a: int, b: int) -> int:
    """Wait.

    Args:
        a: A number.
        b: A number.
    """
    await asyncio.sleep(5)
    return 0


@pytest.mark.parametrize("tool", [hang, hang_slowly])
def test_a_tool_that_hangs_is_answered_by_an_error(tmp_path, tool):
    turns = {"wait": [call(1, 2, tool.__name__), "late" + END]}
    found = run_loop(tmp_path, turns, tools=[tool], tool_timeout=0.05)
    assert "0.05 seconds" in found.messages[0][1]["content"]
    assert found.messages[0][2]["content"] == "late"
    assert found.tool_counts.tolist() == [[1, 1]]


def leave(a: int, b: int) -> int:
    """End the process, as code that a model wrote may do.

    Args:
        a: A number.
        b: A number.
    """
    raise SystemExit(a)


async def leave_slowly(a: int, b: int) -> int:
    """End the process, in the event loop.

    Args:
        a: A number.
        b: A number.
    """
    await asyncio.sleep(0)
    raise SystemExit(a)


@pytest.mark.parametrize("timeout", [None, 5.0])
@pytest.mark.parametrize("tool", [leave, leave_slowly])
def test_a_tool_that_exits_is_answered_by_an_error(tmp_path, tool, timeout):
    turns = {"go": [call(3, 2, tool.__name__), call(1, 2, "add_slowly"), "on" + END]}
    found = run_loop(tmp_path, turns, tools=[tool, add_slowly], response_length=2 * R, tool_timeout=timeout)
    assert "sys.exit(3)" in found.messages[0][1]["content"]
    assert [m["content"] for m in found.messages[0][3:]] == ["3", "on"]  # the event loop still runs
    assert found.tool_counts.tolist() == [[2, 1]]


# What reward models read


def test_arguments_of_a_rows_template_hold_after_the_answer_of_a_tool(tmp_path):
    quiet = TEMPLATE.replace("assistant\n{% endif %}", "assistant\n{% if quiet %}hush{% endif %}{% endif %}")
    tokenizer = prepare_tool_tokenizer(tool_tokenizer(quiet))
    args, pool = make_config(tmp_path, response_length=R), EnvironmentPool(None, [add])
    loop = TurnLoop(pool, tokenizer, args, [2], (None, len(tokenizer)))
    rows = [
        {"prompt": question(1, 2), "input_ids": tokenizer("<|im_start|>user\n1+2<|im_end|>\n<|im_start|>assistant\n")
         ["input_ids"], **({"chat_template_kwargs": {"quiet": True}} if i else {})} for i in range(2)
    ]  # fmt: skip
    script = Script(tokenizer, {"1+2": [call(1, 2), "3" + END]})
    found = loop(rows, torch.zeros(2, R, dtype=torch.float64), script.generate)
    texts = [tokenizer.decode(ids[mask]) for ids, mask in zip(found.tokens, found.mask, strict=True)]
    assert texts[0].endswith("<|im_start|>assistant\n3<|im_end|>")
    assert texts[1].endswith("<|im_start|>assistant\nhush3<|im_end|>")


def test_a_reward_model_reads_the_tools_that_the_policy_read(tmp_path):
    found = run_loop(tmp_path, {"1+2": [call(1, 2), "3" + END]}, tools=[add])
    tokenizer = tool_tokenizer()
    completions = CompletionDecoder(tokenizer, make_config(tmp_path), [2]).decode(found, {})[0]
    (text,) = completions.texts(tokenizer, {})
    read = [*found.rows[0]["input_ids"], *found.tokens[0][found.mask[0]].tolist()]
    assert text.strip() == tokenizer.decode(read)  # from the system message with the tools to the last EOS


ONLY_TWO_ROLES = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "error", "warned"),
    [
        (ONLY_TWO_ROLES + "{{ m.content }}{% endfor %}", "train_dataset[0]: the reward model 'judge'", False),
        (CHAT_TEMPLATE, None, True),
        (TEMPLATE, None, False),
    ],
    ids=["refuses tools", "content alone", "has tools"],
)
def test_a_reward_models_template_is_tried_with_a_tool_call(template, error, warned):
    judge = torch.nn.Linear(1, 1)
    judge.__name__ = "judge"
    judge.config = SimpleNamespace(_name_or_path="judge")
    rows, pool = {"train_dataset": questions(2)}, EnvironmentPool(None, [add])
    arguments = ([judge], [tool_tokenizer(template)], tool_tokenizer(), rows, {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_templates(*arguments)  # without tools, each of them renders the conversation
        assert not caught
        if error:
            with pytest.raises(ValueError, match=re.escape(error)):
                check_templates(*arguments, lambda row: pool.schemas[None])
        else:
            check_templates(*arguments, lambda row: pool.schemas[None])
    assert any("leaves out tool calls" in str(w.message) for w in caught) == warned


def test_async_tools_of_all_responses_run_side_by_side(tmp_path):
    together, most = [], []

    async def meet(a: int, b: int) -> int:
        """Wait for the others.

        Args:
            a: A number.
            b: A number.
        """
        together.append(a)
        await asyncio.sleep(0.05)
        most.append(len(together))
        together.remove(a)
        return a

    turns = {str(i): [call(i, 0, "meet"), "met" + END] for i in range(4)}
    found = run_loop(tmp_path, turns, tools=[meet])
    assert max(most) == 4
    assert [m[1]["content"] for m in found.messages] == ["0", "1", "2", "3"]


class Uneven(Script):
    """The first response of a turn ends, and the others only after the event `go_on`, or `patience` in seconds."""

    go_on, patience = threading.Event(), 60.0
    waited: ClassVar[list[bool]] = []  # whether the event came in time, by turn; empty where nobody asked for ends
    first_text: str | None = None  # what the first response seems to be when it ends, if a lower batch size changes it

    def generate(self, prefixes, uniforms, turn_caches=None, on_row_end=None):
        output = super().generate(prefixes, uniforms)
        if on_row_end is not None:
            ids = self.next_turn(prefixes[0])
            if self.first_text is not None:
                ids = self.tokenizer(self.first_text)["input_ids"]
            on_row_end(0, torch.tensor(ids))
            self.waited.append(self.go_on.wait(self.patience))
        return output


@pytest.fixture
def uneven():
    Uneven.go_on.clear()
    Uneven.waited.clear()
    return Uneven


async def note(a: int, b: int) -> int:
    """Let the other responses go on.

    Args:
        a: A number.
        b: A number.
    """
    Uneven.go_on.set()
    return a


def test_async_tools_run_while_other_responses_are_decoded(tmp_path, uneven):
    turns = {str(i): [call(i, 0, "note"), "noted" + END] for i in range(2)}
    found = run_loop(tmp_path, turns, tools=[note], script=uneven)
    assert uneven.waited == [True, True]
    assert [m[1]["content"] for m in found.messages] == ["0", "1"]
    assert found.tool_counts.tolist() == [[1, 0]] * 2  # each was called once


def test_a_turn_that_calls_a_sync_tool_too_is_waited_for(tmp_path, uneven, monkeypatch):
    """The control: the async tool may rely on what the sync one did."""
    monkeypatch.setattr(uneven, "patience", 0.1)
    turns = {str(i): [call(i, 0)[: -len(END)] + call(i, 0, "note"), "noted" + END] for i in range(2)}
    found = run_loop(tmp_path, turns, tools=[add, note], script=uneven)
    assert uneven.waited == [False, True]
    assert found.tool_counts.tolist() == [[2, 0]] * 2
    found = run_loop(tmp_path, {str(i): [call(i, 0), "sum" + END] for i in range(2)}, tools=[add], script=uneven)
    assert len(uneven.waited) == 2 and found.messages[1][1]["content"] == "1"  # without async tools nobody asks


def test_a_turn_after_the_last_call_starts_no_tool(tmp_path, uneven):
    turns = {str(i): [call(i, 0, "note")] for i in range(2)}
    found = run_loop(tmp_path, turns, tools=[note], script=uneven, max_tool_calling_iterations=0)
    assert not uneven.waited and not uneven.go_on.is_set() and found.tool_counts.tolist() == [[0, 0]] * 2


def test_a_call_that_a_lower_batch_size_changed_is_made_again(tmp_path, uneven, monkeypatch):
    monkeypatch.setattr(uneven, "first_text", call(7, 0, "note"))
    found = run_loop(tmp_path, {"0": [call(3, 0, "note"), "noted" + END]}, tools=[note], script=uneven)
    assert found.messages[0][1]["content"] == "3" and found.tool_counts.tolist() == [[1, 0]]


def test_ends_of_responses_are_reported_as_they_happen(tmp_path):
    model, events = make_trainer(tmp_path).model, []
    ids = torch.tensor([[5, 6, 7]]).expand(6, -1)
    uniforms = torch.rand(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    uniforms[2, 4:] = torch.nan
    stops = list(range(0, len(make_tokenizer()), 7))
    output = model.sample(
        ids, torch.ones_like(ids), uniforms, stop_ids=stops, pad_token_id=1,
        on_step=events.append, on_row_end=lambda row, tokens: events.append((row, tokens.tolist())),
    )  # fmt: skip
    ended = dict(event for event in events if isinstance(event, tuple))
    steps = {row: sum(isinstance(e, int) for e in events[: events.index((row, ids))]) for row, ids in ended.items()}
    assert ended and {row: len(ids) for row, ids in ended.items()} == steps
    for row, tokens in ended.items():
        assert output.tokens[row].tolist() == tokens + [1] * (output.tokens.shape[1] - len(tokens))
        assert tokens[-1] in stops or (row == 2 and len(tokens) == 4)
    assert len(set(steps.values())) > 1  # the control: they did not all end together


# Environments


class Counter:
    """Counts from a start; its reward is the count."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.count = 0

    def reset(self, start: int = 0, **row) -> str | None:
        self.count = self.start = start
        return f"from {start}" if start else None

    def increase(self, by: int) -> int:
        """Increase the count.

        Args:
            by: How much.
        """
        self.count += by
        return self.count

    def get_reward(self) -> float:
        return float(self.count)


class Silent:
    """Has no reward of its own."""

    def reset(self, **row) -> list:
        assert "environment" not in row
        return [{"type": "text", "text": "quiet"}]

    def listen(self) -> str:
        """Listen."""
        return "nothing"


def increase(by: int) -> str:
    return f'<tool_call>\n{{"name": "increase", "arguments": {{"by": {by}}}}}\n</tool_call>' + END


def test_each_response_has_an_environment_and_instances_are_pooled(tmp_path):
    Counter.made = 0
    turns = {"count": [increase(1), "1" + END], "from 3": [increase(2), increase(2), "7" + END]}
    rows = [
        {"prompt": [{"role": "user", "content": "count"}]},
        {"prompt": [{"role": "user", "content": ""}], "start": 3},
    ]
    tokenizer = prepare_tool_tokenizer(tool_tokenizer())
    args, pool = make_config(tmp_path, response_length=R), EnvironmentPool(Counter)
    loop = TurnLoop(pool, tokenizer, args, [2], (None, len(tokenizer)))
    for _ in range(2):  # a second rollout uses the same instances
        found = loop([dict(r) for r in rows], torch.zeros(2, R, dtype=torch.float64), Script(tokenizer, turns).generate)
        assert [e.count for e in found.environments] == [1, 7]
        assert Counter.made == 2
    assert found.rows[1]["prompt"] == [{"role": "user", "content": "from 3"}]
    assert "from 3" in tokenizer.decode(found.rows[1]["input_ids"])
    assert [m["content"] for m in found.messages[1]] == ["", "5", "", "7", "7"]


def test_a_dict_routes_rows_by_the_column_environment(tmp_path):
    turns = {"a": [increase(4), "4" + END], "bquiet": ["sh" + END]}
    rows = [
        {"prompt": [{"role": "user", "content": c}], "environment": e} for c, e in (("a", "counter"), ("b", "silent"))
    ]
    factory = {"counter": Counter, "silent": Silent}
    found = run_loop(tmp_path, turns, tools=[], factory=factory, rows=rows)
    assert [type(e) for e in found.environments] == [Counter, Silent]
    prompts = [tool_tokenizer().decode(row["input_ids"]) for row in found.rows]
    assert ["increase" in prompt for prompt in prompts] == [True, False]
    assert ["listen" in prompt for prompt in prompts] == [False, True]
    (own,) = EnvironmentPool(factory).rewards()
    assert (own.__name__, own(environments=found.environments)) == ("Counter", [4.0, None])


# Training


def tool_trainer(tmp_path, config=None, **overrides) -> PPOTrainer:
    defaults = {
        "model": make_tool_model(), "processing_class": tool_tokenizer(), "train_dataset": questions(),
        "tools": [add], "reward_funcs": right_sum,
        "config": {"response_length": 120, "temperature": 0.5, "learning_rate": 1e-3, "max_steps": 4, **(config or {})},
    }  # fmt: skip
    return make_trainer(tmp_path, **{**defaults, **overrides})


def record(trainer):
    trainer.add_callback(recorder := Recorder())
    return recorder


def test_training_with_a_tool(tmp_path):
    trainer = tool_trainer(tmp_path)
    kept = record(trainer)
    trainer.train()
    rollout, samples, metrics = kept.rollouts[0], kept.samples[0], kept.metrics[0]
    observed = rollout.observation_mask
    assert observed.any(1).all() and not (observed & rollout.action_mask).any()
    for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns"):
        assert not getattr(rollout, name)[observed].any()
    for messages in samples.completions.completions:
        assert [m["role"] for m in messages] == ["assistant", "tool", "assistant"]
        assert messages[0]["tool_calls"][0]["function"]["name"] == "add"
    # The answer of the tool is the sum of the arguments that the policy wrote.
    for messages in samples.completions.completions:
        arguments = messages[0]["tool_calls"][0]["function"]["arguments"]
        assert messages[1]["content"] == str(sum(arguments.values()))
    assert metrics["tools/call_frequency"] == 1 and metrics["tools/failure_frequency"] == 0
    assert metrics["completions/mean_length"] == rollout.action_mask.sum(1).float().mean().item()
    assert metrics["num_tokens"] == (rollout.attention_mask.sum() - observed.sum()).item()
    assert metrics["sampling/logp_difference"] < 1e-5  # decoding turn by turn gives what one pass over all turns gives
    assert trainer.state.log_history[0]["ppo/initial_ratio_error"] < 1e-6
    assert metrics["completions/clipped_ratio"] == 0


def test_the_log_probabilities_of_actions_are_those_of_one_plain_pass(tmp_path):
    trainer = tool_trainer(tmp_path)
    kept = record(trainer)
    trainer.train()
    rollout, model = kept.rollouts[0], make_tool_model().eval()
    for row in range(len(rollout)):
        ids = rollout.input_ids[row][rollout.attention_mask[row] == 1]
        with torch.no_grad():
            logprobs = (model(ids[None]).logits[0, :-1] / 0.5).log_softmax(-1)
        plain = logprobs[torch.arange(len(ids) - 1), ids[1:]]
        length = int(rollout.attention_mask[row, rollout.prompt_length :].sum())
        expected = torch.where(rollout.observation_mask[row, :length], 0.0, plain[-length:])
        torch.testing.assert_close(rollout.logprobs[row, :length], expected, rtol=1e-4, atol=1e-4)


def test_an_observation_that_differs_changes_no_loss_term_of_its_own(tmp_path):
    """The loss is a sum over actions alone: what stands in the columns of an observation does not matter."""
    trainer = tool_trainer(tmp_path)
    kept = record(trainer)
    trainer.train()
    batch = trainer._prepare_inputs(kept.rollouts[0].micro_batch(torch.arange(4)))
    observed = ~batch["response_mask"]
    loss = trainer.compute_loss(trainer.model, batch)
    for name in ("logprobs", "values", "advantages", "returns", "ref_logprobs"):
        batch[name] = batch[name].masked_fill(observed, 7.0)
    assert torch.equal(trainer.compute_loss(trainer.model, batch), loss)
    batch["advantages"] = batch["advantages"].masked_fill(batch["response_mask"], 7.0)  # the control
    assert not torch.equal(trainer.compute_loss(trainer.model, batch), loss)


def test_rewards_per_turn_reach_their_turns(tmp_path):
    def steps(completions, **kwargs):
        return [{"turn": [1.0] * sum(m["role"] == "assistant" for m in c)} for c in completions]

    trainer = tool_trainer(tmp_path, reward_funcs=steps, config={"gamma": 1.0, "lam": 1.0, "kl_coef": 0.0})
    kept = record(trainer)
    trainer.train()
    rollout = kept.rollouts[0]
    for row in range(len(rollout)):
        returns = rollout.returns[row][rollout.action_mask[row]]
        first_turn = int(rollout.observation_mask[row].int().argmax())
        assert returns[:first_turn].tolist() == pytest.approx([2.0] * first_turn, abs=1e-5)
        assert returns[first_turn:].tolist() == pytest.approx([1.0] * (len(returns) - first_turn), abs=1e-5)


def test_a_kept_cache_gives_what_a_second_reading_gives(tmp_path, monkeypatch):
    """The same tokens and log-probabilities; later turns feed the call's last token and the tool's answer alone."""
    found, fed = [], []
    for keeps in (True, False):
        trainer = tool_trainer(tmp_path / str(keeps), config={"max_steps": 1})
        if not keeps:
            monkeypatch.setattr("ppo_plus.models.generation.keep_row", lambda *_: None)
        kept, run, widths = record(trainer), trainer.model.runner.run, []
        monkeypatch.setattr(
            trainer.model.runner, "run", lambda model, ids, *a, run=run, widths=widths, **k: (
                widths.append(ids.shape[1]) if k.get("use_cache") else None, run(model, ids, *a, **k))[1]
        )  # fmt: skip
        trainer.train()
        found.append(kept.samples[0])
        fed.append([width for width in widths if width > 1])
    assert torch.equal(found[0].input_ids, found[1].input_ids)
    torch.testing.assert_close(found[0].sampled_logprobs, found[1].sampled_logprobs, rtol=1e-4, atol=1e-4)
    suffix = len(tool_tokenizer()(suffix_of("7"))["input_ids"])
    assert max(fed[0][1:]) == 1 + suffix < min(fed[1])
    assert found[0].observation_mask.any(1).all()


class Asks:
    """Writes the question, and rewards the right sum in the last message of the policy."""

    def reset(self, **row) -> str:
        return "2+5"

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        self.result = a + b
        return self.result

    def get_reward(self) -> float:
        return float(self.result)


def test_training_without_a_dataset_on_an_environment_that_owns_prompt_and_reward(tmp_path):
    trainer = tool_trainer(
        tmp_path, tools=None, train_dataset=None, reward_funcs=None, environment_factory=Asks,
        eval_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": ""}]}] * 2),
    )  # fmt: skip
    kept = record(trainer)
    trainer.train()
    assert trainer.collector.rewards.names == ["Asks"]
    prompts = {p[-1]["content"] for p in kept.samples[0].completions.prompts}
    assert prompts == {"2+5"}
    assert kept.samples[0].scores.tolist() == [e.result for e in kept.samples[0].completions.context["environments"]]
    assert "eval_rewards/Asks/mean" in trainer.evaluate()


@pytest.mark.parametrize("step", [1, 2])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, step):
    """Inside a rollout, whose observations are in the checkpoint, and between two."""
    config = {"max_steps": 4, "num_ppo_epochs": 1, "num_mini_batches": 2, "save_steps": step, "save_strategy": "steps"}
    arguments = {"config": config, "environment_factory": None}
    whole = tool_trainer(tmp_path / "whole", **arguments)
    whole.train()
    resumed = tool_trainer(tmp_path / "whole", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    expected, found = trained_weights(whole), trained_weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    start = trained_weights(tool_trainer(tmp_path / "start", **arguments))
    assert any(not torch.equal(start[name], found[name]) for name in found)  # the control


class SignalInTool:
    """A tool that sends SIGTERM at one of its calls."""

    def __init__(self, at: int) -> None:
        self.calls, self.at = 0, at

    def tool(self):
        def add(a: int, b: int) -> int:
            """Add two numbers.

            Args:
                a: The first number.
                b: The second number.
            """
            self.calls += 1
            if self.calls == self.at:
                signal.raise_signal(signal.SIGTERM)
            return a + b

        return add


def test_a_run_killed_inside_a_turn_resumes_to_the_same_bits(tmp_path):
    """The signal comes in a tool call of the second rollout, which the resumed run repeats."""
    config = {"max_steps": 4, "num_ppo_epochs": 1, "num_mini_batches": 2, "save_strategy": "steps", "save_steps": 100}
    whole = tool_trainer(tmp_path / "whole", config=config)
    whole.train()
    interrupted = tool_trainer(tmp_path / "cut", config=config, tools=[SignalInTool(at=8 + 3).tool()])
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # the process goes on
    try:
        interrupted.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert interrupted.state.global_step == 2
    resumed = tool_trainer(tmp_path / "cut", config=config)
    resumed.train(resume_from_checkpoint=True)
    expected, found = trained_weights(whole), trained_weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(not torch.equal(trained_weights(interrupted)[name], found[name]) for name in found)  # the control


def test_tool_calls_are_lines_of_the_tables():
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    messages = [
        {"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "name": "add", "content": "3"}
    ]  # fmt: skip
    assert messages_to_text(messages) == "assistant: \nassistant calls add: {'a': 1}\ntool: 3"


# rollout_func


def answer_xyz(prompts, trainer):
    """Two tokens of the model, one of an environment, EOS; the second response is shorter."""
    tokenizer, rows = trainer.processing_class, range(len(prompts))
    return {
        "prompt_ids": [tokenizer(p)["input_ids"] for p in prompts],
        "completion_ids": [[5, 6, 7, 2] if i % 2 == 0 else [8, 2] for i in rows],
        "logprobs": [[-9.0, None, 0.0, -4.0] if i % 2 == 0 else [-3.0, -4.0] for i in rows],
        "env_mask": [[1, 1, 0, 1] if i % 2 == 0 else [1, 1] for i in rows],
        "bonus": [float(i) for i in rows],
        "run": "one",
    }


def test_rollout_func_generates_and_its_log_probabilities_weigh(tmp_path):
    seen = {}

    def reward(completions, bonus, run, wanted, **kwargs):
        seen.update(completions=completions, bonus=bonus, run=run, wanted=wanted)
        return bonus

    trainer = make_trainer(
        tmp_path, rollout_func=answer_xyz, reward_funcs=reward, config={"kl_coef": 0.0, "max_steps": 4}
    )
    kept = record(trainer)
    trainer.train()
    rollout, samples = kept.rollouts[0], kept.samples[0]
    assert seen["bonus"] == list(range(8)) and seen["run"] == ["one"] * 8 and len(seen["wanted"]) == 8
    assert rollout.action_mask[:2].tolist() == [[True, True, False, True], [True, True, False, False]]
    assert samples.sampled_logprobs[0, [0, 2, 3]].tolist() == [-9.0, 0.0, -4.0]
    assert samples.sampled_logprobs[0, 1] == samples.logprobs[0, 1]  # not known: weight 1
    config = {"kl_coef": 0.0, "max_steps": 4}
    # An action that decoding found less likely than the policy does weighs more, at most the cap.
    config["importance_sampling_cap"] = None
    plain = make_trainer(tmp_path / "plain", rollout_func=answer_xyz, reward_funcs=reward, config=config)
    without = record(plain)
    plain.train()
    weights = rollout.advantages / without.rollouts[0].advantages
    expected = (samples.logprobs - samples.sampled_logprobs).exp().clamp(max=2.0)
    torch.testing.assert_close(weights[rollout.action_mask], expected[rollout.action_mask], rtol=1e-4, atol=1e-4)
    assert kept.metrics[0]["completions/mean_length"] == 2.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": None}, None),
        ({"prompt_ids": [np.array([5, 6])] * 8}, None),
        ({"completion_ids": [[5, 2]] * 7}, "completion_ids has 7 entries for 8 prompts"),
        ({"completion_ids": [[]] * 8}, r"completion_ids\[0\] is \[\]"),
        ({"completion_ids": [[5] * 9] * 8}, r"completion_ids\[0\] has 9 tokens.*response_length=8"),
        ({"completion_ids": [[5, 999]] * 8}, "token id 999"),
        ({"prompt_ids": [["a"]] * 8}, r"prompt_ids\[0\] is \['a'\]"),
        ({"logprobs": [[-1.0]] * 8}, r"logprobs\[0\] has 1 entries for 4 tokens"),
        ({"logprobs": [["x"] * 4, ["x"] * 2] * 4}, r"logprobs\[0\] has 'x'"),
        ({"env_mask": [[1, 1, 2, 1], [1, 1]] * 4}, r"env_mask\[0\] has 2;"),
        ({"env_mask": [[1]] * 8}, r"env_mask\[0\] has 1 entries"),
        ({"env_mask": [[1] * 4, [0] * 2] * 4}, r"env_mask\[1\] is 0 for all tokens"),
        ({"logprobs": [[-1.0] * 4, [-1.0, 0.5]] * 4}, r"logprobs\[1\] has 0\.5"),  # a probability
        ({"logprobs": [[0.0] * 4, [float("nan"), 1e-3]] * 4}, None),
        ({"trainer_state": 1}, "'trainer_state'"),
        ("completion_ids", r"\['completion_ids'\]"),
        ("dict", "returned a list"),
    ],
)  # fmt: skip
def test_what_rollout_func_returns_is_checked(tmp_path, change, message):
    def function(prompts, trainer):
        output = answer_xyz(prompts, trainer)
        if isinstance(change, dict):
            return output | change
        return [output] if change == "dict" else {name: v for name, v in output.items() if name != change}

    trainer = make_trainer(tmp_path, rollout_func=function, config={"max_steps": 1})
    if message is None:
        trainer.train()
        return
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize("prompt", [[1, 1, 6], [1, 6, 1]])
def test_two_bos_of_rollout_func_are_named_once(tmp_path, prompt):
    def function(prompts, trainer):
        return answer_xyz(prompts, trainer) | {"prompt_ids": [prompt] * len(prompts)}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, rollout_func=function, config={"max_steps": 5}).train()  # two rollouts
    assert sum("two BOS" in str(w.message) for w in caught) == (prompt[1] == 1)


def test_responses_to_one_prompt_must_have_one_prompt(tmp_path):
    def function(prompts, trainer):
        output = answer_xyz(prompts, trainer)
        return output | {"prompt_ids": [[5 + i] for i in range(len(prompts))]}

    config = {"max_steps": 1, "num_generations": 2}
    with pytest.raises(ValueError, match="num_generations=2.*different prompts"):
        make_trainer(tmp_path, rollout_func=function, config=config).train()
    make_trainer(tmp_path, rollout_func=answer_xyz, config=config).train()


# Refused before training


def without_hints(a, b):
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def without_docstring(a: int) -> int:
    return a


async def answer_later(prompts, trainer):
    return answer_xyz(prompts, trainer)


def as_json(rows) -> Dataset:
    """A dataset whose prompts may be of different types."""
    return Dataset.from_list(list(rows), features=Features({"prompt": Json(), "sum": Value("int64")}))


def test_a_column_of_tools_beside_those_of_the_run_is_named(tmp_path):
    rows = questions().add_column("tools", ["[]"] * 16)
    with pytest.warns(UserWarning, match="train_dataset has a column 'tools', which has no effect"):
        tool_trainer(tmp_path, train_dataset=rows)


class NoReset:
    def look(self) -> str:
        """Look."""
        return ""


class AsyncReset(NoReset):
    async def reset(self, **row):
        return None


class OtherColumns(NoReset):
    def reset(self, level):
        return None


ROUTED = {"a": Counter}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tools": [without_hints]}, "'without_hints'.*type hint"),
        ({"tools": [without_docstring]}, "'without_docstring'"),
        ({"tools": [add, add]}, "several tools have the name 'add'"),
        ({"tools": add}, "must be a list of functions"),
        ({"tools": [3]}, "3 is not a function"),
        ({"tools": None, "environment_factory": NoReset}, "NoReset without `reset`"),
        ({"tools": None, "environment_factory": AsyncReset}, "AsyncReset without `reset`"),
        ({"tools": None, "environment_factory": OtherColumns}, r"OtherColumns.reset cannot be called.*'sum'"),
        ({"tools": None, "environment_factory": {"a": 3}}, "environment_factory is 3"),
        ({"tools": None, "environment_factory": ROUTED}, "no column `environment`.*'a'"),
        ({"tools": None, "environment_factory": ROUTED, "train_dataset": None}, "needs a column `environment`"),
        ({"tools": None, "environment_factory": ROUTED,
          "train_dataset": questions().add_column("environment", ["a"] * 15 + ["b"])},
         r"train_dataset\[15\]: environment='b'"),
        ({"tools": None, "environment_factory": Counter, "train_dataset": None, "config": {"max_steps": -1}},
         "max_steps=-1"),
        ({"tools": None, "environment_factory": Silent, "reward_funcs": None}, "Pass reward_funcs"),
        ({"rollout_func": answer_xyz}, "tools would not be used"),
        ({"tools": None, "rollout_func": 3}, "rollout_func is 3"),
        ({"tools": None, "rollout_func": lambda prompts: {}}, r"rollout_func cannot be called.*\(prompts, trainer\)"),
        ({"tools": None, "rollout_func": answer_later}, "rollout_func is async"),
        ({"train_dataset": as_json([*questions(15), {"prompt": "1+2", "sum": 3}])},
         r"train_dataset\[15\]: prompt is not a list of messages"),
        ({"processing_class": tool_tokenizer(response_template=None)}, "response_template"),
        ({"processing_class": make_tokenizer()}, "has no tools"),
        ({"processing_class": tool_tokenizer(TEMPLATE.replace("m.tool_calls or []", "[]"))}, "has no tools"),
        ({"train_dataset": make_prompts()}, r"train_dataset\[0\] is not a list of messages"),
        ({"tools": None, "environment_factory": Counter, "config": {"eval_win_rate": True}}, "eval_win_rate"),
        ({"config": {"max_tool_calling_iterations": -1}}, "max_tool_calling_iterations.*-1"),
        ({"config": {"tool_timeout": 0}}, "tool_timeout.*0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_training(tmp_path, arguments, message):
    config = {"max_steps": 4, **arguments.get("config", {})}
    reward_funcs = count_e if "train_dataset" in arguments else right_sum
    defaults = {"model": make_tool_model(trained=False), "reward_funcs": reward_funcs}
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        tool_trainer(tmp_path, **{**defaults, **arguments, "config": config})

"""Messages and chat templates: null keys of Arrow, content in parts, arguments of a row, what a template begins."""

from __future__ import annotations

import json
import re
import warnings
from datetime import datetime
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest
import torch
import trl
from conftest import CHAT_TEMPLATE, make_model, make_tokenizer
from datasets import Dataset, IterableDataset
from tokenizers import processors
from transformers import LlamaConfig, LlamaForSequenceClassification

from ppo_plus.data.chat_templates import find_generation_opening, find_opening_ids, fit_content
from ppo_plus.data.preferences import tokenize_pairs
from ppo_plus.data.prompts import tokenize_datasets, tokenize_prompts
from ppo_plus.rewards import Completions
from ppo_plus.rewards.classifiers import ClassifierReward

ASK = {"role": "user", "content": "why"}
CALL_TEMPLATE = (
    "{% for m in messages %}{{ m.content or '' }}{% if 'tool_calls' in m %}"
    "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endif %};{% endfor %}"
)
MOOD_TEMPLATE = "{{ mood }}:" + CHAT_TEMPLATE


def call(**arguments) -> dict:
    function = {"name": "find", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def with_bos(chat_template: str | None = None, template: str = "<bos> $A"):
    """A tokenizer whose template writes BOS and whose post-processor adds one."""
    tokenizer = make_tokenizer(chat_template and "{{ bos_token }}" + chat_template)
    special = [("<bos>", 1), ("<eos>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


def as_stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def texts_of(rows, tokenizer, **options) -> list[str]:
    return [tokenizer.decode(row["input_ids"]) for row in tokenize_prompts(rows, tokenizer, **options)]


@pytest.fixture
def seen_by_classifier(monkeypatch):
    """Score completions by a classifier with this tokenizer, and return the token ids that it read."""

    def read(tokenizer, batch) -> list[list[int]]:
        torch.manual_seed(0)
        config = LlamaConfig(**{**make_model().config.to_dict(), "num_labels": 1})
        model, rows = LlamaForSequenceClassification(config), []
        forward = type(model).forward

        def spy(self, input_ids, attention_mask, **kwargs):
            rows.extend(ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True))
            return forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

        reward = ClassifierReward(model, tokenizer, "judge", batch_size=1, chat_template_kwargs={})
        with monkeypatch.context() as patched:
            patched.setattr(type(model), "forward", spy)
            reward(batch)
        return rows

    return read


# Null keys


def from_parquet(rows, tmp_path):
    """As a file that another program wrote: plain structs, without what `datasets` notes of its types."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    return Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))


STORES = {
    "dataset": lambda rows, _: Dataset.from_list(rows),
    "parquet": from_parquet,
    "stream": lambda rows, _: as_stream(rows),
    "stream of a dataset": lambda rows, _: Dataset.from_list(rows).to_iterable_dataset(),
    "stream of parquet": lambda rows, folder: from_parquet(rows, folder).to_iterable_dataset(),
}


@pytest.mark.parametrize("store", STORES)
def test_keys_that_arrow_filled_in_are_in_no_prompt_and_reach_no_reward(store, tmp_path):
    tokenizer = make_tokenizer(CALL_TEMPLATE)
    raw = [{"prompt": [ASK, call(a=1), ASK]}, {"prompt": [ASK, call(city="rome", ways=[1, None]), ASK]}]
    raw[1]["prompt"][1]["tool_calls"][0]["function"]["arguments"]["places"] = [{"x": 1}, {"y": 2}, None]
    assert "city" in str(Dataset.from_list(raw)[0])  # control: Arrow does fill them in
    rows = list(tokenize_prompts(STORES[store](raw, tmp_path), tokenizer))
    for row, given in zip(rows, raw, strict=True):
        assert row["input_ids"] == tokenizer.apply_chat_template(given["prompt"], return_dict=True)["input_ids"]
        assert row["prompt"] == given["prompt"]  # what reward functions get; None in the list is the user's own


def test_none_of_the_users_own_stays_in_json():
    """In JSON text, and in a column of `datasets`' Json type, which holds each value with its own keys."""
    tokenizer = make_tokenizer(CALL_TEMPLATE)
    own = [ASK, call(a=1, b=None), ASK]
    text = [ASK, call(), ASK]
    text[1]["tool_calls"][0]["function"]["arguments"] = json.dumps({"a": None})
    rows = Dataset.from_list([{"prompt": own}, {"prompt": text}], on_mixed_types="use_json")
    first, second = tokenize_prompts(rows, tokenizer)
    assert first["prompt"] == own
    assert second["prompt"] == text
    assert first["input_ids"] == tokenizer.apply_chat_template(own, return_dict=True)["input_ids"]
    only_text = tokenize_prompts(Dataset.from_list([{"prompt": text}]), tokenizer)[0]
    assert only_text["input_ids"] == second["input_ids"]


def test_structs_of_other_columns_keep_their_keys():
    """A reward function may look a bound up that is None."""
    rows = Dataset.from_list([{"prompt": "a", "bounds": {"low": 1, "high": None}}])
    assert tokenize_prompts(rows, make_tokenizer())[0]["bounds"] == {"low": 1, "high": None}


def test_the_rows_of_an_evaluation_set_are_named_by_it():
    rows = Dataset.from_list([{"prompt": [ASK]}, {"prompt": [{"role": "user", "content": None}]}])
    with pytest.raises(ValueError, match=r"^hard\[1\]: message 0 has the content None"):
        tokenize_datasets({"easy": rows.select([0]), "hard": rows}, make_tokenizer(CHAT_TEMPLATE))


# Content in parts


def parts(*texts):
    return [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]


PARTS_TEMPLATE = "{% for m in messages %}{% for c in m.content %}{{ c['text'] }}{% endfor %}!{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHAT_TEMPLATE, parts("why ", "not"), "<|user|>why not<eos><|assistant|>"),
        (CHAT_TEMPLATE, [ASK], "<|user|>why<eos><|assistant|>"),
        (PARTS_TEMPLATE, parts("why ", "not"), "why not!"),
        (PARTS_TEMPLATE, [ASK], "why!"),
    ],
    ids=["parts for text", "text for text", "parts for parts", "text for parts"],
)
def test_content_is_given_in_the_form_that_the_template_reads(template, messages, expected, seen_by_classifier):
    tokenizer = make_tokenizer(template)
    assert texts_of(Dataset.from_list([{"prompt": messages}]), tokenizer) == [expected]
    batch = Completions([messages], [[{"role": "assistant", "content": "so"}]], [[4]])
    whole = expected.removesuffix("<|assistant|>") + ("so!" if template == PARTS_TEMPLATE else "<|assistant|>so<eos>")
    assert tokenizer.decode(seen_by_classifier(tokenizer, batch)[0]) == whole


def test_a_message_of_images_is_refused_by_its_row():
    image = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what"}]}]
    rows = Dataset.from_list([{"prompt": parts("why")}, {"prompt": image}])
    with pytest.raises(ValueError, match=r"^train_dataset\[1\].*message 0.*'image'"):
        tokenize_prompts(rows, make_tokenizer(CHAT_TEMPLATE))


def test_no_template_is_probed_where_there_are_no_messages():
    assert fit_content([], make_tokenizer(CHAT_TEMPLATE)) == []


# Arguments of a row


@pytest.mark.parametrize("make", [Dataset.from_list, as_stream], ids=["dataset", "stream"])
def test_template_arguments_of_a_row_come_before_those_of_the_run(make, seen_by_classifier):
    tokenizer = make_tokenizer(MOOD_TEMPLATE)
    moods = ({"mood": "calm"}, {"other": 1}, None, '{"mood": "loud"}')
    for mood, begins in zip(moods, ("calm:", "run:", "run:", "loud:"), strict=True):
        kwargs = [{"prompt": [ASK], "chat_template_kwargs": mood}]
        texts = texts_of(make(kwargs), tokenizer, chat_template_kwargs={"mood": "run"})
        assert texts == [begins + "<|user|>why<eos><|assistant|>"]
    mixed = [{"prompt": [ASK], "chat_template_kwargs": own} for own in moods[:3]]
    rows = tokenize_prompts(make(mixed), tokenizer, chat_template_kwargs={"mood": "run"})
    begun = [tokenizer.decode(row["input_ids"]).split(":")[0] for row in rows]
    assert begun == ["calm", "run", "run"]
    columns = {"chat_template_kwargs": [{"mood": "calm"}, {"mood": "loud"}]}
    batch = Completions([[ASK]] * 2, [[{"role": "assistant", "content": "so"}]] * 2, [[4]] * 2, columns)
    assert [tokenizer.decode(ids).split(":")[0] for ids in seen_by_classifier(tokenizer, batch)] == ["calm", "loud"]


@pytest.mark.parametrize(("arguments", "named"), [("calm", "'calm'"), ({"tokenize": False}, "'tokenize'")])
def test_template_arguments_that_are_no_dict_or_set_already_are_refused_by_their_row(arguments, named):
    rows = Dataset.from_list([{"prompt": [ASK], "chat_template_kwargs": arguments}])
    with pytest.raises(ValueError, match=rf"^train_dataset\[0\].*chat_template_kwargs.*{named}"):
        tokenize_prompts(rows, make_tokenizer(MOOD_TEMPLATE))


@pytest.mark.parametrize("store", ["dataset", "stream", "parquet"])
@pytest.mark.parametrize(
    ("row", "place"),
    [
        ({"prompt": [ASK, call(a=datetime(2026, 1, 2)), ASK]}, "message 1 has datetime.datetime"),
        ({"prompt": [ASK, call(a=[{"b": Decimal("1.5")}]), ASK]}, "message 1 has Decimal"),
        (
            {"prompt": [ASK], "tools": [{"name": "f", "from": datetime(2026, 1, 2)}]},
            "tools or .* has datetime.datetime",
        ),
        (
            {"prompt": [ASK], "chat_template_kwargs": {"now": datetime(2026, 1, 2)}},
            "tools or chat_template_kwargs has datetime",
        ),
    ],
)
def test_values_that_json_lacks_are_refused_by_their_row(row, place, store, tmp_path):
    """A template would render them as `<datetime>`, and reward functions would get another value."""
    rows = STORES[store]([row], tmp_path)
    with pytest.raises(ValueError, match=rf"^train_dataset\[0\]: {place}"):
        list(tokenize_prompts(rows, make_tokenizer(CALL_TEMPLATE)))


def test_a_column_tools_beside_plain_text_is_only_a_column():
    rows = tokenize_prompts(Dataset.from_dict({"prompt": ["cut wood"], "tools": ["hammer, saw"]}), make_tokenizer())
    assert rows[0]["tools"] == "hammer, saw"
    chat = Dataset.from_list([{"prompt": [ASK], "tools": "hammer, saw"}])
    with pytest.raises(ValueError, match=r"^train_dataset\[0\].*tools.*hammer"):
        tokenize_prompts(chat, make_tokenizer(CHAT_TEMPLATE))


# BOS


def test_rendered_text_gets_one_bos(seen_by_classifier):
    tokenizer = with_bos(CHAT_TEMPLATE)
    text = tokenizer.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    wanted = tokenizer.apply_chat_template([ASK], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer(text)["input_ids"] == [1, *wanted]  # control: the tokenizer adds a second
    rows = tokenize_prompts(Dataset.from_dict({"prompt": [text, "why"]}), tokenizer)
    assert [row["input_ids"] for row in rows] == [wanted, tokenizer("why")["input_ids"]]
    batch = Completions([text, "why"], ["so", "so"], [[4]] * 2)
    expected = [wanted + tokenizer("so<eos>")["input_ids"][1:], tokenizer("whyso<eos>")["input_ids"]]
    assert sorted(seen_by_classifier(tokenizer, batch)) == sorted(expected)  # shortest first


@pytest.mark.parametrize(
    ("processor", "text", "expected"),
    [
        ("<bos> $A <eos>", "<bos>why", [1, 26, 11, 28]),  # neither a second BOS nor an EOS
        ("$A <eos>", "<bos>why", [1, 26, 11, 28]),
        ("$A", "<bos><bos>why", [1, 1, 26, 11, 28]),  # as written
        ("<bos> $A", "<bos><bos>why", [1, 1, 26, 11, 28]),
        ("<bos> $A", "why", [1, 26, 11, 28]),
        ("<bos> $A", "\n<bos>why", [36, 1, 26, 11, 28]),  # as the template renders it
        ("<bos> $A", "\nwhy", [1, 36, 26, 11, 28]),
    ],
)
def test_only_a_bos_that_was_added_is_dropped(processor, text, expected):
    tokenizer = with_bos(template=processor)
    assert tokenize_prompts(Dataset.from_dict({"prompt": [text]}), tokenizer)[0]["input_ids"] == expected


def test_two_bos_in_ids_made_elsewhere_are_named():
    rows = Dataset.from_dict({"input_ids": [[1, 5], [1, 1, 5], [1, 1, 6]]})
    with pytest.warns(UserWarning, match=r"^train_dataset\[1\] begins with two BOS") as caught:
        assert tokenize_prompts(rows, make_tokenizer())[1]["input_ids"] == [1, 1, 5]
    assert len(caught) == 1


@pytest.mark.parametrize("as_parts", [False, True], ids=["text", "parts"])
@pytest.mark.parametrize(
    ("template", "start"),
    [
        (CHAT_TEMPLATE, "<|user|>"),  # no special token: all that stands before a first message
        ("{{ bos_token }}" + CHAT_TEMPLATE, "<bos>"),
        ("{{ bos_token }}<|system|>be kind<eos>" + CHAT_TEMPLATE, "<bos>"),
    ],
)
def test_a_message_that_is_rendered_already_is_named_once(template, start, as_parts):
    tokenizer = make_tokenizer(template)
    rendered = tokenizer.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    content = [{"type": "text", "text": rendered}] if as_parts else rendered
    again = [{"role": "user", "content": content}]
    plain = [{"role": "user", "content": f"what does {start} mean?"}]  # control: it does not begin with it
    with pytest.warns(UserWarning, match="begins with") as caught:
        list(tokenize_prompts(as_stream([{"prompt": p} for p in (plain, again, again)]), tokenizer))
    assert [str(w.message).split(":")[0] for w in caught] == ["train_dataset[1]"]
    assert repr(start) in str(caught[0].message)


def test_answers_that_are_rendered_already_are_named():
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    rendered = tokenizer.apply_chat_template([ASK], tokenize=False)
    pair = {
        "chosen": [ASK, {"role": "assistant", "content": "so"}],
        "rejected": [{"role": "user", "content": rendered}],
    }
    with pytest.warns(UserWarning, match=r"train_dataset\[0\]: rejected.*'<\|user\|>'"):
        tokenize_pairs(Dataset.from_list([pair]), tokenizer, max_length=None)


def test_a_template_without_a_start_of_its_own_names_nothing():
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = as_stream([{"prompt": [{"role": "user", "content": "<|user|>why"}]}])
        assert texts_of(rows, tokenizer) == ["<|user|>why"]


def test_parts_that_are_bare_text_get_the_form_of_a_part():
    rows = as_stream([{"prompt": [{"role": "user", "content": ["why?"]}]}])
    with pytest.raises(ValueError, match=r"^train_dataset\[0\]: message 0 has the part 'why\?'.*'type': 'text'"):
        list(tokenize_prompts(rows, make_tokenizer(CHAT_TEMPLATE)))


# Prompts that are finished, or text of a conversation

DONE = [ASK, {"role": "assistant", "content": "so it is."}]


@pytest.mark.parametrize("make", [Dataset.from_list, as_stream], ids=["dataset", "stream"])
@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (DONE, r"ends with an assistant's message.*so it is"),
        (json.dumps(DONE), r"written as text.*json\.loads"),
        (str(DONE), r"written as text"),
        (json.dumps({"messages": DONE}), r"written as text"),
        (json.dumps(DONE[0]), r"written as text"),
        (json.dumps([{"from": "human", "value": "why"}]), r"written as text.*'role' and 'content'"),
        ("<|user|>why<eos><|assistant|>so it is.<eos>\n", r"ends with '<eos>'.*add_generation_prompt=True"),
        ("<|user|>why<eos><|assistant|>", None),
        ("<eos>", None),  # unconditional samples
        (json.dumps({"from": 3, "to": [4]}), None),
        ([ASK], None),
        ("[role] why", None),
        ("[" * 300 + "role", None),
    ],
    ids=[
        "messages",
        "JSON",
        "repr",
        "JSON object",
        "JSON message",
        "ShareGPT",
        "rendered",
        "rendered and open",
        "EOS",
        "other JSON",
        "open",
        "text",
        "brackets",
    ],
)
def test_a_finished_conversation_is_named_once(make, prompt, says):
    rows = make([{"prompt": "why" if isinstance(prompt, str) else [ASK]}] + [{"prompt": prompt}] * 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(tokenize_prompts(rows, make_tokenizer(CHAT_TEMPLATE), name="prompts"))
    messages = [str(w.message) for w in caught if w.category is UserWarning]
    assert len(messages) == (says is not None)
    if says:
        assert messages[0].startswith("prompts[1] ")
        assert re.search(says, messages[0])


# As Gemma: an answer ends with a token that is not EOS.
OTHER_END = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<unk>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def warnings_of(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if w.category is UserWarning]


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize(
    ("template", "text", "end"),
    [
        (OTHER_END, "<|user|>why<unk>\n<|assistant|>so<unk>\n", "<unk>"),
        (OTHER_END, "<|user|>why<unk>\n", "<unk>"),
        (OTHER_END, "<|user|>why<unk>\n<|assistant|>", None),
        (OTHER_END, "<|user|>why<eos>", "<eos>"),
        (OTHER_END, "<unk>", None),
        (CHAT_TEMPLATE, "<|user|>why<unk>", None),  # where it ends no answer
        (None, "why<unk>", None),
        ("{% for m in messages %}{{ m.content }}.\n{% endfor %}", "why.", None),
    ],
)
def test_a_prompt_that_ends_as_answers_do_in_its_template_is_named(template, text, end, as_ids):
    tokenizer = make_tokenizer(template)
    row = {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} if as_ids else {"prompt": text}
    messages = warnings_of(lambda: tokenize_prompts(Dataset.from_list([row]), tokenizer))
    assert [f"[0] ends with {end!r}" in message for message in messages] == ([] if end is None else [True])


@pytest.mark.parametrize("role", ["model", "gpt", "Assistant", "user", "tool", "ipython"])
def test_an_answer_under_another_name_is_named(role):
    rows = Dataset.from_list([{"prompt": [ASK, {"role": role, "content": "so it is"}]}])
    messages = warnings_of(lambda: tokenize_prompts(rows, make_tokenizer(CHAT_TEMPLATE)))
    named = role not in ("user", "tool", "ipython")
    assert [f"[0] ends with a message of the role {role!r}" in message for message in messages] == [True] * named


@pytest.mark.parametrize("write", [json.dumps, str])
def test_pairs_of_conversations_written_as_text_are_named(write):
    def pairs(form):
        texts = [form([ASK, {"role": "assistant", "content": answer}]) for answer in ("so", "no")]
        return Dataset.from_list([dict(zip(("chosen", "rejected"), texts, strict=True))])

    def of(form):
        return warnings_of(lambda: tokenize_pairs(pairs(form), make_tokenizer(CHAT_TEMPLATE), max_length=None))

    (message,) = of(write)
    assert message.startswith("train_dataset[0]: chosen is a conversation written as text")
    assert "{'chosen': json.loads(row['chosen'])}" in message
    assert of(list) == []


def test_a_pair_whose_prompt_is_answered_already_is_named():
    def of(prompt):
        answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
        rows = Dataset.from_list([{"prompt": prompt, **answers}])
        return warnings_of(lambda: tokenize_pairs(rows, make_tokenizer(CHAT_TEMPLATE), max_length=None))

    (message,) = of(DONE)
    assert message.startswith("train_dataset[0]: prompt ends with an assistant's message, 'so it is.'")
    assert of([*DONE, ASK]) == of([ASK]) == []


def test_token_ids_that_end_with_eos_are_named():
    tokenizer = make_tokenizer()
    for ids, says in (([5, 6, tokenizer.eos_token_id], True), ([5, tokenizer.eos_token_id, 6], False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tokenize_prompts(Dataset.from_list([{"input_ids": ids}]), tokenizer)
        assert any("[0] ends with '<eos>'" in str(w.message) for w in caught) == says


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}", True),
        ("{% for m in messages %}{{ m.content }}<eos>{% endfor %}", False),  # as Mistral: an answer has no header
        (CHAT_TEMPLATE, False),
    ],
)
def test_a_template_without_generation_prompt_is_named(template, named):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenize_prompts(Dataset.from_list([{"prompt": [ASK]}] * 3), make_tokenizer(template))
    assert sum("generation prompt" in str(w.message) for w in caught) == named


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": DONE}, r"\[0\] ends with the assistant's answer.*row\['messages'\]\[:-1\]"),
        ({"messages": [ASK]}, r"rename_column\('messages', 'prompt'\)"),
        ({"conversations": [{"from": "human", "value": "why"}]}, "'human': 'user'"),
        ({"conversations": [ASK]}, r"rename_column\('conversations', 'prompt'\)"),
        ({"chosen": "so", "rejected": "no"}, "extract_prompt"),
        ({"question": "why"}, r"rename_column\('...', 'prompt'\)"),
    ],
)
@pytest.mark.parametrize("make", [Dataset.from_list, as_stream], ids=["dataset", "stream"])
def test_a_set_without_prompts_gets_the_call_that_makes_them(make, row, says):
    with pytest.raises(ValueError, match=rf"^train_dataset has no column 'prompt'.*{says}"):
        tokenize_prompts(make([row]), make_tokenizer(CHAT_TEMPLATE))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": DONE},
        {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}]},
        {"chosen": DONE, "rejected": [ASK, {"role": "assistant", "content": "no"}]},
    ],
    ids=["messages", "conversations", "pairs"],
)
def test_the_call_that_is_named_makes_prompts(row):
    dataset, tokenizer = Dataset.from_list([row]), make_tokenizer(CHAT_TEMPLATE)
    with pytest.raises(ValueError, match=r"dataset\.map") as caught:
        tokenize_prompts(dataset, tokenizer)
    (call,) = re.findall(r"dataset\.map\(.*\)(?=\.$)", str(caught.value))
    assert tokenize_prompts(eval(call, {"dataset": dataset, "trl": trl}), tokenizer)[0]["prompt"] == [ASK]


def test_a_system_message_alone_is_a_prompt():
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    rows = Dataset.from_list([{"prompt": [{"role": "system", "content": "be"}]}])
    assert texts_of(rows, tokenizer) == ["<|system|>be<eos><|assistant|>"]


# What the generation prompt begins

ENDS = "<|assistant|>{% endif %}"


@pytest.mark.parametrize(
    ("template", "opening"),
    [
        (CHAT_TEMPLATE, ""),
        (CHAT_TEMPLATE.replace(ENDS, "<|assistant|>think:{% endif %}"), "think:"),
        (CHAT_TEMPLATE.replace(ENDS, "<|assistant|><think>\n{% endif %}"), "<think>\n"),  # as DeepSeek-R1
        # Qwen3 without thinking and Gemma: a block that is closed again.
        (CHAT_TEMPLATE.replace(ENDS, "<|assistant|><think>\n\n<_think>".replace("<_", "</") + "{% endif %}"), ""),
        # DeepSeek-V3.1 and Qwen3-Thinking write another header before an answer than to ask for one.
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ '</think>' if m.role == 'assistant' }}{{ m.content }}"
            "{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
            "<think>\n",
        ),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ""),
    ],
)
def test_the_opening_of_an_answer_is_what_its_header_lacks(template, opening):
    tokenizer = make_tokenizer(template)
    assert find_generation_opening([ASK], tokenizer, {}) == opening
    ids = tokenizer.apply_chat_template([ASK], add_generation_prompt=True, return_dict=True)["input_ids"]
    opening_ids = find_opening_ids(ids, opening, tokenizer)
    assert tokenizer.decode(opening_ids).strip() == opening.strip()
    assert ids[len(ids) - len(opening_ids) :] == opening_ids

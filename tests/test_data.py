"""Prompts become token ids: text, messages, ids made elsewhere; padding, contexts, and the ids that end a response."""

from __future__ import annotations

import pytest
import torch
from conftest import CHAT_TEMPLATE, make_tokenizer
from datasets import Dataset
from tokenizers import processors
from transformers import GenerationConfig

from ppo_plus.data.padding import left_pad, pad_id
from ppo_plus.data.prompts import encode_prompt, is_conversational, to_columns, tokenize_prompts, validate_prompts
from ppo_plus.data.tokenizers import check_tokenizer, stop_token_ids

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "oh"}


def ids(text: str) -> list[int]:
    """By hand: four special tokens, then a is 4, b is 5, and so on."""
    return [4 + "abcdefghijklmnopqrstuvwxyz .,!?'\n<|>_:".index(letter) for letter in text]


@pytest.fixture
def chat_tokenizer():
    return make_tokenizer(CHAT_TEMPLATE)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([USER], True),
        ([USER, ASSISTANT], True),
        ([{"role": "tool"}], True),
        ("user: hi", False),
        ([], False),
        (["hi"], False),
        ([{"content": "hi"}], False),
        ([USER, "hi"], False),
        (None, False),
        ({"role": "user", "content": "hi"}, False),
    ],
)
def test_a_conversation_is_a_list_of_messages_with_a_role_each(prompt, expected):
    assert is_conversational(prompt) is expected


def test_text_is_tokenized_as_it_is(tokenizer):
    assert encode_prompt("a cab", tokenizer, {}) == [4, 30, 6, 4, 5]


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("<bos> $A <eos>", "abc", [1, 4, 5, 6]),
        ("$A <eos>", "abc", [4, 5, 6]),
        ("<bos> $A <eos>", "abc<eos>", [1, 4, 5, 6, 2]),  # as written
        ("<bos> $A", "abc<eos>", [1, 4, 5, 6, 2]),
        ("<bos> $A", "abc", [1, 4, 5, 6]),
    ],
)
def test_no_prompt_ends_in_an_eos_that_the_tokenizer_put_there(template, text, expected):
    tokenizer = make_tokenizer()
    tokens = [("<bos>", 1), ("<eos>", 2)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    assert (tokenizer(text)["input_ids"] == expected) == ("<eos>" not in template)  # it does put it there
    assert encode_prompt(text, tokenizer, {}) == expected


def test_messages_go_through_the_template_and_ask_for_an_answer(chat_tokenizer):
    expected = [*ids("<|user|>hi"), 2, *ids("<|assistant|>")]
    assert encode_prompt([USER], chat_tokenizer, {}) == expected


def test_a_reply_that_was_begun_is_continued_and_not_answered(chat_tokenizer):
    expected = [*ids("<|user|>hi"), 2, *ids("<|assistant|>oh")]
    assert encode_prompt([USER, ASSISTANT], chat_tokenizer, {}) == expected


def test_arguments_of_the_template_are_handed_on():
    tokenizer = make_tokenizer("{{ mood }}: {{ messages[0]['content'] }}")
    assert encode_prompt([USER], tokenizer, {"mood": "calm"}) == ids("calm: hi")


def test_all_columns_stay_and_ids_are_added(tokenizer):
    rows = Dataset.from_dict({"prompt": ["ab", "c"], "answer": [1, None], "meta": [{"x": [1]}, {"x": []}]})
    found = tokenize_prompts(rows, tokenizer)
    assert found["input_ids"][:] == [[4, 5], [6]]
    for name in rows.column_names:
        assert found[name][:] == rows[name][:]


def test_a_prompt_column_wins_over_ids_that_came_with_it(tokenizer):
    rows = Dataset.from_dict({"prompt": ["ab"], "input_ids": [[9, 9, 9]]})
    assert tokenize_prompts(rows, tokenizer)["input_ids"][:] == [[4, 5]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", ["torch", "numpy", "pandas"])
def test_a_format_that_was_set_changes_nothing(tokenizer, form, stream):
    """TRL's old scripts set "torch"; rows were tensors then, and the first rollout failed."""
    given = Dataset.from_dict({"prompt": ["ab", "c"], "wanted": [1, 2], "parts": [[1], [2, 3]]})
    plain = given.to_iterable_dataset() if stream else given
    found = list(tokenize_prompts(plain.with_format(form), tokenizer))
    assert found == [
        {"prompt": "ab", "wanted": 1, "parts": [1], "input_ids": ids("ab")},
        {"prompt": "c", "wanted": 2, "parts": [2, 3], "input_ids": ids("c")},
    ]
    assert all(type(row["parts"]) is type(row["input_ids"]) is list for row in found)


def test_columns_that_a_format_hid_are_there(tokenizer):
    given = Dataset.from_dict({"prompt": ["ab"], "wanted": [1]})
    given.set_format("torch", columns=["prompt"])
    assert tokenize_prompts(given, tokenizer)[0] == {"prompt": "ab", "wanted": 1, "input_ids": ids("ab")}


def test_a_transform_is_refused(tokenizer):
    given = Dataset.from_dict({"prompt": ["ab"]}).with_transform(lambda rows: rows)
    with pytest.raises(ValueError, match=r"eval_dataset has a transform .* Apply it once: dataset.map"):
        tokenize_prompts(given, tokenizer, name="eval_dataset")


def test_ids_made_elsewhere_lose_their_padding_by_the_mask_and_not_by_the_id(tokenizer):
    # 0 is <pad> and 2 is <eos>: both stay where the mask says that they are real.
    rows = Dataset.from_dict(
        {"input_ids": [[0, 0, 2, 4], [0, 4, 5, 0]], "attention_mask": [[0, 1, 1, 1], [0, 1, 1, 0]]}
    )
    assert tokenize_prompts(rows, tokenizer)["input_ids"][:] == [[0, 2, 4], [4, 5]]


@pytest.mark.parametrize(("longest", "expected"), [(None, "abcde"), (5, "abcde"), (9, "abcde"), (3, "cde"), (1, "e")])
def test_only_the_last_tokens_of_a_long_prompt_are_kept(tokenizer, longest, expected):
    rows = Dataset.from_dict({"prompt": ["abcde"]})
    assert tokenize_prompts(rows, tokenizer, max_prompt_length=longest)["input_ids"][:] == [ids(expected)]


@pytest.mark.parametrize(("longest", "expected"), [(6, "<bos>abcde"), (5, "<bos>bcde"), (2, "<bos>e"), (1, "e")])
def test_the_bos_of_a_long_prompt_is_kept_before_its_last_tokens(tokenizer, longest, expected):
    rows = Dataset.from_dict({"prompt": ["<bos>abcde"], "more": [1]})
    made_elsewhere = Dataset.from_dict({"input_ids": [[1, *ids("abcde")]]})
    for dataset in (rows, made_elsewhere):
        (found,) = tokenize_prompts(dataset, tokenizer, max_prompt_length=longest)["input_ids"][:]
        assert found == tokenizer(expected)["input_ids"] and len(found) == longest


def test_the_row_of_a_mistake_is_named_with_its_dataset(tokenizer):
    rows = Dataset.from_dict({"prompt": ["a"] * 20 + [" "] + ["a"] * 5})
    with pytest.raises(ValueError, match=r"hard\[20\] is empty"):
        tokenize_prompts(rows, tokenizer, name="hard")


def test_tool_calls_need_no_content_and_everything_else_does():
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['role'] }}.{% endfor %}")
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    assert encode_prompt([USER, call, USER], tokenizer, {}) == ids("user.assistant.user.")
    with pytest.raises(ValueError, match="here: message 1 has the content None"):
        encode_prompt([USER, {**call, "tool_calls": None}, USER], tokenizer, {}, "here")


def test_left_pad_by_hand():
    input_ids, mask = left_pad([[5], [6, 7, 8], [9, 4]], pad_token_id=0)
    assert input_ids.tolist() == [[0, 0, 5], [6, 7, 8], [0, 9, 4]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]
    assert input_ids.dtype == mask.dtype == torch.int64


def test_left_pad_masks_by_length_where_the_padding_is_also_a_token():
    input_ids, mask = left_pad([[2, 2], [2, 5, 2]], pad_token_id=2)
    assert input_ids.tolist() == [[2, 2, 2], [2, 5, 2]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("declared", "extra", "expected"),
    [
        (None, [], [2]),
        (2, [], [2]),
        (7, [], [2, 7]),
        ([7, 2, 5], [], [2, 5, 7]),
        (None, [9], [2, 9]),
        ([7], [0, 5, 7], [0, 2, 5, 7]),
    ],
)
def test_every_id_that_ends_a_response_is_known(tokenizer, declared, extra, expected):
    assert stop_token_ids(GenerationConfig(eos_token_id=declared), tokenizer, 50, extra) == expected


def test_a_model_without_generation_config_ends_at_the_tokenizers_eos(tokenizer):
    assert stop_token_ids(None, tokenizer, 50) == [2]


def test_padding_is_taken_from_eos_only_where_there_is_none():
    tokenizer = make_tokenizer()
    check_tokenizer(tokenizer)
    assert pad_id(tokenizer) == 0
    tokenizer.pad_token = None
    check_tokenizer(tokenizer)
    assert pad_id(tokenizer) == 2


@pytest.mark.parametrize(("context", "fits"), [(None, True), (14, True), (13, False)])
def test_a_prompt_and_a_full_response_fit_the_context_exactly(context, fits):
    rows = Dataset.from_dict({"input_ids": [[4] * 3, [4] * 6, [4] * 5]})
    if fits:
        validate_prompts(rows, 8, context, 99, "rows")
        return
    with pytest.raises(ValueError, match=r"rows\[1\] has 6 tokens.*max_prompt_length=5"):
        validate_prompts(rows, 8, context, 99, "rows")


def test_the_largest_id_that_has_an_embedding_is_allowed():
    rows = Dataset.from_dict({"input_ids": [[4, 9], [10, 3]]})
    assert validate_prompts(rows, 8, None, 11, "rows") is rows
    with pytest.raises(ValueError, match=r"rows\[1\] has token id 10, but the model has embeddings for 10"):
        validate_prompts(rows, 8, None, 10, "rows")


def test_rows_become_lists_by_column():
    rows = [{"prompt": "a", "input_ids": [4], "wanted": 1}, {"prompt": "b", "input_ids": [5], "wanted": None}]
    assert to_columns(rows) == {"prompt": ["a", "b"], "wanted": [1, None]}

"""Whatever people put into a data set or a configuration is taken, or refused in words; nothing else happens."""

from __future__ import annotations

import dataclasses
import functools
import unicodedata

import pytest
from conftest import CHAT_TEMPLATE, LETTERS, make_tokenizer
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ppo_plus import PPOConfig
from ppo_plus.data.padding import left_pad
from ppo_plus.data.prompts import encode_prompt, tokenize_prompts
from ppo_plus.rollout.decoding import decode_completion

# The same examples every time: a failure here must be one that the next person can see too.
fuzz = functools.partial(settings, deadline=None, derandomize=True, database=None)
TOKENIZER = make_tokenizer(CHAT_TEMPLATE)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: a response may begin in the middle of a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


BYTES = byte_tokenizer()
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]) | scalars},
        optional={"content": st.text(max_size=20) | anything},
    ),
    min_size=1,
    max_size=4,
)


@fuzz(max_examples=300)
@given(st.text())
def test_text_of_every_kind_is_tokenized_as_it_is_or_called_empty(text):
    """The byte tokenizer's ids are the text's UTF-8, so nothing may be lost, added or normalized."""
    if not text.strip():
        with pytest.raises(ValueError, match=r"rows\[3\] is empty"):
            encode_prompt(text, BYTES, {}, "rows[3]")
    else:
        ids = encode_prompt(text, BYTES, {}, "rows[3]")
        assert len(ids) == len(text.encode()) or "<eos>" in text
        assert BYTES.decode(ids) == text


@fuzz(max_examples=300)
@given(messages | anything)
def test_a_prompt_of_any_shape_becomes_ids_or_is_named(prompt):
    try:
        ids = encode_prompt(prompt, TOKENIZER, {}, "rows[3]")
    except ValueError as error:
        assert str(error).startswith("rows[3]") and len(str(error)) < 1000
    else:
        assert ids and all(type(i) is int and 0 <= i < len(TOKENIZER) for i in ids)


@fuzz(max_examples=25)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), min_size=1, max_size=6), st.data())
def test_a_data_set_of_texts_is_tokenized_row_by_row_or_its_first_bad_row_is_named(texts, data):
    longest = data.draw(st.none() | st.integers(1, 5))
    rows = Dataset.from_dict({"prompt": texts, "more": list(range(len(texts)))})
    empty = [i for i, text in enumerate(texts) if not text.strip()]
    if empty:
        with pytest.raises(ValueError, match=rf"train_dataset\[{empty[0]}\] is empty"):
            tokenize_prompts(rows, BYTES, max_prompt_length=longest)
        return
    found = tokenize_prompts(rows, BYTES, max_prompt_length=longest)
    assert found["prompt"] == texts and found["more"] == list(range(len(texts)))
    for text, ids in zip(texts, found["input_ids"], strict=True):
        whole = BYTES(text)["input_ids"]
        assert ids == (whole if longest is None else whole[-longest:])


@fuzz(max_examples=200)
@given(st.lists(st.lists(st.integers(0, 2**31), min_size=1, max_size=12), min_size=1, max_size=6), st.integers(0, 9))
def test_padding_can_be_taken_away_again(sequences, pad):
    input_ids, mask = left_pad(sequences, pad)
    assert input_ids.shape == mask.shape == (len(sequences), max(map(len, sequences)))
    for ids, row, real in zip(sequences, input_ids, mask, strict=True):
        assert row[real.bool()].tolist() == ids
        assert real.tolist() == sorted(real.tolist())  # padding is on the left
        assert set(row[~real.bool()].tolist()) <= {pad}


@fuzz(max_examples=200)
@given(st.text(LETTERS, max_size=12), st.text(LETTERS, max_size=12))
def test_a_continuation_is_what_was_answered(prompt, response):
    ids = [TOKENIZER.convert_tokens_to_ids(list(text)) for text in (prompt, response)]
    assert decode_completion(TOKENIZER, *ids) == response


@fuzz(max_examples=300)
@given(st.text(), st.data())
def test_a_continuation_that_begins_inside_a_character_is_text_all_the_same(text, data):
    ids = BYTES(text)["input_ids"]
    cut = data.draw(st.integers(0, len(ids)))
    found = decode_completion(BYTES, ids[:cut], ids[cut:])
    found.encode()  # no half of a pair of surrogates
    whole = [len(text[:i].encode()) for i in range(len(text) + 1)]
    if cut in whole and "<eos>" not in text:
        assert found == text[whole.index(cut) :]


FIELDS = [field.name for field in dataclasses.fields(PPOConfig) if field.name in PPOConfig.__annotations__]
hostile = anything | st.sampled_from(
    [
        0,
        -1,
        1,
        1.5,
        -0.0,
        2**63,
        1e308,
        float("nan"),
        float("inf"),
        "1",
        "none",
        "True",
        "{",
        "[]",
        (),
        b"x",
        object,
        3j,
    ]
)


@pytest.mark.parametrize("name", FIELDS)
@fuzz(max_examples=40)
@given(value=hostile)
def test_any_value_of_a_setting_is_taken_or_refused_by_name(name, value):
    try:
        args = PPOConfig(output_dir="out", use_cpu=True, report_to="none", **{name: value})
    except (TypeError, ValueError) as error:
        assert name in str(error), f"{type(error).__name__} does not name {name}: {error}"
    else:
        assert name in args.to_dict() and repr(args)
        assert args.steps_per_rollout >= 1 and args.rollout_batch_size >= 1


def test_the_fuzzed_text_has_every_kind_of_character():
    """Otherwise the tests above would be of letters only."""
    kinds = set()

    @fuzz(max_examples=1000)
    @given(st.text())
    def collect(text):
        kinds.update(unicodedata.category(c)[0] for c in text)

    collect()
    assert kinds >= set("LMNPSZC")

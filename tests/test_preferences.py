"""Preference pairs become token ids: with the prompt once, mistakes named by row, and useless pairs counted."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from conftest import CHAT_TEMPLATE, classifier, lora, make_model, make_tokenizer, make_trainer
from datasets import Dataset, IterableDataset
from tokenizers import processors
from transformers import AutoConfig, AutoModelForSequenceClassification

from ppo_plus import RewardConfig, RewardTrainer
from ppo_plus.data.preferences import tokenize_pairs

USER = {"role": "user", "content": "why"}


def says(*contents) -> list[dict]:
    return [{"role": ("assistant", "user")[i % 2], "content": content} for i, content in enumerate(contents)]


def as_stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def read(rows, tokenizer=None, make=Dataset.from_list, max_length=None) -> list[tuple[str, str]]:
    """Both texts of each pair that is left, as they are trained on."""
    tokenizer = tokenizer or make_tokenizer(CHAT_TEMPLATE)
    pairs = tokenize_pairs(make(rows), tokenizer, max_length=max_length)
    return [(tokenizer.decode(row["chosen_ids"]), tokenizer.decode(row["rejected_ids"])) for row in pairs]


ASKED = "<|user|>why<eos>"
WHOLE = (ASKED + "<|assistant|>so<eos>", ASKED + "<|assistant|>no<eos>")
BOTH = pytest.mark.parametrize("make", [Dataset.from_list, as_stream], ids=["dataset", "stream"])


@BOTH
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [USER], "chosen": says("so"), "rejected": says("no")}, WHOLE),
        ({"prompt": [USER], "chosen": [USER, *says("so")], "rejected": [USER, *says("no")]}, WHOLE),
        ({"prompt": [USER], "chosen": [USER, *says("so")], "rejected": says("no")}, WHOLE),
        ({"prompt": "why", "chosen": [USER, *says("so")], "rejected": [USER, *says("no")]}, WHOLE),  # ultrafeedback
        ({"chosen": [USER, *says("so")], "rejected": [USER, *says("no")]}, WHOLE),
        ({"prompt": "why ", "chosen": "so", "rejected": "no"}, ("why so<eos>", "why no<eos>")),
        ({"prompt": "why ", "chosen": "why so", "rejected": "why no"}, ("why so<eos>", "why no<eos>")),
        ({"prompt": "", "chosen": "so<eos>", "rejected": "no"}, ("so<eos>", "no<eos>")),
        # An answer may begin with the words of the question, and a user may ask twice.
        ({"prompt": "no", "chosen": "no idea", "rejected": "yes"}, ("nono idea<eos>", "noyes<eos>")),
        (
            {"prompt": [USER, *says("so"), USER], "chosen": says("so"), "rejected": says("no")},
            tuple(ASKED + "<|assistant|>so<eos>" + text for text in WHOLE),
        ),
    ],
)
def test_the_prompt_stands_once_in_what_is_trained_on(make, row, expected):
    assert read([row] * 2, make=make) == [expected] * 2


def test_a_row_that_does_not_repeat_its_prompt_keeps_it_whatever_the_others_do():
    begin = {"prompt": "why ", "chosen": "why so", "rejected": "why no"}
    late = {"prompt": "how ", "chosen": "so", "rejected": "no"}
    with pytest.warns(UserWarning, match="begin with the text of prompt"):
        pairs = read([begin] * 300 + [late])
    assert pairs[0] == ("why so<eos>", "why no<eos>")
    assert pairs[300] == ("how so<eos>", "how no<eos>")


@BOTH
def test_pairs_get_their_own_template_arguments_and_no_keys_of_others(make):
    tokenizer = make_tokenizer(
        "{{ mood }}:{% for m in messages %}{{ m.content or '' }}{% if 'tool_calls' in m %}"
        "{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}.{% endfor %}"
    )

    def call(**arguments):
        function = {"name": "find", "arguments": arguments}
        return [{"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}]

    rows = [
        {"prompt": [USER], "chosen": call(a="x"), "rejected": says("no"), "chat_template_kwargs": {"mood": "calm"}},
        {"prompt": [USER], "chosen": call(b="x"), "rejected": says("no"), "chat_template_kwargs": {"loud": "yes"}},
    ]
    chosen = [text for text, _ in read(rows, tokenizer, make)]
    unknown = tokenizer.decode(tokenizer('{"')["input_ids"])  # no letters of this tokenizer, as in what is compared
    assert [text.split(":")[0] for text in chosen] == ["calm", ""]
    assert [("null" in text, text.count(unknown[:5])) for text in chosen] == [(False, 6), (False, 6)]


def test_a_column_tools_beside_text_is_only_a_column():
    assert read([{"chosen": "so", "rejected": "no", "tools": "hammer, saw"}]) == [("so<eos>", "no<eos>")]


def test_rendered_pairs_get_one_bos():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    rendered = read([{"chosen": "<bos>so", "rejected": "<bos>no"}], tokenizer)
    assert rendered == read([{"chosen": "so", "rejected": "no"}], tokenizer) == [("<bos>so<eos>", "<bos>no<eos>")]


GOOD = {"chosen": "so", "rejected": "no", "margin": 1.0}
CHAT = {"prompt": [USER], "chosen": says("so"), "rejected": says("no")}


@BOTH
@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [
        (GOOD, {"margin": float("nan")}, "margin is nan"),
        (GOOD, {"margin": None}, r"margin is None.*remove_columns"),
        (GOOD, {"margin": float("inf")}, "margin is inf"),
        (GOOD, {"margin": 1e300}, r"margin is 1e\+300"),
        (GOOD, {"margin": -1e38}, r"margin is -1e\+38"),
        (GOOD, {"chosen": None}, "chosen is None"),
        (GOOD, {"rejected": " "}, "rejected is ' '"),
        ({"prompt": "why", **GOOD}, {"prompt": None}, "prompt is None"),
        (CHAT, {"chosen": []}, r"chosen is \[\]"),
        (CHAT, {"rejected": says(None)}, r"rejected: message 1 has the content None"),
        (
            {**CHAT, "prompt": "why", "chosen": [USER, *says("so")], "rejected": [USER, *says("no")]},
            {"prompt": "how"},
            r"chosen: prompt is the text 'how'.*'why'",
        ),
        ({"chosen_ids": [4], "rejected_ids": [5]}, {"chosen_ids": [999]}, r"chosen_ids is \[999\]"),
        ({"chosen_ids": [4], "rejected_ids": [5]}, {"rejected_ids": []}, r"rejected_ids is \[\]"),
        ({"chosen_ids": [4], "rejected_ids": [5], "margin": 1.0}, {"margin": None}, "margin is None"),
    ],
)
def test_a_row_that_is_no_pair_is_named(make, good, bad, says):
    with pytest.raises(ValueError, match=rf"^train_dataset\[1\]: {says}"):
        read([good, {**good, **bad}], make=make)
    read([good], make=make)  # control


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"chosen": says("so"), "rejected": "no"}, "chosen is messages and rejected is text"),
        ({"chosen": "so", "rejected": says("no")}, "chosen is text and rejected is messages"),
        ({"prompt": [USER], "chosen": "so", "rejected": "no"}, "prompt is messages and chosen is text"),
        ({"prompt": "why", "chosen": says("so"), "rejected": says("no")}, "chosen: prompt is the text 'why'.*None"),
        (
            {"chosen": [{"role": "user", "content": [{"type": "image"}]}], "rejected": says("no")},
            "chosen: message 0 has a part of type 'image'",
        ),
    ],
)
def test_a_pair_of_two_kinds_is_named(row, says):
    with pytest.raises(ValueError, match=rf"^train_dataset\[0\]: {says}"):
        read([row], make=as_stream)  # an Arrow table could not hold the two kinds in one column


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        (Dataset.from_dict({"chosen": [], "rejected": []}), "pairs is empty"),
        (Dataset.from_dict({}), "pairs is empty"),
        (Dataset.from_dict({"chosen": ["so"], "answer": ["no"]}), r"no columns.*'answer'.*rename_columns"),
        (
            Dataset.from_dict({"chosen": ["a"] * 2, "rejected": ["a", "abcd"]}),
            r"usable pair.*1 of 2.*1 of 2.*s\[1\]",
        ),
    ],
)
def test_a_set_without_pairs_is_named(dataset, says):
    with pytest.raises(ValueError, match=says):
        tokenize_pairs(dataset, make_tokenizer(), max_length=3, name="pairs")


@pytest.mark.parametrize("prefix", [True, False])
def test_old_names_of_token_ids_are_taken(prefix):
    names = ["chosen_input_ids", "rejected_input_ids"] if prefix else ["input_ids_chosen", "input_ids_rejected"]
    rows = Dataset.from_dict(dict(zip(names, ([[4, 5]], [[6]]), strict=True)))
    (row,) = tokenize_pairs(rows, make_tokenizer(), max_length=None)
    assert (row["chosen_ids"], row["rejected_ids"]) == ([4, 5], [6])


@BOTH
def test_pairs_that_teach_nothing_are_left_out_and_counted(make):
    rows = [{"chosen": chosen, "rejected": "no"} for chosen in ("so", "no", "a" * 9, "no", "hm", "e" * 12)]
    with pytest.warns(UserWarning) as caught:
        assert [chosen for chosen, _ in read(rows, make=make, max_length=9)] == ["so<eos>", "hm<eos>"]
    said = " ".join(str(w.message) for w in caught)
    assert "train_dataset[1]" in said
    assert "train_dataset[2]" in said  # ten tokens with EOS
    assert "max_length=9" in said
    if make is Dataset.from_list:
        assert said.count("2 of 6 pairs") == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read(rows[::4], make=make, max_length=9)) == 2  # control


@BOTH
def test_an_answer_that_ends_with_the_user_is_named_once(make):
    good = {"prompt": [USER], "chosen": says("so"), "rejected": says("no")}
    rows = [good, {**good, "rejected": says("no", "why")}, {**good, "chosen": says("so", "why")}]
    with pytest.warns(UserWarning) as caught:
        found = read(rows, make=make)
    assert [str(w.message).partition(" ends with")[0] for w in caught] == ["train_dataset[1]: rejected"]
    assert found[1][1] == WHOLE[1] + ASKED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read([good], make=make)  # control


# In the trainer


def reward_trainer(folder, rows, **overrides) -> RewardTrainer:
    config = {
        "output_dir": str(folder / "reward"), "max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False,
        "per_device_train_batch_size": 8, "learning_rate": 0.0, "logging_steps": 1, "disable_tqdm": True,
        "save_strategy": "no", **overrides.pop("config", {}),
    }  # fmt: skip
    arguments = {"processing_class": make_tokenizer(), "peft_config": lora(), **overrides}
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    model = arguments.pop("model", None) or str(folder / "base")
    return RewardTrainer(model, RewardConfig(**config), train_dataset=rows, **arguments)


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    return tmp_path


def test_ties_are_left_out_of_accuracy(folder):
    """The head is zero, so each score is: no pair has an order, in training or in calibration."""
    rows = [{"chosen": "see the sea", "rejected": "xx"}, {"chosen": "see", "rejected": "abc"}] * 4
    trainer = reward_trainer(folder, rows, eval_dataset=Dataset.from_list(rows))
    trainer.train()
    assert trainer.state.log_history[0]["accuracy"] in (0.0, 0.5, 1.0)
    scores = trainer.calibrate()
    assert (scores.get("ties"), scores["pairs"]) == (None, 8)
    (head,) = [p for name, p in trainer.model.named_parameters() if "score" in name and p.requires_grad]
    with torch.no_grad():
        head.zero_()
    trainer.train()
    assert "accuracy" not in trainer.state.log_history[0]
    trainer.evaluate()
    assert "eval_mean_reward" in trainer.state.log_history[-1]
    assert "eval_accuracy" not in trainer.state.log_history[-1]
    scores = trainer.calibrate()
    assert (scores["ties"], scores["pairs"]) == (8, 8)
    assert scores["accuracy"] != scores["accuracy"]
    trainer.save_model()
    json.loads((folder / "reward" / "reward_model.json").read_text(), parse_constant=pytest.fail)


def test_a_stream_trains_and_the_rows_of_each_evaluation_set_are_named_by_it(folder):
    rows = [{"prompt": [USER], "chosen": [USER, *says("so")], "rejected": [USER, *says("no")]}] * 8
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    options = {"processing_class": tokenizer, "eval_dataset": {"easy": Dataset.from_list(rows)}}
    trainer = reward_trainer(folder, as_stream(rows), **options)
    trainer.train()
    (ids, _) = next(iter(trainer.get_train_dataloader()))["input_ids"][[0, -1]]
    assert tokenizer.decode(ids) == WHOLE[0]
    assert "eval_easy_loss" in trainer.evaluate()
    assert "eval_accuracy" in trainer.state.log_history[-1]
    with pytest.raises(ValueError, match=r"^hard\[1\]: margin is None"):
        margins = Dataset.from_list([{**GOOD, "margin": 1.0}, {**GOOD, "margin": None}])
        trainer.evaluate({"hard": margins})


def test_padding_without_an_embedding_is_eos(folder):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.warns(UserWarning, match=r"'\[PAD\]' has no embedding"):
        trainer = reward_trainer(folder, [{"chosen": "see the sea", "rejected": "xx"}] * 8, processing_class=tokenizer)
    trainer.train()
    assert trainer.processing_class.pad_token == "<eos>"


def eos_without_embedding():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


@pytest.mark.parametrize("instance", [True, False])
def test_eos_without_an_embedding_is_named_before_training(folder, instance):
    tokenizer = eos_without_embedding()
    if not instance:
        (folder / "base" / "model.safetensors").unlink()  # what would be loaded
    with pytest.raises(ValueError, match=r"EOS token '<\|im_end\|>' .*42.* no embedding.*\(42 tokens\)"):
        make_trainer(folder, model=make_model() if instance else str(folder / "base"), processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"EOS token '<\|im_end\|>' .* no embedding"):
        reward_trainer(folder, [{"chosen": "so", "rejected": "no"}], processing_class=tokenizer)


@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated")
@pytest.mark.parametrize("field", ["eos_token", "pad_token"])
def test_a_token_of_the_configuration_without_an_embedding_is_named(folder, field):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    with pytest.raises(ValueError, match=rf"{field}='<\|im_end\|>'.*no embedding"):
        reward_trainer(
            folder, [{"chosen": "so", "rejected": "no"}], processing_class=tokenizer, config={field: "<|im_end|>"}
        )


@pytest.mark.parametrize("instance", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_a_token_of_a_pair_without_an_embedding_is_named(folder, instance, stream):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    rows = [{"chosen": "so", "rejected": "no"}, {"chosen": "so<new>", "rejected": "no"}]
    dataset = Dataset.from_list(rows).to_iterable_dataset() if stream else rows
    model = classifier(folder / "base") if instance else None
    with pytest.raises(ValueError, match=r"train_dataset\[1\]: chosen_ids has the token '<new>' \(id 42\).* 42 tokens"):
        reward_trainer(folder, dataset, processing_class=tokenizer, model=model).train()
    embedded = classifier(folder / "base")
    embedded.resize_token_embeddings(len(tokenizer))
    reward_trainer(folder, rows, processing_class=tokenizer, model=embedded)


@pytest.mark.parametrize(("kind", "sees_padding"), [("fnet", True), ("xlnet", True), ("bert", False)])
def test_a_model_whose_scores_depend_on_padding_is_named(tmp_path, kind, sees_padding):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
    if kind == "xlnet":
        sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(make_tokenizer()), num_labels=1, pad_token_id=0, **sizes)
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    args = RewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    rows = Dataset.from_dict({"chosen": ["so"], "rejected": ["no"]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RewardTrainer(model, args, train_dataset=rows, processing_class=make_tokenizer())
    assert any("depend on the padding" in str(w.message) for w in caught) is sees_padding

"""The reward model learns an order, says how it is to be used, and scores the same wherever it is loaded."""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
import warnings

import pytest
import torch
from conftest import CHAT_TEMPLATE, lora, make_model, make_prompts, make_tokenizer, make_trainer
from datasets import Dataset
from peft import IA3Config, PeftModel, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    LlamaForSequenceClassification,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedTokenizerFast,
)

from ppo_plus import RewardConfig, RewardTrainer
from ppo_plus.rewards import Completions
from ppo_plus.rewards.adapters import template_hash


def pairs(n=64, seed=0):
    """More e is better: random letters, half of them e in the chosen one."""
    letters = random.Random(seed)
    texts = ["".join(letters.choice("abcdfgh ") for _ in range(letters.randint(4, 12))) for _ in range(n)]
    with_e = ["".join("e" if letters.random() < 0.5 else c for c in text) for text in texts]
    keep = [i for i in range(n) if "e" in with_e[i]]
    return Dataset.from_dict({"chosen": [with_e[i] for i in keep], "rejected": [texts[i] for i in keep]})


@pytest.fixture(scope="module")
def reward_adapter(base, tmp_path_factory):
    """A reward adapter trained on that base, and its trainer."""
    folder = tmp_path_factory.mktemp("reward") / "reward-adapter"
    args = RewardConfig(
        output_dir=str(folder), per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=60,
        learning_rate=3e-3, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=5,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = RewardTrainer(
        str(base), args, peft_config=lora(), train_dataset=pairs(), eval_dataset=pairs(16, seed=1),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return folder, trainer


def stand_alone_scores(base, folder, texts):
    """The scores of the reward model as anybody would load it."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = 0
    model = PeftModel.from_pretrained(model, folder).eval()
    inputs = make_tokenizer()(texts, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        return model(**{k: inputs[k] for k in ("input_ids", "attention_mask")}).logits[:, 0]


def test_what_is_saved_says_how_to_use_it(base, reward_adapter):
    folder, _ = reward_adapter
    info = json.loads((folder / "reward_model.json").read_text())
    assert info["base_model"] == str(base)
    assert info["quantization"] is None
    assert info["chat_template_sha256"] == template_hash(make_tokenizer()) is None
    held_out = pairs(16, seed=1)
    assert info["pairs"] == len(held_out) and info["step"] == 60
    scores = stand_alone_scores(base, folder, [p[k] + "<eos>" for p in held_out for k in ("chosen", "rejected")])
    chosen, rejected = scores.view(-1, 2).T
    assert info["accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert info["reward_mean"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert info["reward_std"] == pytest.approx(scores.std(unbiased=False).item(), abs=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_other_pairs_can_be_asked_for_at_any_time(base, reward_adapter, monkeypatch, training):
    folder, trainer = reward_adapter
    monkeypatch.setattr(trainer, "_calibration", {})  # and what is there is put back
    others = pairs(12, seed=2)
    trainer.model.train(training)
    found = trainer.calibrate(others)
    assert trainer.model.training == training  # a callback may ask in the middle of training
    scores = stand_alone_scores(base, folder, [p[k] + "<eos>" for p in others for k in ("chosen", "rejected")])
    chosen, rejected = scores.view(-1, 2).T
    assert found["pairs"] == len(others)
    assert found["accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert found["reward_mean"] == pytest.approx(scores.mean().item(), abs=1e-5)


def test_it_learned_the_order(reward_adapter):
    folder, _ = reward_adapter
    assert json.loads((folder / "reward_model.json").read_text())["accuracy"] > 0.85


def test_mounted_on_the_actor_it_scores_as_it_does_alone(base, reward_adapter, tmp_path):
    folder, _ = reward_adapter
    trainer = make_trainer(tmp_path, model=str(base), reward_funcs=str(folder))
    prompts = ["the film was ", "so"]
    batch = Completions(prompts, ["see the sea", "bad"], [[5], [5]])
    expected = stand_alone_scores(
        base, folder, [p + c + "<eos>" for p, c in zip(prompts, batch.completions, strict=True)]
    )
    reward = trainer.collector.rewards.rewards[0]
    before = torch.tensor(reward(batch))
    assert torch.allclose(before, expected, rtol=1e-4)
    trainer.train()
    assert torch.equal(torch.tensor(reward(batch)), before)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all(".default." in name or name.startswith("value_head") for name in trained)


def test_the_actor_learns_from_the_mounted_reward_model(base, reward_adapter, tmp_path):
    folder, _ = reward_adapter
    config = {"max_steps": 60, "learning_rate": 3e-3, "kl_coef": 0.0, "logging_steps": 4}
    prompts = Dataset.from_dict({"prompt": [a + b for a in "abcd" for b in "fgh "]})
    trainer = make_trainer(tmp_path, model=str(base), reward_funcs=str(folder), config=config, train_dataset=prompts)
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1.0


def test_a_reward_adapter_of_another_base_is_named(base, reward_adapter, tmp_path):
    folder, _ = reward_adapter
    with pytest.raises(ValueError, match="score head has shape.*expected one of \\(1, 16\\)"):
        make_trainer(tmp_path, model=make_model(hidden_size=16), reward_funcs=str(folder))
    other = tmp_path / "another-llama"
    make_model(seed=1).save_pretrained(other)
    with pytest.raises(ValueError, match="trained on '.*tiny-llama', and the actor's base is '.*another-llama'"):
        make_trainer(tmp_path, model=str(other), reward_funcs=str(folder))


@pytest.mark.parametrize(
    ("options", "says"),
    [({"bias": "all"}, "bias='all'"), ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
     ({"kasa_config": {}}, "kasa_config"), ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
     ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens")],
)  # fmt: skip
def test_an_adapter_that_changes_its_base_is_no_reward_model(base, reward_adapter, tmp_path, options, says):
    """Mounted, it would change the actor's and the reference's too."""
    args = RewardConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=f"peft_config has {says}"):
        RewardTrainer(str(base), args, peft_config=lora(**options), train_dataset=pairs())
    folder = tmp_path / "changed"
    shutil.copytree(reward_adapter[0], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **options}))
    with pytest.raises(ValueError, match=f"The adapter in .*changed has {says}"):
        make_trainer(tmp_path / "out", model=str(base), reward_funcs=str(folder))


@pytest.mark.parametrize("continued", [False, True], ids=["new", "continued"])
def test_a_reward_adapter_of_another_kind_than_the_actors_is_refused(base, reward_adapter, tmp_path, continued):
    kind = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model, peft_config = (get_peft_model(make_model(), kind), None) if continued else (str(base), kind)
    with pytest.raises(ValueError, match="reward-adapter is of kind LORA, the actor's of IA3.*one kind only"):
        make_trainer(tmp_path, model=model, peft_config=peft_config, reward_funcs=str(reward_adapter[0]))


@pytest.mark.parametrize("inside", [False, True], ids=["name", "model"])
def test_a_reward_model_is_not_put_over_an_adapter(base, tmp_path, inside):
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora()).save_pretrained(tmp_path / "sft")
    model = str(tmp_path / "sft")
    if inside:
        model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    says = "transformers has loaded a frozen adapter into model" if inside else "sft' is an adapter"
    with pytest.raises(ValueError, match=f"{says}.*would silently replace it. Pass the name of its base"):
        RewardTrainer(model, RewardConfig(str(tmp_path)), peft_config=lora())


def test_another_chat_template_is_named(base, reward_adapter, tmp_path):
    from conftest import CHAT_TEMPLATE

    folder, _ = reward_adapter
    with pytest.warns(UserWarning, match="chat template"):
        make_trainer(
            tmp_path, model=str(base), reward_funcs=str(folder), processing_class=make_tokenizer(CHAT_TEMPLATE)
        )


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
INT8 = {**NF4, "load_in_4bit": False, "load_in_8bit": True}


@pytest.mark.parametrize(
    ("there", "here", "says"),
    [
        (None, None, None),
        (NF4, None, "nf4, but the actor's base is not quantized"),
        (INT8, None, "int8, but the actor's base is not quantized"),
        (None, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "not quantized, but the actor's base is nf4"),
        (INT8, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8, but the actor's base is nf4"),
        (NF4, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, None),
        ("unknown", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, None),
    ],
    ids=["alike", "nf4", "int8", "actor nf4", "both, otherwise", "both", "trained elsewhere"],
)
def test_a_base_that_was_quantized_otherwise_is_named(base, reward_adapter, tmp_path, there, here, says):
    folder = shutil.copytree(reward_adapter[0], tmp_path / "scorer")
    info = json.loads((folder / "reward_model.json").read_text())
    info.pop("quantization")
    (folder / "reward_model.json").write_text(
        json.dumps(info if there == "unknown" else {**info, "quantization": there})
    )
    quantization = None if here is None else BitsAndBytesConfig(**here)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, model=str(base), reward_funcs=str(folder), quantization_config=quantization)
    named = [str(w.message) for w in caught if "was trained on a base" in str(w.message)]
    assert len(named) == (says is not None) and all(says in message for message in named)


def test_an_adapter_folder_without_weights_is_named(tmp_path, reward_adapter):
    folder, _ = reward_adapter
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match="no adapter_model.safetensors"):
        make_trainer(tmp_path, reward_funcs=str(empty))


def classifier(labels=1):
    torch.manual_seed(3)
    model = make_model()
    config = model.config
    config.num_labels = labels
    return LlamaForSequenceClassification(config)


@pytest.mark.parametrize("end", ["<eos>", None])
def test_a_sequence_classifier_with_its_own_tokenizer(tmp_path, end):
    own = make_tokenizer(pad_token="<unk>")
    own.eos_token = end
    model = classifier()
    trainer = make_trainer(tmp_path, reward_funcs=model, reward_processing_classes=own)
    reward = trainer.collector.rewards.rewards[0]
    found = reward(Completions(["ab", "abcdef"], ["c", "d"], [[1], [1]]))
    for text, score in zip(["abc", "abcdefd"], found, strict=True):
        alone, otherwise = (
            model(**own(text + last, return_tensors="pt", return_token_type_ids=False)).logits.item()
            for last in ([end, ""] if end else ["", "<eos>"])
        )
        assert score == pytest.approx(alone, abs=1e-5)
        assert abs(score - otherwise) > 1e-3  # negative control
    assert not any(p.requires_grad for p in model.parameters())


def encoder_on_disk(folder):
    """A BERT, whose tokenizer has no EOS and ends a text in a separator itself."""
    backend = make_tokenizer().backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<bos> $A <unk>", pair="<bos> $A <unk> $B <unk>", special_tokens=[("<bos>", 1), ("<unk>", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="<bos>", sep_token="<unk>", unk_token="<unk>", pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), initializer_range=0.5, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_model_trained_as_a_whole_is_read_as_it_was_trained(tmp_path, base, kind):
    if kind == "encoder":
        base = tmp_path / "encoder"
        encoder_on_disk(base)
    args = RewardConfig(
        output_dir=str(tmp_path / "reward"), max_steps=1, per_device_train_batch_size=1, report_to="none",
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no", bf16=False,
    )  # fmt: skip
    seen = []
    one_pair = Dataset.from_dict({"chosen": ["why? so"], "rejected": ["why? no"]})
    trainer = RewardTrainer(str(base), args, train_dataset=one_pair)
    trainer.model.register_forward_pre_hook(lambda _, given, named: seen.append(named["input_ids"]), with_kwargs=True)
    trainer.train()
    trainer.save_model()
    reward = make_trainer(tmp_path / "ppo", reward_funcs=str(tmp_path / "reward")).collector.rewards.rewards[0]
    found = reward(Completions(["why? ", "why? "], ["so", "no"], [[1], [1]]))
    assert found == pytest.approx(trainer.model.eval()(input_ids=seen[0]).logits[:, 0].tolist(), abs=1e-5)
    (tmp_path / "reward" / "reward_model.json").unlink()  # control: of someone else's encoder, nothing is known
    other = make_trainer(tmp_path / "ppo", reward_funcs=str(tmp_path / "reward")).collector.rewards.rewards[0]
    apart = other(Completions(["why? ", "why? "], ["so", "no"], [[1], [1]]))
    assert (found == apart) == (kind == "decoder")


def test_a_tokenizer_that_cannot_end_a_text_is_named(tmp_path, base):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    args = RewardConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="The tokenizer has no EOS token.*eos_token"):
        RewardTrainer(str(base), args, train_dataset=pairs(4), processing_class=tokenizer)


def test_a_classifier_folder(tmp_path):
    folder = tmp_path / "classifier"
    classifier().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    trainer = make_trainer(tmp_path, reward_funcs=str(folder), eval_dataset=make_prompts(4))
    assert "eval_rewards/classifier/mean" in trainer.evaluate()


def test_a_classifier_with_two_labels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_labels=2; a reward model needs num_labels=1"):
        make_trainer(tmp_path, reward_funcs=classifier(labels=2), reward_processing_classes=make_tokenizer())


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("two labels", "is a classifier with num_labels=2"),
        ("frozen", "All weights of the model are frozen"),
        ("Mamba", "Mamba2 is no sequence classifier"),
        (None, None),
    ],
)
def test_a_model_that_no_reward_model_can_start_from_is_named(tmp_path, base, kind, says):
    folder = tmp_path / "model"
    if kind == "two labels":
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).save_pretrained(folder)
    elif kind == "Mamba":
        sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}
        Mamba2ForCausalLM(Mamba2Config(vocab_size=42, num_hidden_layers=1, **sizes)).save_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1) if kind == "frozen" else str(folder)
    model = str(base) if kind is None else model.requires_grad_(False) if kind == "frozen" else model
    options = {"train_dataset": Dataset.from_dict({"chosen": ["so"] * 4, "rejected": ["no"] * 4})}
    args = RewardConfig(str(tmp_path / "out"), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=says) if says else contextlib.nullcontext():
        RewardTrainer(model, args, processing_class=make_tokenizer(), **options)


# Every form in which TRL takes preferences


def messages(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


FORMATS = {
    "text, implicit prompt": {"chosen": "why? so", "rejected": "why? no"},
    "text, explicit prompt": {"prompt": "why? ", "chosen": "so", "rejected": "no"},
    "messages, implicit prompt": {"chosen": messages("why?", "so"), "rejected": messages("why?", "no")},
    "messages, explicit prompt": {
        "prompt": messages("why?"),
        "chosen": messages("", "so")[1:],
        "rejected": messages("", "no")[1:],
    },
}


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_preferences_come_in_every_form(base, tmp_path, form, margin):
    row = {**FORMATS[form], **({"margin": 0.5} if margin else {})}
    tokenizer = make_tokenizer(CHAT_TEMPLATE if "messages" in form else None)
    trainer = preference_trainer(base, tmp_path, [row] * 8, tokenizer)
    inputs = next(iter(trainer.get_train_dataloader()))
    texts = tokenizer.batch_decode(inputs["input_ids"][[0, -1]], skip_special_tokens=True)
    # A template writes roles; both forms of the prompt end in the same tokens.
    expected = (
        ["why? so", "why? no"] if "text" in form else ["<|user|>why?<|assistant|>so", "<|user|>why?<|assistant|>no"]
    )
    assert texts == expected
    assert ("margin" in inputs) == margin
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_a_margin_asks_for_a_wider_gap(base, tmp_path):
    """The first loss, where both answers score alike within noise, is -log sigmoid(gap - margin)."""
    losses = []
    for margin in (0.0, 3.0):
        rows = [{"chosen": "why? so", "rejected": "why? no", "margin": margin}] * 8
        trainer = preference_trainer(base, tmp_path, rows, make_tokenizer())
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    gap = -math.log(math.expm1(losses[0]))  # of chosen over rejected
    assert losses[1] == pytest.approx(math.log1p(math.exp(3.0 - gap)), abs=1e-4)


def preference_trainer(base, folder, rows, tokenizer):
    config = RewardConfig(
        output_dir=str(folder), per_device_train_batch_size=8, max_steps=1, report_to="none", use_cpu=True,
        logging_steps=1, learning_rate=0.0, disable_tqdm=True, dataloader_pin_memory=False, bf16=False,
    )  # fmt: skip
    return RewardTrainer(str(base), config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                         peft_config=lora(task_type="SEQ_CLS"))  # fmt: skip

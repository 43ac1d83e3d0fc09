"""Reward models that could not score are told when the trainer is made, by their names and rows."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from conftest import CHAT_TEMPLATE, SIZES, classifier, count_e, lora, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForTokenClassification

from ppo_plus import PPOCallback, RewardConfig, RewardTrainer
from ppo_plus.rewards import Completions

REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
)
ASK = [{"role": "user", "content": "why"}]
BRIEF = [{"role": "system", "content": "be brief"}, *ASK]


# Modules


class Own(torch.nn.Module):
    """Returns a tensor of scores, as no sequence classifier does."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(99, 1)

    def forward(self, input_ids, attention_mask=None):
        return self.embedding(input_ids).mean(1).squeeze(-1)


class Rule(torch.nn.Module):
    """Has no weights."""

    def forward(self, input_ids, **kwargs):
        return (input_ids == 8).sum(1).float()


class Fails(Own):
    """Takes other arguments."""

    def forward(self, texts):
        return texts


MODULES = {
    "Own": (Own, "Tensor without logits"),
    "Rule": (Rule, "no weights"),
    "Fails": (Fails, "TypeError.*input_ids"),
    "LlamaForTokenClassification": (
        lambda: LlamaForTokenClassification(LlamaConfig(**SIZES, num_labels=1)), r"\(1, 3, 1\)"
    ),
    "LlamaForCausalLM": (make_model, r"num_labels=2|\(1, 3, 42\)"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "case"), MODULES.items(), ids=MODULES)
def test_a_module_that_is_no_reward_model_is_named_before_the_policy_is_loaded(tmp_path, monkeypatch, name, case):
    make, says = case
    monkeypatch.setattr("ppo_plus.training.setup.load_policy_from_args", None)
    with pytest.raises(ValueError, match=f"'{name}'.*{says}"):
        make_trainer(tmp_path, reward_funcs=[count_e, make()], reward_processing_classes=[None, make_tokenizer()])


def test_a_token_classifier_is_refused_by_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "process-reward"
    LlamaForTokenClassification(LlamaConfig(**SIZES, num_labels=1)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    monkeypatch.setattr("ppo_plus.training.setup.load_policy_from_args", None)
    with pytest.raises(ValueError, match="process-reward' is a LlamaForTokenClassification"):
        make_trainer(tmp_path, reward_funcs=str(folder))


@pytest.mark.parametrize("kind", ["own", "llama"])
def test_a_reward_model_with_code_of_its_own_is_named_before_the_policy_is_loaded(tmp_path, base, monkeypatch, kind):
    folder = tmp_path / "judge"
    classifier(base).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    code = {"auto_map": {"AutoModel": "modeling.Own"}, "model_type": kind}
    (folder / "config.json").write_text(json.dumps({**config, **code}))
    if kind == "llama":  # control: a family of transformers, whose own code is used
        make_trainer(tmp_path / "out", reward_funcs=str(folder))
        return
    monkeypatch.setattr("ppo_plus.training.setup.load_policy_from_args", None)
    with pytest.raises(ValueError, match="judge' needs code from its repository"):
        make_trainer(tmp_path / "out", reward_funcs=str(folder))


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE.replace("<|", "<im>")], ids=["EOS", "template"])
def test_a_token_that_a_reward_model_does_not_embed_is_named_when_the_trainer_is_made(tmp_path, base, template):
    scorer, tokenizer = classifier(base), make_tokenizer(template)
    make_trainer(tmp_path, reward_funcs=scorer, reward_processing_classes=tokenizer)  # control
    tokenizer.add_tokens(["<im>"], special_tokens=True)
    if template is None:
        tokenizer.eos_token = "<im>"
    with pytest.raises(ValueError, match=r"has embeddings for 42 tokens.*the id 42 \('<im>'\)"):
        make_trainer(tmp_path, reward_funcs=scorer, reward_processing_classes=tokenizer)


@pytest.mark.parametrize("kind", ["decoder", "encoder", "adapter on it", "own class"])
def test_a_module_that_is_a_reward_model_is_taken_and_left_as_it_was(tmp_path, base, kind):
    class Wrapped(torch.nn.Module):
        """A module without a configuration that returns logits."""

        def __init__(self):
            super().__init__()
            self.inner = classifier(base)

        def forward(self, input_ids, attention_mask=None):
            return self.inner(input_ids=input_ids[:1], attention_mask=attention_mask[:1])

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = {
        "decoder": lambda: classifier(base),
        "encoder": lambda: BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=1, **small)),
        "adapter on it": lambda: get_peft_model(classifier(base), lora(task_type="SEQ_CLS")),
        "own class": Wrapped,
    }[kind]()
    tokenizer = make_tokenizer()
    make_trainer(tmp_path, reward_funcs=model, reward_processing_classes=tokenizer)
    assert tokenizer.pad_token == "<pad>"


# Chat templates


def reward_folder(base, folder, template):
    classifier(base).save_pretrained(folder)
    make_tokenizer(template).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("template", "says"), [(None, "no chat template"), (REFUSES_SYSTEM, "no system role")])
@pytest.mark.parametrize("dataset", ["train_dataset", "eval_dataset"])
def test_a_conversation_that_a_reward_model_cannot_render_is_named_by_its_row(
    tmp_path, base, monkeypatch, template, says, dataset
):
    folder = reward_folder(base, tmp_path / "judge", template)
    good = Dataset.from_list([{"prompt": ASK}] * 8) if template else Dataset.from_dict({"prompt": ["why"] * 8})
    bad = Dataset.from_list([{"prompt": ASK}] * 3 * bool(template) + [{"prompt": BRIEF}] * 8)
    options = {"reward_funcs": folder, "processing_class": make_tokenizer(CHAT_TEMPLATE)}
    make_trainer(tmp_path / "out", train_dataset=good, **options)  # control
    monkeypatch.setattr("ppo_plus.training.setup.load_policy_from_args", None)
    row = 3 if template else 0
    with pytest.raises(ValueError, match=rf"{dataset}\[{row}\]: the reward model 'judge'.*{says}"):
        make_trainer(tmp_path / "out", **{**options, "train_dataset": good, dataset: bad})


def test_an_answer_that_the_policys_own_template_refuses_is_named_for_a_reward_adapter(tmp_path, base, reward_adapter):
    asks_only = (
        "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('no answers') }}{% endif %}" + CHAT_TEMPLATE
    )
    with pytest.raises(ValueError, match=rf"train_dataset\[0\]: the reward model '{reward_adapter.name}'.*no answers"):
        make_trainer(
            tmp_path, model=str(base), reward_funcs=str(reward_adapter), processing_class=make_tokenizer(asks_only),
            train_dataset=Dataset.from_list([{"prompt": ASK}] * 8),
        )  # fmt: skip


def test_an_encoder_without_a_template_reads_pairs_of_any_conversation(tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=1, **small)).save_pretrained(tmp_path / "judge")
    make_tokenizer().save_pretrained(tmp_path / "judge")
    rows = Dataset.from_list([{"prompt": BRIEF}] * 8)
    options = {"processing_class": make_tokenizer(CHAT_TEMPLATE), "train_dataset": rows}
    assert make_trainer(tmp_path / "out", reward_funcs=str(tmp_path / "judge"), **options).collector.rewards.names
    (tmp_path / "judge" / "reward_model.json").write_text(json.dumps({}))  # nothing said: not trained by RewardTrainer
    assert make_trainer(tmp_path / "out", reward_funcs=str(tmp_path / "judge"), **options).collector.rewards.names


def test_a_template_is_named_when_other_prompts_are_scored_later():
    batch = Completions([BRIEF], [[{"role": "assistant", "content": "so"}]], [[5]])
    with pytest.raises(ValueError, match="be brief.*no system role"):
        batch.texts(make_tokenizer(REFUSES_SYSTEM), {})


# What the generation prompt begins


def test_what_the_generation_prompt_begins_is_part_of_the_answer_for_reward_models(tmp_path):
    """As if the dataset had begun the answer with it: the policy's prompt has the same ids."""
    begins = make_tokenizer(CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>think:{% endif %}"))
    plain, seen = make_tokenizer(CHAT_TEMPLATE), []

    class Look(PPOCallback):
        def on_rollout_end(self, args, state, control, samples, **kwargs):
            seen.append((samples.completions.texts(plain, {}), samples.completions.pairs()))

    for tokenizer, prompt in ((begins, ASK), (plain, [*ASK, {"role": "assistant", "content": "think:"}]), (plain, ASK)):
        rows = Dataset.from_list([{"prompt": prompt}] * 8)
        config = {"max_steps": 1, "num_ppo_epochs": 1, "num_mini_batches": 1, "response_length": 4}
        make_trainer(
            tmp_path, processing_class=tokenizer, train_dataset=rows, callbacks=[Look()], config=config
        ).train()
    assert seen[0] == seen[1] and "<|assistant|>think:" in seen[0][0][0]
    assert seen[0][1][0][1].startswith("think:") and "think:" not in seen[2][0][0]  # control


# Tokens that a chat template adds


def preferences():
    answers = {name: [*ASK, {"role": "assistant", "content": name[0]}] for name in ("chosen", "rejected")}
    return Dataset.from_list([answers] * 8)


def test_a_template_that_adds_tokens_is_refused_for_an_adapter(tmp_path, base):
    other = make_tokenizer(CHAT_TEMPLATE)
    other.add_tokens(["<|im_end|>"], special_tokens=True)
    other.save_pretrained(tmp_path / "template")
    options = {"peft_config": lora(), "train_dataset": preferences(), "processing_class": make_tokenizer()}
    args = RewardConfig(str(tmp_path), report_to="none", use_cpu=True, chat_template_path=str(tmp_path / "template"))
    with pytest.raises(ValueError, match=r"chat_template_path.*<\|im_end\|>"):
        RewardTrainer(str(base), args, **options)
    (tmp_path / "template.jinja").write_text(CHAT_TEMPLATE)
    args = dataclasses.replace(args, chat_template_path=str(tmp_path / "template.jinja"))
    assert RewardTrainer(str(base), args, **options).processing_class.chat_template == CHAT_TEMPLATE  # control


def test_an_adapter_that_trains_tokens_that_the_base_lacks_is_named(tmp_path, base, reward_adapter, monkeypatch):
    config = json.loads((reward_adapter / "adapter_config.json").read_text())
    folder = tmp_path / "reward"
    folder.mkdir()
    for file in reward_adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr("ppo_plus.training.setup.load_policy_from_args", None)
    for indices in ([42, 43], {"embed_tokens": [1, 42]}):
        changed = {**config, "trainable_token_indices": indices}
        (folder / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="token 4[23].*42"):
            make_trainer(tmp_path / "out", model=str(base), reward_funcs=str(folder))

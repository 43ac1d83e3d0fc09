"""From preferences to PPO on bases of many families: text alone, multimodal, and without a classifier of their own."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import count_e, lora, make_tokenizer, make_trainer
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_architectures import TARGETS, build
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from ppo_plus import PPOCallback, RewardConfig, RewardTrainer
from ppo_plus.models.classifier import register_sequence_classifier

PAIRS = Dataset.from_dict({"chosen": ["a warm film"] * 4, "rejected": ["a cold dull one"] * 4})
WITHOUT_CLASSIFIER = ["Cohere", "Falcon-H1", "Gemma 3n", "Gemma 4, with vision", "Granite 4", "LFM 2", "SmolVLM"]
WITH_ONE = ["Llama", "Gemma 3, with vision", "Qwen3.5, with vision"]


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What a test lets transformers know, it forgets afterward."""
    monkeypatch.setattr(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "_extra_content", {})


def on_disk(family, folder):
    model = build(family)
    model.config.get_text_config().pad_token_id = 0
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def train_reward_model(family, base, folder):
    """A reward adapter after two steps, and what trained it."""
    args = RewardConfig(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    adapter = lora(target_modules=TARGETS.get(family, "all-linear"))
    trainer = RewardTrainer(base, args, peft_config=adapter, train_dataset=PAIRS, processing_class=make_tokenizer())
    trainer.train()
    trainer.save_model()
    return trainer.model.eval()


class Kept(PPOCallback):
    """The answers of the last rollout and their scores."""

    def on_rollout_end(self, args, state, control, samples, **kwargs):
        texts = zip(samples.completions.prompts, samples.completions.completions, strict=True)
        self.texts, self.scores = [prompt + answer for prompt, answer in texts], samples.rewards[:, 0]


@pytest.mark.parametrize("family", [*WITH_ONE, *WITHOUT_CLASSIFIER])
def test_a_reward_adapter_scores_on_the_actors_base_as_by_itself(family, tmp_path):
    base = on_disk(family, tmp_path / "base")
    alone = train_reward_model(family, base, tmp_path / "reward")
    kept = Kept()
    trainer = make_trainer(
        tmp_path / "ppo", model=base, reward_funcs=str(tmp_path / "reward"), config={"max_steps": 4}, callbacks=[kept],
        peft_config=lora(target_modules=TARGETS.get(family, "all-linear")),
    )  # fmt: skip
    trainer.train()
    assert type(trainer.model.language_model) is type(build(family)) or family == "Qwen3.5, with vision"

    def scores(model):
        with torch.no_grad():
            rows = [make_tokenizer()(text + "<eos>", return_tensors="pt")["input_ids"] for text in kept.texts]
            return torch.tensor([model(input_ids=ids).logits.item() for ids in rows])

    assert (kept.scores - scores(alone)).abs().max() < 1e-4
    with alone.disable_adapter():
        assert (kept.scores - scores(alone)).abs().max() > 1e-2  # negative control


@pytest.mark.parametrize("family", WITHOUT_CLASSIFIER)
def test_a_family_gets_the_classifier_that_others_have(family, tmp_path):
    """From the files of its language model, with everything in place that no file holds."""
    base = on_disk(family, tmp_path)
    config = transformers.AutoConfig.from_pretrained(base)
    assert type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    register_sequence_classifier(config)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        found = classifier(input_ids=ids, attention_mask=mask).logits
        plain = build(family).base_model
        rows = [plain(input_ids=row[None, : mask[i].sum()]).last_hidden_state[0, -1] for i, row in enumerate(ids)]
    assert (found - torch.stack(rows) @ classifier.score.weight.T).abs().max() < 1e-5
    assert (found[0] - found[1]).abs() > 1e-3


def test_classifiers_of_transformers_stay_what_they_are():
    register_sequence_classifier(build("Llama").config)
    with pytest.raises(ValueError, match="Mamba is no sequence classifier"):
        register_sequence_classifier(build("Mamba").config)
    assert MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING._extra_content == {}


def adapter_of_the_whole(folder, base, change=lambda weights: None):
    """An adapter as fine-tuning saves it where all of Qwen3.5 was loaded, and the whole model with it."""
    whole = get_peft_model(build("Qwen3.5, with vision"), lora())
    torch.manual_seed(1)
    for name, parameter in whole.named_parameters():
        if "lora_B" in name and ".visual." not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    whole.save_pretrained(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    assert any(".visual." in key for key in weights) and any(".language_model." in key for key in weights)
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return whole.eval()


def test_an_adapter_of_a_whole_multimodal_model_is_trained_further_on_its_language_model(tmp_path):
    base = on_disk("Qwen3.5, with vision", tmp_path / "base")
    whole = adapter_of_the_whole(tmp_path / "sft", base)
    trainer = make_trainer(
        tmp_path / "ppo", model=str(tmp_path / "sft"), peft_config=None, reward_funcs=count_e, config={"max_steps": 4}
    )
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    policy = trainer.model.policy.eval()
    with torch.no_grad():
        expected = whole(input_ids=ids).logits
        assert (policy(input_ids=ids).logits - expected).abs().max() < 1e-5
        with whole.disable_adapter():
            assert (whole(input_ids=ids).logits - expected).abs().max() > 0.1  # negative control
    trainer.train()
    trainer.save_model()
    again = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        trained = trainer.model.eval().policy(input_ids=ids).logits
        found = PeftModel.from_pretrained(again, tmp_path / "ppo").eval()(input_ids=ids).logits
    assert (found - trained).abs().max() < 1e-6 and (trained - expected).abs().max() > 1e-4


def see(weights):
    """As if images had taught the tower something."""
    next(tensor for key, tensor in weights.items() if ".visual." in key and "lora_B" in key).fill_(1.0)


def forget(weights):
    del weights[next(key for key in weights if "layers.1.mlp.up_proj.lora_A" in key)]


@pytest.mark.parametrize(("change", "named"), [(see, r"unexpected \[.*visual"), (forget, r"missing \[.*up_proj")])
def test_an_adapter_that_loses_something_on_its_way_is_refused(tmp_path, change, named):
    base = on_disk("Qwen3.5, with vision", tmp_path / "base")
    adapter_of_the_whole(tmp_path / "sft", base, change)
    with pytest.raises(ValueError, match=f"The adapter in .*sft does not fit this model: .*{named}"):
        make_trainer(tmp_path / "ppo", model=str(tmp_path / "sft"), peft_config=None, reward_funcs=count_e)


def test_the_card_loads_a_multimodal_base_with_its_own_class(tmp_path):
    base = on_disk("SmolVLM", tmp_path / "base")
    trainer = make_trainer(tmp_path / "ppo", model=base, config={"max_steps": 4})
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "ppo" / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained(" in card and "AutoModelForCausalLM" not in card


@pytest.mark.parametrize("family", ["Llama", "SmolVLM"])
def test_what_finds_a_model_finds_its_configuration_too(tmp_path, family):
    """Which class loads it is asked of the configuration first, wherever that is."""
    model, tokenizer, inner = build(family), make_tokenizer(), {"subfolder": "inner"}
    model.save_pretrained(tmp_path / "inner")
    for options in (inner, {**inner, "config": model.config}):
        config = {"model_init_kwargs": options}
        trainer = make_trainer(tmp_path / "ppo", model=str(tmp_path), processing_class=tokenizer, config=config)
        assert type(trainer.model.language_model) is type(model)
    args = RewardConfig(str(tmp_path / "reward"), model_init_kwargs=inner, report_to="none", use_cpu=True)
    reward = RewardTrainer(str(tmp_path), args, peft_config=lora(), train_dataset=PAIRS, processing_class=tokenizer)
    assert reward.model.get_base_model().num_labels == 1

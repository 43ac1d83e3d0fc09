"""Where a reward model's score is read never depends on whose padding token is set.

The oracle is the reward model by itself, in plain transformers and PEFT, one text at a time, which needs no padding.
"""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from conftest import classifier, lora, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    CanineConfig,
    FNetConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
)

from ppo_plus import RewardConfig, RewardTrainer
from ppo_plus.models.score_heads import pool_last_token
from ppo_plus.rewards import ClassifierReward, Completions

BATCH = Completions(["the sea", "so", "why not"], [" is", " x", ", he asked"], [[10, 11, 12], [5], [6]])
TEXTS = [prompt + completion + "<eos>" for prompt, completion in zip(BATCH.prompts, BATCH.completions, strict=True)]
EOS, PAD = 2, 0


def one_by_one(model, texts=TEXTS):
    """Scores of the model alone, by its own configuration."""
    tokenizer = make_tokenizer()
    with torch.no_grad():
        return [model.eval()(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits.item() for text in texts]


def random_adapter(base, folder, config_pad=PAD):
    """An adapter of a sequence classifier, saved by PEFT alone, and the classifier with it."""
    config = lora(task_type="SEQ_CLS", modules_to_save=["score"], init_lora_weights=False)
    model = get_peft_model(classifier(base), config)
    with torch.no_grad():
        model.base_model.model.score.weight.mul_(30)
    model.save_pretrained(folder)
    model.config.pad_token_id = config_pad
    return model


def mounted(tmp_path, base, folder, **overrides):
    return make_trainer(
        tmp_path / "out", model=str(base), reward_funcs=str(folder), **overrides
    ).collector.rewards.rewards[0]


@pytest.mark.parametrize("policy_pad", ["<pad>", "<eos>", "z"])
def test_an_adapter_scores_as_alone_whatever_pads_the_policy(tmp_path, base, policy_pad):
    alone = one_by_one(random_adapter(base, tmp_path / "reward"))
    reward = mounted(tmp_path, base, tmp_path / "reward", processing_class=make_tokenizer(pad_token=policy_pad))
    assert reward(BATCH) == pytest.approx(alone, abs=1e-5)
    before_eos = one_by_one(random_adapter(base, tmp_path / "reward", EOS))
    assert max(abs(a - b) for a, b in zip(alone, before_eos, strict=True)) > 0.1  # control: EOS counts


@pytest.mark.parametrize("policy_pad", ["<pad>", "<eos>"])
@pytest.mark.parametrize("recorded", ["reward_model.json", "tokenizer_config.json", "config.json of the base"])
def test_an_adapter_trained_with_eos_as_padding_scores_as_alone(tmp_path, base, policy_pad, recorded):
    alone = one_by_one(random_adapter(base, tmp_path / "reward", EOS))
    if recorded == "reward_model.json":
        (tmp_path / "reward" / recorded).write_text(json.dumps({"base_model": str(base), "pad_token_id": EOS}))
    elif recorded == "tokenizer_config.json":
        make_tokenizer(pad_token="<eos>").save_pretrained(tmp_path / "reward")
    else:
        base = tmp_path / "base"
        make_model(pad_token_id=EOS).save_pretrained(base)
        make_tokenizer().save_pretrained(base)
        alone = one_by_one(random_adapter(base, tmp_path / "reward", EOS))
    reward = mounted(tmp_path, base, tmp_path / "reward", processing_class=make_tokenizer(pad_token=policy_pad))
    assert reward(BATCH) == pytest.approx(alone, abs=1e-5)


def test_the_padding_token_that_was_set_on_a_loaded_policy_does_not_count(tmp_path, base):
    alone = one_by_one(random_adapter(base, tmp_path / "reward"))
    policy = make_model()
    policy.config.pad_token_id = EOS
    reward = make_trainer(tmp_path / "out", model=policy, reward_funcs=str(tmp_path / "reward")).collector.rewards
    assert reward.rewards[0](BATCH) == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("pad_token", ["<pad>", "<eos>", None])
def test_what_reward_trainer_trained_scores_as_alone_for_another_padding_token(tmp_path, base, pad_token):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = pad_token
    args = RewardConfig(str(tmp_path / "reward"), max_steps=1, learning_rate=0.1, report_to="none", use_cpu=True)
    pairs = Dataset.from_dict({"chosen": ["see the sea"] * 8, "rejected": ["xx"] * 8})
    trainer = RewardTrainer(
        str(base), args, peft_config=lora(init_lora_weights=False), train_dataset=pairs, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()
    recorded = PAD if pad_token == "<pad>" else EOS  # TRL takes EOS where there is none
    assert json.loads((tmp_path / "reward" / "reward_model.json").read_text())["pad_token_id"] == recorded
    model = PeftModel.from_pretrained(classifier(base), tmp_path / "reward")
    model.config.pad_token_id = recorded
    for policy_pad in ("<pad>", "<eos>"):
        reward = mounted(tmp_path, base, tmp_path / "reward", processing_class=make_tokenizer(pad_token=policy_pad))
        assert reward(BATCH) == pytest.approx(one_by_one(model), abs=1e-5)


def test_a_damaged_padding_token_is_named(tmp_path, base):
    random_adapter(base, tmp_path / "reward")
    (tmp_path / "reward" / "reward_model.json").write_text(json.dumps({"pad_token_id": "<pad>"}))
    with pytest.raises(ValueError, match="pad_token_id.*'<pad>'"):
        mounted(tmp_path, base, tmp_path / "reward")


CLASSIFIER_PADS = {"pad": PAD, "eos": EOS, "absent": None, "of old": -1, "a letter": 30}


@pytest.mark.parametrize("own", CLASSIFIER_PADS.values(), ids=CLASSIFIER_PADS)
@pytest.mark.parametrize("tokenizer_pad", ["<pad>", "<eos>", None])
def test_a_classifier_scores_as_alone_whatever_pads_its_tokenizer(base, own, tokenizer_pad):
    model, tokenizer = classifier(base), make_tokenizer()
    tokenizer.pad_token = tokenizer_pad
    model.config.pad_token_id = own
    alone = one_by_one(copy.deepcopy(model))
    reward = ClassifierReward(model, tokenizer, "judge", batch_size=3, chat_template_kwargs={})
    assert reward(BATCH) == pytest.approx(alone, abs=1e-5)
    assert model.config.pad_token_id == own and tokenizer.pad_token == tokenizer_pad  # arguments stay as they were


def test_a_classifier_without_a_padding_token_reads_the_last_token_of_any_family():
    config = GPT2Config(vocab_size=43, n_embd=16, n_layer=1, n_head=2, n_positions=64, num_labels=1, pad_token_id=None)
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(config)
    tokenizer = make_tokenizer(pad_token="<eos>")
    reward = ClassifierReward(model, tokenizer, "judge", batch_size=3, chat_template_kwargs={})
    assert reward(BATCH) == pytest.approx(one_by_one(model), abs=1e-5)


def test_a_tokenizer_without_padding_and_without_eos_reads_the_last_token(base):
    model, tokenizer = classifier(base), make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    model.config.pad_token_id = None
    alone = one_by_one(copy.deepcopy(model), [text.removesuffix("<eos>") for text in TEXTS])
    reward = ClassifierReward(model, tokenizer, "judge", batch_size=3, chat_template_kwargs={})
    assert reward(BATCH) == pytest.approx(alone, abs=1e-5)


def test_an_encoder_that_counts_positions_from_its_padding_is_padded_with_its_own():
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=43, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1,
        max_position_embeddings=64, pad_token_id=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config).eval()
    tokenizer = make_tokenizer()  # pads with 0, which is a token to this model
    reward = ClassifierReward(
        model, tokenizer, "judge", batch_size=3, chat_template_kwargs={}, expects_single_text=True
    )
    assert reward(BATCH) == pytest.approx(one_by_one(model), abs=1e-5)


@pytest.mark.parametrize(
    ("config", "batches"),
    [
        (XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=48), False),  # reads the last position
        (CanineConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48), False),
        (FNetConfig(hidden_size=32, num_hidden_layers=2, intermediate_size=48), False),  # has no attention mask
        (BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48), True),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_classifier_that_sees_padding_scores_one_text_at_a_time(config, batches):
    config.num_labels, config.pad_token_id, config.vocab_size = 1, PAD, 42
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reward = ClassifierReward(model, make_tokenizer(), "scorer", batch_size=4, chat_template_kwargs={})
    assert ["depend on the padding" in str(w.message) for w in caught if w.category is UserWarning] == [True] * (
        not batches
    )
    alone = [reward(Completions([p], [c], [[5]]))[0] for p, c in zip(BATCH.prompts, BATCH.completions, strict=True)]
    assert reward(BATCH) == pytest.approx(alone, abs=1e-4)
    reward.pads = True
    assert (reward(BATCH) == pytest.approx(alone, abs=1e-2)) is batches


def test_the_last_token_is_found_with_padding_on_either_side():
    scores = torch.arange(8.0).view(2, 4)
    ids = torch.tensor([[0, 5, 2, 2], [5, 2, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    assert pool_last_token(scores, ids, mask).tolist() == [3.0, 5.0]
    assert pool_last_token(scores, ids, mask, 0).tolist() == [3.0, 5.0]
    assert pool_last_token(scores, ids, mask, 2).tolist() == [1.0, 4.0]  # EOS pads: both are passed over


@torch.no_grad()
def test_values_of_a_value_model_do_not_depend_on_a_padding_token(tmp_path, base):
    found = []
    for pad in ("<pad>", "<eos>"):
        value_model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=None)
        torch.nn.init.ones_(value_model.score.weight)
        model = make_trainer(tmp_path, value_model=value_model, processing_class=make_tokenizer(pad_token=pad)).model
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
        ids = torch.where(
            mask.bool(), torch.tensor([[9, 9, 9, 8, 7, 2], [9, 8, 7, 6, 5, 9]]), {"<pad>": 0, "<eos>": 2}[pad]
        )
        found.append(model.eval()(ids, mask, 3).values * mask[:, -3:])
    torch.testing.assert_close(found[0], found[1])
    assert found[0].abs().min(1).values[0] > 0

"""What a user passes to a trainer is as it was afterward, so that it serves a second trainer."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from conftest import classifier, count_e, lora, make_config, make_model, make_prompts, make_tokenizer, make_trainer
from datasets import Dataset

from ppo_plus import AdaptiveKLCallback, PPOConfig, RewardConfig, RewardTrainer

PAIRS = Dataset.from_dict({"chosen": ["see"] * 8, "rejected": ["xx"] * 8})
SHORT = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "eval_strategy": "steps",
         "eval_steps": 1, "load_best_model_at_end": True}  # fmt: skip


def values(config):
    """All fields of a configuration, with copies of those that can change in place."""
    names = [field.name for field in dataclasses.fields(config)]
    return {name: copy.deepcopy(getattr(config, name)) for name in names} | {"_n_gpu": config._n_gpu}


def rows(dataset):
    return dataset.column_names, dataset.to_list()


def without_pad():
    tokenizer = make_tokenizer(chat_template="{{ messages[0]['content'] }}")
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    return tokenizer


def described(tokenizer):
    return tokenizer.special_tokens_map, tokenizer.padding_side, tokenizer.chat_template, len(tokenizer)


@pytest.mark.parametrize("value_model", [False, True])
def test_a_run_changes_none_of_its_arguments(tmp_path, base, value_model):
    args = make_config(
        tmp_path / "out", hub_token="secret", total_episodes=64, chat_template_kwargs={"a": 1},
        model_init_kwargs={"attn_implementation": "eager"}, reward_weights=[0.5, 2.0], critic="shared", **SHORT,
    )  # fmt: skip
    tokenizer, peft_config = without_pad(), lora(modules_to_save=["norm"])
    train, evaluation = make_prompts(), {"one": make_prompts(4), "two": make_prompts(3)}
    callbacks, rewards, tokenizers = [AdaptiveKLCallback()], [count_e, zero], [None, None]
    args.metric_for_best_model = "eval_one_reward"
    before = values(args), described(tokenizer), peft_config.to_dict(), rows(train), {*evaluation}
    critic = {"value_model": classifier(base)} if value_model else {}
    given = {
        "model": str(base), "reward_funcs": rewards, "train_dataset": train, "eval_dataset": evaluation,
        "processing_class": tokenizer, "peft_config": peft_config, "reward_processing_classes": tokenizers,
    }  # fmt: skip
    trainer = make_trainer(tmp_path, args=args, callbacks=callbacks, **given, **critic)
    trainer.train()
    trainer.save_model()
    assert (values(args), described(tokenizer), peft_config.to_dict(), rows(train), {*evaluation}) == before
    assert args.hub_token == trainer.args.hub_token == "secret"
    assert len(callbacks) == 1 and rewards == [count_e, zero] and tokenizers == [None, None]
    assert trainer.args.critic == ("separate" if value_model else "shared")
    assert trainer.processing_class.pad_token == "<eos>"
    second = make_trainer(tmp_path, args=args, callbacks=callbacks, **given)
    assert second.args.critic == "shared"


def zero(completions, **_):
    return [0.0] * len(completions)


def test_a_tokenizer_keeps_a_padding_token_that_the_model_does_not_know(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.warns(UserWarning, match=r"\[PAD\]"):
        trainer = make_trainer(tmp_path, processing_class=tokenizer)
    assert tokenizer.pad_token == "[PAD]" and trainer.processing_class.pad_token == "<eos>"


def reward_args(tmp_path, **given):
    options = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "max_steps": 1}
    return RewardConfig(str(tmp_path / "rm"), **{**options, **given})


def test_a_reward_trainer_changes_none_of_its_arguments(tmp_path, base):
    args, tokenizer, config = reward_args(tmp_path, hub_token="secret"), without_pad(), lora()
    before = values(args), described(tokenizer), config.to_dict(), rows(PAIRS)
    trainer = RewardTrainer(str(base), args, peft_config=config, train_dataset=PAIRS, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    assert (values(args), described(tokenizer), config.to_dict(), rows(PAIRS)) == before
    assert trainer.args.hub_token == "secret"


def test_reward_arguments_serve_an_adapter_and_then_a_whole_model(tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    args, found = reward_args(tmp_path), []
    for config in (lora(), None):
        given = {"peft_config": config, "train_dataset": PAIRS, "processing_class": make_tokenizer()}
        trainer = RewardTrainer(str(tmp_path / "base"), args, **given)
        found.append({p.dtype for p in trainer.model.parameters() if not p.requires_grad or config is None})
    assert found == [{torch.bfloat16}, {torch.float32}]


def test_a_stream_leaves_the_arguments_of_a_reward_trainer_alone(tmp_path, base):
    args = reward_args(tmp_path)
    before = copy.deepcopy(args.accelerator_config)
    RewardTrainer(
        str(base), args, peft_config=lora(), train_dataset=PAIRS.to_iterable_dataset(),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    assert args.accelerator_config == before


def test_arguments_that_a_trainer_took_can_be_changed_for_the_next(tmp_path):
    args = make_config(tmp_path)
    first = make_trainer(tmp_path, args=args)
    args.kl_coef = 0.7
    assert first.args.kl_coef == PPOConfig.kl_coef and make_trainer(tmp_path, args=args).args.kl_coef == 0.7

"""Every common mistake gets one clear sentence: what is wrong, where, and the fix; most before any weight is loaded."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import (
    CHAT_TEMPLATE,
    LETTERS,
    Recorder,
    as_text,
    count_e,
    lora,
    make_config,
    make_model,
    make_prompts,
    make_tokenizer,
    make_trainer,
)
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import KasaConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BitsAndBytesConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from ppo_plus import PPOConfig, PPOTrainer
from ppo_plus.algo.kl import kl_estimate
from ppo_plus.data.prompts import encode_prompt
from ppo_plus.training.checkpoint import write_manifest

# Loading it raises OSError: whoever gets another error was stopped before any weight was read.
NO_WEIGHTS = "nobody/there-is-no-such-model"
STRICT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}{{ m['content'] }}{% endfor %}"
)


class Case(NamedTuple):
    """What somebody does, what the answer must say, and whether it comes before any weight is loaded."""

    act: Callable[[Path, Any], Any]
    says: str
    error: type[Exception] = ValueError
    early: bool = False


def config(says: str, **overrides) -> Case:
    return Case(lambda tmp_path, _: make_config(tmp_path, **overrides), says, early=True)


def before_weights(says: str, *, error: type[Exception] = ValueError, args=None, **overrides) -> Case:
    """A trainer whose weights cannot be loaded; `overrides` may be functions, called when the case runs."""

    def act(tmp_path, _):
        made = {k: v() if k in ("processing_class", "model") and callable(v) else v for k, v in overrides.items()}
        return make_trainer(tmp_path, config=args, **{"model": NO_WEIGHTS, **made})

    return Case(act, says, error, early=True)


def prompts(says: str, rows: list, *, tokenizer: Callable = make_tokenizer, column: str = "prompt", **columns) -> Case:
    data = {column: (rows * 16)[:16], **columns}
    return before_weights(says, train_dataset=Dataset.from_dict(data), processing_class=tokenizer)


def chat(says: str, *messages, template: str | None = CHAT_TEMPLATE) -> Case:
    return prompts(says, [list(messages)], tokenizer=lambda: make_tokenizer(chat_template=template))


def unfrozen_embeddings():
    model = get_peft_model(make_model(), lora())
    model.get_input_embeddings().requires_grad_(True)
    return model


def adapter_as_model(says: str, *, new: bool = False, base: str | None = NO_WEIGHTS, **options) -> Case:
    """The folder of an adapter as the policy, and perhaps a new one beside it."""

    def act(tmp_path, _):
        folder = tmp_path / "sft"
        get_peft_model(make_model(), lora(**options)).save_pretrained(folder)
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
        return make_trainer(tmp_path, model=str(folder), peft_config=lora() if new else None)

    return Case(act, says, early=True)


def adapter_inside(tmp_path, _):
    make_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, lora()).save_pretrained(tmp_path / "sft")
    return make_trainer(tmp_path, model=AutoModelForCausalLM.from_pretrained(tmp_path / "sft"))


def with_model(says: str, *, error: type[Exception] = ValueError, args=None, **make: Callable) -> Case:
    def act(tmp_path, _):
        return make_trainer(tmp_path, config=args, **{name: value() for name, value in make.items()})

    return Case(act, says, error)


def reward(says: str, function: Callable, *, error: type[Exception] = ValueError) -> Case:
    def act(tmp_path, _):
        made = function() if function.__name__ == "<lambda>" else function
        make_trainer(tmp_path, reward_funcs=made, config={"max_steps": 1}).train()

    return Case(act, says, error)


def checkpoint(says: str, spoil: Callable[[Path], object], *, args=None, **overrides) -> Case:
    """Resume from a checkpoint inside a rollout that somebody or something has damaged."""

    def act(tmp_path, good):
        copy = tmp_path / "checkpoint-2"
        shutil.copytree(good, copy)
        spoil(copy)
        write_manifest(copy)  # past the manifest, as if it had been damaged before it was sealed
        make_trainer(tmp_path / "out", config=args, **overrides).train(resume_from_checkpoint=str(copy))

    return Case(act, says)


def truncate(name: str, keep: float = 0.5) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return spoil


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def of_format(version: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "ppo_state_0.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": version}))

    return spoil


def of_length(n: int) -> Callable:
    def score(completions, **kwargs):
        return [0.0] * n

    return score


def always(value: object) -> Callable:
    def score(**kwargs):
        return value

    return score


def third_is(value: object) -> Callable:
    def score(completions, **kwargs):
        return [value if i == 2 else 0.0 for i in range(len(completions))]

    return score


def failing(**kwargs):
    raise KeyError("no such answer")


def without_keywords(prompts, completions):
    return [0.0] * len(prompts)


def with_a_missing_column(completions, answer, **kwargs):
    return [0.0] * len(completions)


def sentiment_head(vocab_size: int = 4 + len(LETTERS), **overrides) -> LlamaForSequenceClassification:
    settings = {**make_model().config.to_dict(), "vocab_size": vocab_size, "num_labels": 1, **overrides}
    return LlamaForSequenceClassification(type(make_model().config)(**settings))


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=48, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def without(**removed) -> Callable:
    def make() -> PreTrainedTokenizerFast:
        tokenizer = make_tokenizer()
        for name in removed:
            setattr(tokenizer, name, None)
        return tokenizer

    return make


def same_model_twice(tmp_path, _):
    model = make_model()
    make_trainer(tmp_path, model=model, ref_model=model)


def under_a_file(tmp_path, _):
    (tmp_path / "file").write_text("in the way")
    make_trainer(tmp_path / "file" / "out", model=NO_WEIGHTS)


def in_place_of_a_file(tmp_path, _):
    (tmp_path / "out").write_text("in the way")
    make_trainer(tmp_path / "out", model=NO_WEIGHTS)


def without_permission(tmp_path, _):
    # For the administrator every folder is writable, so the answer of the system is replaced.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppo_plus.training.validation.os.access", lambda path, mode: path != tmp_path)
        make_trainer(tmp_path / "out", model=NO_WEIGHTS)


def on_two_gpus(tmp_path, _):
    args = make_config(tmp_path)
    assert args.n_gpu <= 1
    args._n_gpu = 2
    make_trainer(tmp_path, model=NO_WEIGHTS, args=args)


def without_its_tokenizer(config, kind) -> Callable:
    """A reward model in a folder of its own, by name or as an instance from there."""

    def act(tmp_path, _):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        model.save_pretrained(tmp_path / "scorer")
        reward = str(tmp_path / "scorer")
        if kind == "instance":
            reward = AutoModelForSequenceClassification.from_pretrained(reward)
        make_trainer(tmp_path, model=NO_WEIGHTS, reward_funcs=reward)

    return act


SMALL_BERT = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                        num_labels=1)  # fmt: skip


def with_sharding(tmp_path, _):
    args = make_config(tmp_path)
    with pytest.MonkeyPatch.context() as patch:  # as an Accelerator with a plugin does, made after the configuration
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        PPOTrainer(NO_WEIGHTS, count_e, args, make_prompts(), processing_class=make_tokenizer(), peft_config=lora())


def stream_of(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def stream(tmp_path, _):
    make_trainer(tmp_path, model=NO_WEIGHTS, train_dataset=stream_of(make_prompts()), config={"max_steps": -1})


def stream_to_evaluate(tmp_path, _):
    make_trainer(tmp_path, model=NO_WEIGHTS, eval_dataset=stream_of(make_prompts()))


def short_stream(tmp_path, _):
    make_trainer(tmp_path, model=NO_WEIGHTS, train_dataset=stream_of(make_prompts(5)))


def other_stream(tmp_path, _):
    make_trainer(tmp_path, model=NO_WEIGHTS, train_dataset=stream_of([{"question": "why"}] * 9))


ADAPTER, HEAD, ROLLOUT = "adapter_model.safetensors", "value_head.safetensors", "rollout_0.safetensors"
USER = {"role": "user", "content": "hi"}
PROMPT_TUNING = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
PREFIX_TUNING = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)

CASES = {
    # Hyper-parameters: refused by PPOConfig itself
    "response_length 0": config("response_length must be at least 1; got 0", response_length=0),
    "response_length negative": config("response_length must be .*; got -5", response_length=-5),
    "response_length fraction": config("response_length must be a whole number.*; got 8.5", response_length=8.5),
    "response_length as text": config("response_length must be .*; got '8'", response_length="8"),
    "num_ppo_epochs 0": config("num_ppo_epochs must be .*; got 0", num_ppo_epochs=0),
    "num_ppo_epochs a truth value": config("num_ppo_epochs must be .*; got True", num_ppo_epochs=True),
    "num_mini_batches negative": config("num_mini_batches must be .*; got -1", num_mini_batches=-1),
    "batch size 0": config("per_device_train_batch_size must be .*; got 0", per_device_train_batch_size=0),
    "accumulation 0": config("gradient_accumulation_steps must be .*; got 0", gradient_accumulation_steps=0),
    "forward batch 0": config("local_rollout_forward_batch_size must be", local_rollout_forward_batch_size=0),
    "generation batch 0": config("generation_batch_size must be .* or None; got 0", generation_batch_size=0),
    "total_episodes 0": config("total_episodes must be .* or None; got 0", total_episodes=0),
    "total_episodes fraction": config("total_episodes must be a whole number.*; got 1000.0", total_episodes=1e3),
    "max_prompt_length 0": config("max_prompt_length must be .* or None; got 0", max_prompt_length=0),
    "temperature 0": config("temperature must be above 0 .*greedy.*; got 0", temperature=0),
    "temperature as text": config("temperature must be a number.*; got 'warm'", temperature="warm"),
    "temperature infinite": config("temperature must be a number.*; got inf", temperature=float("inf")),
    "top_p 0": config("top_p must be above 0 and at most 1; got 0", top_p=0),
    "top_k negative": config("top_k must be at least 0; got -1", top_k=-1),
    "min_p 1": config("min_p must be at least 0 and below 1; got 1", min_p=1),
    "gamma above 1": config("gamma must be at least 0 and at most 1; got 1.5", gamma=1.5),
    "gamma NaN": config("gamma must be a number.*; got nan", gamma=float("nan")),
    "lam negative": config("lam must be at least 0 and at most 1; got -0.1", lam=-0.1),
    "kl_coef negative": config("kl_coef must be at least 0; got -0.05", kl_coef=-0.05),
    "kl_coef from YAML without a dot": config("kl_coef must be a number .*write 3.0e-5.; got '5e-2'", kl_coef="5e-2"),
    "model_init_kwargs as text": config("model_init_kwargs must be a dict, one as JSON", model_init_kwargs="dtype=x"),
    "kl_coef None": config("kl_coef must be a number.*; got None", kl_coef=None),
    "learning_rate negative": config("learning_rate must be at least 0; got -0.1", learning_rate=-0.1),
    "value_head_learning_rate negative": config("value_head_learning_rate must be", value_head_learning_rate=-1e-4),
    "cliprange 0": config("cliprange must be above 0 and below 1; got 0", cliprange=0),
    "cliprange_value negative": config("cliprange_value must be above 0, or None; got -1", cliprange_value=-1),
    "vf_coef negative": config("vf_coef must be at least 0, or None; got -1", vf_coef=-1),
    "entropy_coef negative": config("entropy_coef must be at least 0; got -1", entropy_coef=-1),
    "missing_eos_penalty negative": config(
        "missing_eos_penalty must be at least 0, or None; got -1", missing_eos_penalty=-1
    ),
    "dual_clip at most 1": config("dual_clip must be above 1, or None; got 1", dual_clip=1),
    "dual_clip without a clip": config(
        "dual_clip has no effect with objective='kl_penalty'.*Remove it", dual_clip=3, objective="kl_penalty"
    ),
    "reward_weights not numbers": config("reward_weights must be a list of numbers.*'much'", reward_weights=["much"]),
    "reward_weights NaN": config("reward_weights must be a list of numbers.*nan", reward_weights=[float("nan")]),
    "reward_weights all 0": config(r"reward_weights must be .* got \[0.0, 0\]", reward_weights=[0.0, 0]),
    "reward_weights one number": config("reward_weights must be a list of numbers.*; got 1.0", reward_weights=1.0),
    "a switch that is text": config("train_on_eos must be one of True, False; got 'no'", train_on_eos="no"),
    "num_sample_generations fraction": config("num_sample_generations must be", num_sample_generations=2.5),
    # Names that do not exist
    "unknown estimator": config("kl_estimator must be one of 'k1', 'k2', 'k3', 'abs'; got 'k4'", kl_estimator="k4"),
    "unknown kl_penalty_in": config("kl_penalty_in must be one of 'reward', 'loss'; got 'both'", kl_penalty_in="both"),
    "unknown objective": config("objective must be one of 'clip', .*; got 'trpo'", objective="trpo"),
    "unknown critic": config("critic must be one of 'shared', .*; got 'twin'", critic="twin"),
    "unknown value head": config("value_head must be one of 'linear', 'mlp'; got 'deep'", value_head="deep"),
    "a value head that cannot go below 0": config("value_head_activation must be", value_head_activation="relu"),
    "unknown stop token": config("stop_token must be one of 'eos', or None; got 'period'", stop_token="period"),
    # Arguments that do not go together
    "k1 as a loss": config(
        "kl_penalty_in='loss' .*gradient is zero in expectation.*kl_estimator='k3'", kl_penalty_in="loss"
    ),
    "two stop tokens": config("exclude each other: keep one", stop_token="eos", stop_token_id=5),
    "auto_find_batch_size": config("auto_find_batch_size.*change the rollout size.*Remove", auto_find_batch_size=True),
    "modules for GaLore": config(
        "optim_target_modules=.* is not supported: GaLore and APOLLO", optim_target_modules=["q_proj"]
    ),
    "an optimizer inside the backward pass": config("optim=.*lomo.* is not supported", optim="lomo"),
    "the loss as the best metric": config(
        "metric_for_best_model must be .*'eval_reward'.*; got 'eval_loss'",
        lr_scheduler_type="reduce_lr_on_plateau",
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_loss",
    ),
    "a best metric of no evaluation dataset": before_weights(
        "'eval_reward' is reported for none of the datasets.*'eval_short_reward' or 'eval_long_reward'",
        args={"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2},
        eval_dataset={"short": make_prompts(), "long": make_prompts()},
    ),
    "prompts grouped by length": config(
        "train_sampling_strategy='group_by_length' is not supported: micro-batches are already sorted",
        train_sampling_strategy="group_by_length",
    ),
    "an evaluation of weights in fewer bits": config("bf16_full_eval=True is not supported", bf16_full_eval=True),
    "label smoothing": config("label_smoothing_factor=0.1 is not supported: PPO has no", label_smoothing_factor=0.1),
    "NEFTune": config("neftune_noise_alpha=5 is not supported", neftune_noise_alpha=5),
    "remove_unused_columns": config("remove_unused_columns=True is not supported", remove_unused_columns=True),
    "ignore_data_skip": config("ignore_data_skip=True is not supported", ignore_data_skip=True),
    "FSDP of one process": before_weights("fsdp=True .* over processes, and there is one", args={"fsdp": True}),
    "DeepSpeed": config("deepspeed=.* DeepSpeed, .*--accelerate_config fsdp2", deepspeed={"zero_optimization": {}}),
    "sharding that comes later": Case(with_sharding, "made an Accelerator that shards all weights", early=True),
    "two GPUs in one process": Case(on_two_gpus, "DataParallel: use accelerate launch, or show", early=True),
    "evaluation without prompts": before_weights(
        "eval_strategy='steps'.*eval_dataset", args={"eval_strategy": "steps"}
    ),
    # Datasets, prompts
    "no prompt column": prompts(
        r"train_dataset has no column 'prompt' .*\['text'\].*rename_column", ["a"], column="text"
    ),
    "an empty dataset": before_weights("train_dataset is empty", train_dataset=Dataset.from_dict({"prompt": []})),
    "no dataset": before_weights("train_dataset must be a datasets.Dataset.*None", train_dataset=None),
    "a list": before_weights(r"train_dataset must be .*list.*Dataset.from_list", train_dataset=[{"prompt": "a"}] * 16),
    "all splits": before_weights(
        r"train_dataset must be .*DatasetDict.*\['train'\]", train_dataset=DatasetDict(train=make_prompts())
    ),
    "a stream without an end": Case(stream, "train_dataset is a stream.*max_steps or total_episodes", early=True),
    "a stream to evaluate on": Case(stream_to_evaluate, "eval_dataset is a stream.*take", early=True),
    "a stream that is too short": Case(
        short_stream, "train_dataset has 5 prompts, but one rollout takes 8", early=True
    ),
    "a stream of something else": Case(
        other_stream, r"train_dataset has no column 'prompt' \(it has \['question'\]\)", early=True
    ),
    "a list for evaluation": before_weights("eval_dataset must be a datasets.Dataset", eval_dataset=[{"prompt": "a"}]),
    "no evaluation prompt column": before_weights(
        "hard has no column 'prompt'",
        eval_dataset={"hard": Dataset.from_dict({"text": ["a"]})},
    ),
    "an evaluation dataset that is called as the training one": before_weights(
        "the names 'train_dataset' and 'eval_dataset' are taken", eval_dataset={"train_dataset": make_prompts()}
    ),
    "fewer prompts than a rollout": before_weights(
        r"has 7 prompts, but one rollout takes 8 \(per_device_train_batch_size 2 x .*Add prompts, or",
        train_dataset=make_prompts(7),
    ),
    "an empty prompt": prompts(r"train_dataset\[3\] is empty; remove such rows", ["a", "b", "c", ""]),
    "a prompt of spaces": prompts(r"train_dataset\[1\] is empty; remove such rows", ["a", " \n\t "]),
    "a prompt without tokens": prompts(
        r"train_dataset\[0\] .*no tokens", ["a"], tokenizer=lambda: tokenizer_that_drops_everything()
    ),
    "None as a prompt": prompts(r"train_dataset\[2\] is None; a prompt must be text", ["a", "b", None]),
    "a number as a prompt": prompts(r"train_dataset\[0\] is 7; a prompt must be text, or a list of messages", [7]),
    "a nested list as a prompt": prompts(r"train_dataset\[0\] is \[\['a'\]\]; a prompt must be text", [[["a"]]]),
    "a list of strings as a prompt": prompts(r"train_dataset\[0\] is \['a', 'b'\]; a prompt", [["a", "b"]]),
    "a message without a role": chat(r"train_dataset\[0\] .*a list of messages such as", {"content": "hi"}),
    "a message whose role is None": chat(r"\[0\].*message 0 .*role.*None", {"role": None, "content": "hi"}),
    "a message without content": chat(r"\[0\].*message 1 .*content", USER, {"role": "user"}),
    "a message whose content is None": chat(r"\[0\].*message 0 .*content.*None", {"role": "user", "content": None}),
    "a message whose content is a number": chat(r"\[0\].*message 0 .*content.*3", {"role": "user", "content": 3}),
    "an empty list of messages": chat(r"train_dataset\[0\] is \[\]; a prompt must be"),
    "a role that the template refuses": chat(
        r"train_dataset\[0\]: the chat template cannot render .*unknown role wizard",
        {"role": "wizard", "content": "hi"},
        template=STRICT_TEMPLATE,
    ),
    "messages without a chat template": chat(
        "no chat template. Set processing_class.chat_template", USER, template=None
    ),
    "a token id out of the vocabulary": prompts(
        r"train_dataset\[0\]: input_ids has id 999, but the vocabulary has", [[5, 999]], column="input_ids"
    ),
    "a negative token id": prompts(r"train_dataset\[0\]: input_ids has id -1,", [[5, -1]], column="input_ids"),
    "no token ids": prompts(r"train_dataset\[1\]: input_ids is \[\]; it must be", [[5], []], column="input_ids"),
    "token ids that are text": prompts("input_ids is 'abc'; it must be a non-empty list", ["abc"], column="input_ids"),
    "token ids that are all padding": prompts(
        r"train_dataset\[0\].*attention_mask", [[5, 6]], column="input_ids", attention_mask=[[0, 0]] * 16
    ),
    "an attention mask of another length": prompts(
        r"train_dataset\[0\].*attention_mask has 1 .*2", [[5, 6]], column="input_ids", attention_mask=[[1]] * 16
    ),
    "a column that reward functions know as something else": before_weights(
        "train_dataset has a column 'completions'.*rename_column",
        train_dataset=make_prompts().add_column("completions", ["x"] * 16),
    ),
    # Tokenizers
    "a tokenizer without EOS": before_weights(
        "has no EOS token.*Set processing_class.eos_token", processing_class=without(eos_token=1)
    ),
    "the name of a tokenizer": before_weights(
        "processing_class must be a tokenizer; got str", processing_class=lambda: "gpt2", error=TypeError
    ),
    "a stop token out of the vocabulary": before_weights(
        "stop_token_id=5000, but the vocabulary has", args={"stop_token_id": 5000}
    ),
    # Models
    "no tokenizer and no name": with_model("has no name.*processing_class", processing_class=lambda: None),
    "something that is no model": before_weights(
        "model must be .*got Linear", error=TypeError, model=lambda: torch.nn.Linear(2, 2)
    ),
    "prompts longer than the context": with_model(
        r"train_dataset\[0\] has 6 tokens; with response_length=8 it exceeds the model's context of 12 tokens. "
        "Set max_prompt_length=4",
        model=lambda: make_model(max_position_embeddings=12),
    ),
    "a response longer than the context": with_model(
        "response_length=8 .*context of 8.*Lower response_length", model=lambda: make_model(max_position_embeddings=8)
    ),
    "a tokenizer with more tokens than the model": with_model(
        r"train_dataset\[0\] has token id \d+, but the model has embeddings for 10",
        model=lambda: make_model(vocab_size=10),
    ),
    "prompt tuning": before_weights("PromptTuningConfig is prompt learning; .*LoraConfig", peft_config=PROMPT_TUNING),
    "prefix tuning": before_weights("PrefixTuningConfig is prompt learning; .*LoraConfig", peft_config=PREFIX_TUNING),
    "an optimizer that was made before what is trained": before_weights(
        r"optimizers: the SGD came before adapter and value head.*or trainer.optimizer once",
        optimizers=(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), None),
    ),
    "biases of the base": before_weights(
        "peft_config has bias='lora_only'.*use bias='none'",
        peft_config=lora(bias="lora_only"),
    ),
    "modules to save that are one text": before_weights(
        r"peft_config has modules_to_save='score', which must be a list: write \['score'\]",
        peft_config=lora(modules_to_save="score"),
    ),
    "an adapter made of the base's weights": before_weights(
        "peft_config has init_lora_weights='olora'.*gaussian",
        peft_config=lora(init_lora_weights="olora"),
    ),
    "an adapter that cuts something out of the base's weights": before_weights(
        "peft_config has kasa_config",
        peft_config=lora(kasa_config=KasaConfig()),
    ),
    "an adapter for more layers than the base has": before_weights(
        "peft_config has layer_replication",
        peft_config=lora(layer_replication=[(0, 2), (1, 2)]),
    ),
    "an adapter that speaks only when it is called": before_weights(
        "peft_config has alora_invocation_tokens",
        peft_config=lora(alora_invocation_tokens=[5]),
    ),
    "an adapter to continue that was made of the base's weights": with_model(
        "The adapter of model has init_lora_weights='pissa_niter_2'.*path_initial_model_for_weight_conversion",
        model=lambda: get_peft_model(make_model(), lora(init_lora_weights="pissa_niter_2")),
        peft_config=lambda: None,
    ),
    "an adapter to continue with biases of the base": with_model(
        "The adapter of model has bias='all'",
        model=lambda: get_peft_model(make_model(attention_bias=True), lora(bias="all")),
        peft_config=lambda: None,
    ),
    "an adapter whose base is trained": with_model(
        r"1 weights of the adapter's base would be trained.* base_model.*embed_tokens.weight.*"
        r"modules_to_save",
        model=unfrozen_embeddings,
        peft_config=lambda: None,
    ),
    "an adapter and a config for another": with_model(
        "has an adapter already: pass it without peft_config", model=lambda: get_peft_model(make_model(), lora())
    ),
    "an adapter that is not named default": with_model(
        r"must be named 'default'; this model has \['mine'\]",
        model=lambda: get_peft_model(make_model(), lora(), adapter_name="mine"),
        peft_config=lambda: None,
    ),
    "quantization of a loaded model": with_model(
        "apply to a model that is loaded by name", quantization_config=lambda: BitsAndBytesConfig(load_in_4bit=True)
    ),
    "model_init_kwargs for a loaded model": with_model(
        "apply to a model that is loaded by name", args={"model_init_kwargs": {"dtype": "float32"}}
    ),
    "an encoder-decoder": with_model(
        "T5ForConditionalGeneration is an encoder-decoder; ppo_plus trains causal", model=t5
    ),
    "an encoder-decoder in full": with_model("is an encoder-decoder", model=t5, peft_config=lambda: None),
    "a frozen model in full": with_model(
        "All weights of the model are frozen.*peft_config",
        model=lambda: make_model().requires_grad_(False),
        peft_config=lambda: None,
    ),
    "an adapter under a new one": adapter_as_model("sft' is an adapter.*Leave peft_config out", new=True),
    "an adapter that trains its base": adapter_as_model("bias='all'", bias="all"),
    "an adapter for another task": adapter_as_model("is an adapter for SEQ_CLS; a policy", task_type="SEQ_CLS"),
    "an adapter of no base": adapter_as_model(
        "an adapter without the name of its base.*base_model_name_or_path", base=None
    ),
    "an adapter without its wrapper": Case(
        adapter_inside, "transformers has loaded a frozen adapter into model.*PeftModel.from_pretrained"
    ),
    "a model without a head": with_model(
        "LlamaModel has no language-model head", model=lambda: LlamaModel(make_model().config)
    ),
    "a classifier as policy": with_model("Classification has no language-model head", model=sentiment_head),
    "the model as its own reference": Case(
        same_model_twice, "ref_model is the model that is trained.*leave ref_model out"
    ),
    "the name of a reference": before_weights("ref_model must be a model.*got str", error=TypeError, ref_model="gpt2"),
    "a reference of another vocabulary": with_model(
        "ref_model has a vocabulary of 20, the tokenizer one of 42: .*same tokenizer",
        ref_model=lambda: make_model(vocab_size=20),
    ),
    # Rewards, before training
    "no reward": before_weights("Pass reward_funcs or its other name reward_model; got neither", reward_funcs=None),
    "both names of the reward": before_weights("reward_model; got both", reward_model=count_e),
    "an empty list of rewards": before_weights("needs reward_funcs: a function, a reward model", reward_funcs=[]),
    "a reward that is a number": before_weights("A reward must be .*got 3", reward_funcs=3, error=TypeError),
    "too few weights": before_weights(
        "reward_weights has 1 numbers for 2 reward functions",
        reward_funcs=[count_e, count_e],
        args={"reward_weights": [1.0]},
    ),
    "too many reward tokenizers": before_weights(
        "reward_processing_classes has 2 entries for 1 reward functions", reward_processing_classes=[None, None]
    ),
    "a reward function without keywords": before_weights(
        r"reward function 'without_keywords' .*end its signature with \*\*kwargs", reward_funcs=without_keywords
    ),
    "a reward function that wants a missing column": before_weights(
        "reward function 'with_a_missing_column' .*answer.*columns of train_dataset", reward_funcs=with_a_missing_column
    ),
    "a reward model of two labels": with_model(
        "has num_labels=2; a reward model needs num_labels=1", reward_funcs=lambda: sentiment_head(num_labels=2)
    ),
    # Rewards, what functions return
    "an encoder without its tokenizer": Case(  # transformers makes up one that knows five tokens
        without_its_tokenizer(SMALL_BERT, "name"), "scorer' was saved without a tokenizer.*Pass", early=True
    ),
    "an encoder from a folder without its tokenizer": Case(
        without_its_tokenizer(SMALL_BERT, "instance"),
        "scorer' was saved without .*reward_processing_classes",
        early=True,
    ),
    "a decoder without its tokenizer": Case(
        without_its_tokenizer(sentiment_head().config, "name"),
        "scorer' cannot be loaded: .*Pass the reward",
        early=True,
    ),
    "too few rewards": reward("'score' returned 7 rewards for 8 completions", of_length(7)),
    "too many rewards": reward("'score' returned 9 rewards for 8 completions", of_length(9)),
    "nothing": reward("'score' returned None; it must return a list with one number per completion", always(None)),
    "one number": reward("'score' returned 1.5; it must return a list", always(1.5)),
    "a tensor without dimensions": reward("'score' returned 1.5; it must return a list", always(torch.tensor(1.5))),
    "an array without dimensions": reward("'score' returned .*1.5.*; it must return a list", always(np.array(1.5))),
    "a text": reward("'score' returned '12345678'; it must return a list", always("12345678")),
    "a dict": reward("'score' returned {.*}; it must return a list", always({float(i): 1.0 for i in range(8)})),
    "a set": reward("'score' returned {.*}; it must return a list", always({float(i) for i in range(8)})),
    "beyond float": reward("'score' returned 1000.* for prompt '.+'.*; return a finite", third_is(10**400)),
    "NaN": reward("'score' returned nan for prompt '.+' with completion '.*'; return a finite", third_is(float("nan"))),
    "infinity": reward("'score' returned -inf for prompt", third_is(float("-inf"))),
    "a text among numbers": reward("'score' returned '1.0' for prompt", third_is("1.0")),
    "a list among numbers": reward("returned 1 numbers for prompt .* completion has [0-9]+ tokens", third_is([1.0])),
    "an exception": reward("reward function 'failing'", failing, error=KeyError),
    "a reward model with a smaller vocabulary": reward(
        "reward model .* has embeddings for 10 tokens, .* id .*reward_processing_classes", lambda: sentiment_head(10)
    ),
    # Files
    "an output folder under a file": Case(under_a_file, "output_dir .*file is not a folder", early=True),
    "an output folder without permission": Case(without_permission, "output_dir .* is not writable", early=True),
    "an output folder that is a file": Case(in_place_of_a_file, "output_dir .*out is not a folder", early=True),
    "a truncated value head": checkpoint(f"{HEAD} cannot be read .*earlier checkpoint", truncate(HEAD)),
    "a value head of zeros": checkpoint(f"{HEAD} cannot be read", overwrite(HEAD, b"\0" * 200)),
    "no value head": checkpoint(f"has no {HEAD}", remove(HEAD)),
    "another value head": checkpoint(
        "value head in .* does not fit.*value_head", lambda folder: None, args={"value_head": "mlp"}
    ),
    "a truncated adapter": checkpoint(f"{ADAPTER} cannot be read .*earlier checkpoint", truncate(ADAPTER)),
    "an adapter cut in its header": checkpoint(f"{ADAPTER} cannot be read", truncate(ADAPTER, 0.01)),
    "no adapter": checkpoint(f"has no {ADAPTER}", remove(ADAPTER)),
    "an empty adapter": checkpoint(f"{ADAPTER} cannot be read", overwrite(ADAPTER, b"")),
    "an adapter of another size": checkpoint(
        "adapter in .* does not fit this model", lambda f: None, peft_config=lora(r=2, lora_alpha=4)
    ),
    "an adapter of other layers": checkpoint(
        "adapter in .* does not fit this model", lambda f: None, peft_config=lora(target_modules=["q_proj"])
    ),
    "an adapter of another architecture": checkpoint(
        "base_weights .* there, .* here", lambda f: None, model=make_model(hidden_size=16, num_hidden_layers=1)
    ),
    "a truncated rollout": checkpoint(f"{ROLLOUT} cannot be read .*earlier checkpoint", truncate(ROLLOUT)),
    "an empty rollout": checkpoint(f"{ROLLOUT} cannot be read", overwrite(ROLLOUT, b"")),
    "a rollout of another version": checkpoint(
        "is not a rollout of this version.*lacks", lambda f: shutil.copy(f / HEAD, f / ROLLOUT)
    ),
    "a truncated state": checkpoint(
        "ppo_state_0.json cannot be read .*earlier checkpoint", truncate("ppo_state_0.json")
    ),
    "a newer version": checkpoint("was written by a newer ppo_plus .format 99.*Upgrade", of_format(99)),
    "an older version": checkpoint("was written by an older ppo_plus .format 1,.*from its adapter", of_format(1)),
    "a version in words": checkpoint(
        "ppo_state_0.json was not written by ppo_plus.*format_version is '2'", of_format("2")
    ),
    "no version": checkpoint("ppo_state_0.json was not written by ppo_plus.*format_version is None", of_format(None)),
    "no state of PPO": checkpoint("has no ppo_state_0.json, so training cannot resume", remove("ppo_state_0.json")),
    "no checkpoint at all": Case(
        lambda tmp_path, _: make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9")),
        "checkpoint-9.: there is no such folder",
    ),
}


def tokenizer_that_drops_everything() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("."), "")
    return tokenizer


@pytest.fixture(scope="module")
def good_checkpoint(tmp_path_factory):
    """A checkpoint in the middle of the first rollout."""
    folder = tmp_path_factory.mktemp("good")
    make_trainer(folder, config={"max_steps": 2, "save_strategy": "steps", "save_steps": 2}).train()
    return folder / "checkpoint-2"


@pytest.mark.parametrize("name", CASES)
def test_the_mistake_is_named_with_its_place_and_fix(name, tmp_path, request):
    case = CASES[name]
    needs_checkpoint = case.act.__qualname__.startswith("checkpoint.")
    good = request.getfixturevalue("good_checkpoint") if needs_checkpoint else None
    with pytest.raises(case.error, match=case.says) as caught:
        case.act(tmp_path, good)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_most_mistakes_are_seen_before_any_weight_is_loaded():
    assert len(CASES) >= 60
    assert sum(case.early for case in CASES.values()) > len(CASES) / 2


def test_without_a_mistake_the_weights_are_reached(tmp_path):
    """Control: what stops the early cases is their mistake, and not the model that does not exist."""
    with pytest.raises(OSError, match="cached files"):
        make_trainer(tmp_path, model=NO_WEIGHTS)


def test_an_undamaged_checkpoint_is_resumed(tmp_path, good_checkpoint):
    """Control: what stops the cases with a checkpoint is the damage."""
    trainer = make_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=str(good_checkpoint))
    assert trainer.state.global_step == 8


# Odd, and allowed: each with the behavior that is promised


def trained(tmp_path, *, config=None, **overrides):
    seen = Recorder()
    trainer = make_trainer(tmp_path, config={"max_steps": 4, **(config or {})}, callbacks=[seen], **overrides)
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    return trainer, weights, seen


def right_padding() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "right"
    return tokenizer


@pytest.mark.parametrize("make", [right_padding, without(pad_token=1)], ids=["right-padding", "without pad"])
def test_how_the_tokenizer_pads_makes_no_difference(make, tmp_path):
    """The second one takes EOS as padding, so that ids in the padding differ; nothing that is learned does."""
    _, expected, _ = trained(tmp_path)
    trainer, found, _ = trained(tmp_path, processing_class=make())
    assert torch.equal(expected, found)
    if make is not right_padding:
        assert trainer.processing_class.pad_token_id == trainer.processing_class.eos_token_id == 2
        assert trainer.collector.stop_ids == [2]


def test_as_many_prompts_as_one_rollout_and_prompts_that_just_fit_are_enough(tmp_path):
    longest = max(len(text) for text in make_prompts(8)["prompt"])
    model = make_model(max_position_embeddings=longest + 8)
    trainer, _, _ = trained(tmp_path, model=model, train_dataset=make_prompts(8))
    assert trainer.state.global_step == 4
    with pytest.raises(ValueError, match=f"context of {longest + 7}"):
        make_trainer(tmp_path, model=make_model(max_position_embeddings=longest + 7), train_dataset=make_prompts(8))


def test_longer_prompts_keep_their_last_tokens_if_asked(tmp_path):
    model = make_model(max_position_embeddings=12)
    trainer = make_trainer(tmp_path, model=model, config={"max_prompt_length": 4})
    tokenizer = make_tokenizer()
    for row in trainer.train_dataset:
        assert tokenizer.decode(row["input_ids"]) == row["prompt"][-4:]


@pytest.mark.parametrize(
    ("kind", "convert"),
    [
        ("integers", lambda scores: [int(s) for s in scores]),
        ("truth values", lambda scores: [bool(s) for s in scores]),
        ("tuple", tuple),
        ("array", np.array),
        ("half precision tensor", lambda scores: torch.tensor(scores, dtype=torch.float16)),
        ("tensors", lambda scores: [torch.tensor(s) for s in scores]),
        ("numpy scalars", lambda scores: [np.float32(s) for s in scores]),
    ],
)
def test_rewards_may_come_as(kind, convert, tmp_path):
    def score(completions, **kwargs):
        return convert([float("e" in c) for c in completions])

    _, _, seen = trained(tmp_path, reward_funcs=score, config={"max_steps": 1, "missing_eos_penalty": None})
    expected = [float("e" in c) for c in seen.samples[0].completions.completions]
    assert seen.rollouts[0].sequence_scores.tolist() == expected
    assert len(set(expected)) == 2


def test_a_reward_of_none_leaves_the_response_out_of_learning(tmp_path):
    def score(completions, **kwargs):
        return [None if i in (1, 4) else 1.0 for i in range(len(completions))]

    with pytest.warns(UserWarning, match="returned None for 2 of 8 responses, which are excluded from training"):
        _, _, seen = trained(tmp_path, reward_funcs=score, config={"max_steps": 1})
    learned = seen.rollouts[0].action_mask.any(1)
    assert learned.tolist() == [True, False, True, True, False, True, True, True]


@pytest.mark.parametrize("name", ["default", "ref", "model", "0", "lora_A"])
def test_a_reward_adapter_in_a_folder_named_like_the_actors_adapter_or_a_module_is_not_mixed_up_with_it(name, tmp_path):
    settings = lora(task_type="SEQ_CLS", modules_to_save=["score"], init_lora_weights=False)
    get_peft_model(sentiment_head(), settings).save_pretrained(tmp_path / name)
    trainer, weights, _ = trained(tmp_path / "out", reward_funcs=str(tmp_path / name))
    assert trainer.collector.rewards.names == [f"{name}_2"]
    learned = [n for n, p in trainer.model.policy.named_parameters() if p.requires_grad]
    assert len(learned) == 28 and all(".default." in n for n in learned)
    assert weights.isfinite().all()


@pytest.mark.parametrize(("estimator", "pulls"), [("k1", False), ("k2", True), ("k3", True), ("abs", True)])
def test_as_a_loss_every_estimator_but_k1_pulls_toward_the_reference(estimator, pulls, tmp_path):
    """The gradient is exact: its expectation is a sum over all tokens, weighted by their probabilities."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([1.0, 0.5, -0.7, 0.0], dtype=torch.float64).log_softmax(-1)

    def distance(logits):
        logprobs = logits.log_softmax(-1)
        return (logprobs.exp() * (logprobs - reference)).sum()

    logprobs = logits.log_softmax(-1)
    (logprobs.exp().detach() * kl_estimate(logprobs, reference, estimator)).sum().backward()
    moved = distance(logits) - distance(logits - 1e-2 * logits.grad)
    assert (moved > 1e-4) == pulls
    assert pulls or logits.grad.abs().max() < 1e-6
    if pulls:
        assert make_config(tmp_path, kl_penalty_in="loss", kl_estimator=estimator).kl_penalty_in == "loss"


UNICODE = {
    "emoji": "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f4\U000e0067\U000e007f",
    "right to left": "\u0634\u0627\u0647\u062f \u202e\u05e9\u05dc\u05d5\u05dd\u202c \u200f",
    "NUL and other controls": "a\x00b\x07\x1b[31mc\x7f",
    "combining marks": "e\u0301 Z\u0351\u036b\u0343\u036a\u0302 \u0e01\u0e33",
    "not normalized": "\ufb01 \u212b A\u030a \u1e9b\u0323",
    "beyond the first plane": "\U00020000 \U0001d54f \U0010fffd",
    "not a character": "\ufffe \uffff \ufffd",
    "invisible": "\ufeffa\u200b\u2060\u00ad",
    "line ends": "a\r\nb\u2028c\u0085d\x0b",
    "markup": "[bold]a[/] <b>b</b> {{ c }} {% d %} %s {e} \\n",
    "a special token": "a<eos>b<pad>",
    "spaces around": " \u3000\u00a0 a \t",
}


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte, so that nothing is lost."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


@pytest.mark.parametrize("as_messages", [False, True])
def test_text_of_every_kind_reaches_the_model_and_the_reward_as_it_is(as_messages, tmp_path, capsys):
    texts = list(UNICODE.values())
    rows = [[{"role": "user", "content": text}] if as_messages else text for text in texts]
    tokenizer = byte_tokenizer(CHAT_TEMPLATE if as_messages else None)
    given = []

    def score(prompts, completions, **kwargs):
        given.extend(prompts)
        assert all(isinstance(as_text(c), str) for c in completions)
        return [float(len(as_text(c))) for c in completions]

    config = {"max_steps": 1, "gradient_accumulation_steps": 3, "num_completions_to_print": 12, "log_completions": True}
    trainer, weights, _ = trained(
        tmp_path, config=config, model=make_model(vocab_size=len(tokenizer)), processing_class=tokenizer,
        reward_funcs=score, train_dataset=Dataset.from_dict({"prompt": rows}),
    )  # fmt: skip
    of_trivial_answers = 2 * 4  # an empty answer and the repeated prompt, to the first four prompts
    assert sorted(map(as_text, given[of_trivial_answers:])) == sorted(texts)
    for row, text in zip(trainer.train_dataset["input_ids"], texts, strict=True):
        wrapped = f"<|user|>{text}<eos><|assistant|>" if as_messages else text
        assert tokenizer.decode(row) == wrapped
    assert weights.isfinite().all()
    assert "\U0001f600" in capsys.readouterr().out


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(max_size=40))
def test_any_text_is_kept_to_the_byte_or_refused_as_empty(text):
    tokenizer = byte_tokenizer_once()
    if text.strip():
        assert tokenizer.decode(encode_prompt(text, tokenizer, {})) == text
    else:
        with pytest.raises(ValueError, match="prompt is empty"):
            encode_prompt(text, tokenizer, {})


byte_tokenizer_once = functools.cache(byte_tokenizer)
ANYTHING = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=3))
FUZZED = sorted(
    {f.name for f in dataclasses.fields(PPOConfig)} - {f.name for f in dataclasses.fields(TrainingArguments)}
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(name=st.sampled_from(FUZZED), value=ANYTHING)
def test_any_value_of_any_field_is_taken_or_refused_by_name(name, value):
    if name in ("model_init_kwargs", "chat_template_kwargs"):
        return
    try:
        made = PPOConfig(output_dir="out", use_cpu=True, report_to="none", **{name: value})
    except ValueError as error:
        assert str(error).startswith("PPOConfig: ") and name in str(error)
    else:
        assert getattr(made, name) == value
        assert not isinstance(value, float) or math.isfinite(value)

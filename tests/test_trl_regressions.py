"""What TRL 1.12's PPOTrainer got wrong. Each docstring names the bug; the test fails if it comes here.

Exact resume has a file of its own, test_resume.py.
"""

from __future__ import annotations

import copy
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    CHAT_TEMPLATE,
    Recorder,
    lora,
    make_config,
    make_model,
    make_prompts,
    make_tokenizer,
    make_trainer,
    trained_weights,
)
from datasets import Dataset
from packaging.version import Version
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, LlamaConfig, LlamaForSequenceClassification, TrainerCallback

import ppo_plus.models.logprobs as logits
from ppo_plus import PPOTrainer

EOS = 2
UNEVEN = {"response_length": 24, "temperature": 2.0}  # some responses end early, some never


class StepRecorder(Recorder):
    """Keeps rollouts, and the gradients that each optimizer step was taken with."""

    def __init__(self):
        super().__init__()
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        named = model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    @property
    def steps(self) -> int:
        return len(self.gradients)


class Raise(TrainerCallback):
    """Raises a flag of `TrainerControl` when a step ends."""

    def __init__(self, flag, step):
        self.flag, self.step = flag, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            setattr(control, self.flag, True)


def train(tmp_path, *, config=None, callbacks=(), **overrides):
    """Train the tiny model; returns the trainer and what a StepRecorder saw."""
    recorder = StepRecorder()
    trainer = make_trainer(tmp_path, config=config, callbacks=[recorder, *callbacks], **overrides)
    trainer.train()
    return trainer, recorder


def relative_gap(a: dict, b: dict) -> float:
    """The largest difference in a tensor, relative to the largest number in it."""
    assert a.keys() == b.keys() and a
    gaps = [(a[k] - b[k]).abs().max() / a[k].abs().max() for k in a if a[k].abs().max() > 0]
    assert len(gaps) >= len(a) // 2
    return max(gaps).item()


def norm_of(gradients: dict, critic: bool) -> float:
    squares = [g.double().square().sum() for name, g in gradients.items() if name.startswith("value_head") == critic]
    return sum(squares).sqrt().item()


def response_of(rollout, row: int, stop_ids=(EOS,)) -> list[int]:
    """Response ids up to and including the first stop token, found by looking at one token after the other."""
    response = []
    for token in rollout.input_ids[row, rollout.prompt_length :].tolist():
        response.append(token)
        if token in stop_ids:
            break
    return response


def prompt_of(rollout, row: int) -> list[int]:
    real = rollout.attention_mask[row, : rollout.prompt_length].bool()
    return rollout.input_ids[row, : rollout.prompt_length][real].tolist()


@torch.no_grad()
def plain_distribution(model, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    """Log-probabilities over the vocabulary before each response token: one row, no padding, no cache, `(R, V)`."""
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


# How many steps, and from which responses


@pytest.mark.parametrize("num_mini_batches", [1, 4])
def test_num_mini_batches_is_the_number_of_steps_per_epoch_under_accumulation(tmp_path, num_mini_batches):
    """TRL: num_mini_batches had no effect on the optimizer steps once gradients were accumulated."""
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "num_mini_batches": num_mini_batches}
    recorder, served = StepRecorder(), []
    responses = 2 * num_mini_batches
    trainer = make_trainer(
        tmp_path, config={**sizes, "total_episodes": responses, "max_steps": -1}, callbacks=[recorder]
    )
    compute_loss = trainer.compute_loss

    def spy(model, inputs, **kwargs):
        served.append(inputs["advantages"][inputs["action_mask"]].tolist())
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = spy
    trainer.train()

    (rollout,) = recorder.rollouts
    assert len(rollout) == responses
    assert recorder.steps == trainer.state.global_step == 2 * num_mini_batches
    assert len(served) == 2 * responses
    whole = Counter(
        tuple(row[mask].tolist()) for row, mask in zip(rollout.advantages, rollout.action_mask, strict=True)
    )
    for epoch in (served[:responses], served[responses:]):
        assert Counter(map(tuple, epoch)) == whole


@pytest.mark.parametrize("num_mini_batches", [1, 4])
def test_statistics_are_not_divided_by_num_mini_batches_nor_averaged_over_padding(tmp_path, num_mini_batches):
    """TRL: statistics were divided by num_mini_batches, and averaged over padding."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_mini_batches": num_mini_batches}
    still = {"learning_rate": 0.0, "value_head_learning_rate": 0.0, "vf_coef": 1.0, **UNEVEN}
    steps = 2 * num_mini_batches
    minibatches = []
    recorder = StepRecorder()
    trainer = make_trainer(
        tmp_path,
        config={**sizes, **still, "max_steps": steps, "logging_steps": steps},
        callbacks=[recorder],
        reward_funcs=lambda completions, **kwargs: [10.0 + len(c) for c in completions],
    )
    get_batch_samples = trainer.get_batch_samples

    def spy(*args):
        micro_batches, tokens = get_batch_samples(*args)
        minibatches.append(micro_batches)
        return micro_batches, tokens

    trainer.get_batch_samples = spy
    trainer.train()
    log = next(row for row in trainer.state.log_history if "loss" in row)

    # Weights stand still, so every value is the 0 that the head starts with and every ratio is 1.
    (rollout,) = recorder.rollouts
    half_squares = [
        g**2 / 2 for row, m in zip(rollout.returns, rollout.action_mask, strict=True) for g in row[m].tolist()
    ]
    assert log["ppo/value_loss"] == pytest.approx(sum(half_squares) / len(half_squares), rel=1e-5)
    assert log["ppo/ratio"] == pytest.approx(1.0, abs=1e-5)
    losses = []
    for minibatch in minibatches:
        tokens = [
            -a + g**2 / 2
            for part in minibatch
            for row in zip(part["advantages"], part["returns"], part["action_mask"], strict=True)
            for a, g, real in zip(*(column.tolist() for column in row), strict=True)
            if real
        ]
        losses.append(sum(tokens) / len(tokens))
    assert log["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    if num_mini_batches > 1:  # there is padding, and averaging over it would be seen
        masks = [part["action_mask"] for minibatch in minibatches for part in minibatch]
        assert sum(mask.sum() for mask in masks) < 0.95 * sum(mask.numel() for mask in masks)


def test_statistics_of_the_rollout_are_those_of_a_loop_over_real_tokens(tmp_path):
    """TRL: entropy and KL were averaged over padding."""
    recorder = StepRecorder()
    trainer = make_trainer(tmp_path, config={**UNEVEN, "max_steps": 1}, callbacks=[recorder])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    actor, reference = copy.deepcopy(trainer.model.language_model).eval(), make_model()
    trainer.train()

    (rollout,) = recorder.rollouts
    entropies, kls, lengths = [], [], []
    for row in range(len(rollout)):
        prompt, response = prompt_of(rollout, row), response_of(rollout, row)
        policy = plain_distribution(actor, prompt, response, trainer.args.temperature)
        base = plain_distribution(reference, prompt, response, trainer.args.temperature)
        entropies += [-(p.exp() * p).sum().item() for p in policy]
        kls.append(sum((policy[t, a] - base[t, a]).item() for t, a in enumerate(response)))
        lengths.append(len(response))
    assert len(set(lengths)) > 2
    found = trainer.state.log_history[0]
    assert found["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)
    assert found["kl"] == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert abs(found["kl"]) > 0.01
    assert found["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths), rel=1e-6)
    assert sum(entropies) / rollout.action_mask.numel() < 0.95 * found["entropy"]


def micro_batching_gradients(tmp_path, per_device, accumulation, mean_per_micro_batch=False):
    sizes = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
    config = {**sizes, "num_mini_batches": 1, "max_steps": 1, "max_grad_norm": 0.0, **UNEVEN}
    recorder = StepRecorder()
    trainer = make_trainer(tmp_path, config=config, callbacks=[recorder])
    if mean_per_micro_batch:
        compute_loss = trainer.compute_loss

        def mean_of_means(model, inputs, num_items_in_batch, **kwargs):
            return compute_loss(model, inputs, num_items_in_batch=inputs["action_mask"].sum() * accumulation, **kwargs)

        trainer.compute_loss = mean_of_means
    trainer.train()
    return recorder.gradients[0]


def test_a_token_weighs_the_same_however_the_minibatch_is_cut(tmp_path):
    """TRL: the loss was a mean per micro-batch, so a token in a short response weighed more."""
    whole = micro_batching_gradients(tmp_path, 8, 1)
    assert relative_gap(whole, micro_batching_gradients(tmp_path, 4, 2)) < 1e-5
    assert relative_gap(whole, micro_batching_gradients(tmp_path, 1, 8)) < 1e-5
    assert relative_gap(whole, micro_batching_gradients(tmp_path, 1, 8, mean_per_micro_batch=True)) > 1e-2


# What Trainer's arguments say


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_is_on_when_it_is_asked_for(tmp_path, bf16, dtype):
    """TRL: bf16=True was silently off, in rollouts and in training."""
    trainer = make_trainer(tmp_path, config={"bf16": bf16, "max_steps": 1})
    seen = set()
    layer = trainer.model.language_model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.add((module.training, output.dtype)))
    trainer.train()
    assert seen == {(False, dtype), (True, dtype)}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer._progress.rollout.logprobs.dtype == torch.float32


@pytest.mark.parametrize("adapter", [True, False])
def test_activation_checkpointing_recomputes_and_changes_no_weight(tmp_path, adapter):
    """TRL: gradient checkpointing was ignored."""
    found, calls = {}, Counter()
    for on in (False, True):
        trainer = make_trainer(
            tmp_path, config={"activation_checkpointing": on, "max_steps": 3}, peft_config=lora() if adapter else None
        )

        def count(module, *_, on=on):
            calls[on] += module.training

        trainer.model.language_model.model.layers[0].input_layernorm.register_forward_hook(count)
        trainer.train()
        found[on] = trained_weights(trainer)
    assert calls[True] == 2 * calls[False] == 2 * 3 * 2  # recomputed once, for 3 steps of 2 micro-batches
    assert relative_gap(found[False], found[True]) < 1e-5


def decode_twice(tmp_path, *, checkpointing, leave_in_train_mode=False):
    """Response tokens of the second rollout, and how many tokens the backbone was given at each step of decoding."""
    recorder, lengths, generating = StepRecorder(), [], []
    config = {"activation_checkpointing": checkpointing, "max_steps": 5, "response_length": 6}
    trainer = make_trainer(tmp_path, config=config, callbacks=[recorder])
    if leave_in_train_mode:
        trainer.model.eval = lambda: trainer.model
    generate = trainer.model.sample

    def spy(*args, **kwargs):
        generating.append(True)
        try:
            return generate(*args, **kwargs)
        finally:
            generating.clear()

    trainer.model.sample = spy
    trainer.model.language_model.model.embed_tokens.register_forward_pre_hook(
        lambda module, inputs: lengths.append(inputs[0].shape[1]) if generating else None
    )
    trainer.train()
    rollout = recorder.rollouts[1]
    return rollout.input_ids[:, rollout.prompt_length :], lengths


def test_decoding_keeps_its_cache_under_activation_checkpointing(tmp_path):
    """In train mode, activation checkpointing drops the cache before transformers 5.24: no token sees its context."""
    expected, lengths = decode_twice(tmp_path, checkpointing=False)
    tokens, with_checkpointing = decode_twice(tmp_path, checkpointing=True)
    assert torch.equal(tokens, expected)
    assert lengths == with_checkpointing
    assert sum(length > 1 for length in lengths) == 2  # the prompts, once per rollout
    assert lengths.count(1) > 2
    try:
        tokens, _ = decode_twice(tmp_path, checkpointing=True, leave_in_train_mode=True)
        keeps_cache = tokens.shape == expected.shape and torch.equal(tokens, expected)
    except RuntimeError:  # the cache is gone and the attention mask is not: attention itself refuses
        keeps_cache = False
    assert keeps_cache == (Version(transformers.__version__) >= Version("5.24"))


def test_max_grad_norm_bounds_actor_and_critic_each(tmp_path):
    """TRL: max_grad_norm was ignored."""
    config = {"max_steps": 3, "critic": "detached", "vf_coef": 1000.0}
    _, free = train(tmp_path, config={**config, "max_grad_norm": 0.0})
    _, bounded = train(tmp_path, config={**config, "max_grad_norm": 1e-3})
    for critic in (False, True):
        assert norm_of(free.gradients[0], critic) > 2e-3
        assert [norm_of(g, critic) for g in bounded.gradients] == pytest.approx([1e-3] * 3, rel=1e-3)
    shrunk = 1e-3 / norm_of(free.gradients[0], critic=False)
    for name, gradient in free.gradients[0].items():
        if not name.startswith("value_head"):  # same direction, and a loud critic takes nothing from the actor
            torch.testing.assert_close(bounded.gradients[0][name], gradient * shrunk, rtol=1e-3, atol=1e-9)


def test_max_grad_norm_above_every_gradient_changes_nothing(tmp_path):
    """TRL: max_grad_norm was ignored. Here it must not act where it need not."""
    free, _ = train(tmp_path, config={"max_steps": 2, "max_grad_norm": 0.0})
    bounded, _ = train(tmp_path, config={"max_steps": 2, "max_grad_norm": 1e6})
    assert relative_gap(trained_weights(free), trained_weights(bounded)) == 0.0


@pytest.mark.parametrize(("max_steps", "rollouts"), [(3, 1), (5, 2)])
def test_max_steps_counts_optimizer_steps_and_wins_over_episodes(tmp_path, max_steps, rollouts):
    """TRL: max_steps was ignored."""
    trainer, recorder = train(tmp_path, config={"max_steps": max_steps, "total_episodes": 80})
    assert (trainer.state.global_step, recorder.steps) == (max_steps, max_steps)
    assert len(recorder.rollouts) == rollouts


@pytest.mark.parametrize(("logging_steps", "expected"), [(3, [3, 6]), (None, [4, 8])])
def test_logging_steps_are_obeyed(tmp_path, logging_steps, expected):
    """TRL: logging_steps was ignored. None means once per rollout, which is 4 steps here."""
    trainer, _ = train(tmp_path, config={"logging_steps": logging_steps, "max_steps": 8})
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == expected


def test_should_training_stop_is_obeyed_at_once(tmp_path):
    """TRL: control flags were ignored."""
    trainer, recorder = train(tmp_path, callbacks=[Raise("should_training_stop", 3)])
    assert (trainer.state.global_step, recorder.steps) == (3, 3)


def test_should_evaluate_is_obeyed(tmp_path):
    """TRL: control flags were ignored."""
    trainer, _ = train(
        tmp_path, config={"max_steps": 4}, callbacks=[Raise("should_evaluate", 2)], eval_dataset=make_prompts(3)
    )
    assert [row["step"] for row in trainer.state.log_history if "eval_reward" in row] == [2]


def test_should_save_is_obeyed(tmp_path):
    """TRL: control flags were ignored."""
    train(tmp_path, config={"max_steps": 4}, callbacks=[Raise("should_save", 3)])
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


# Data


def test_a_dataset_smaller_than_a_rollout_is_refused(tmp_path):
    """TRL: looped without end when the dataset was smaller than a batch."""
    with pytest.raises(ValueError, match="train_dataset has 7 prompts, but one rollout takes 8"):
        make_trainer(tmp_path, train_dataset=make_prompts(7))


def test_a_dataset_of_one_rollout_is_enough(tmp_path):
    """TRL: looped without end when the dataset was smaller than a batch. One of exactly that size is read again."""
    trainer, recorder = train(tmp_path, config={"max_steps": 8}, train_dataset=make_prompts(8))
    assert (trainer.state.global_step, trainer.state.epoch, len(recorder.rollouts)) == (8, 2.0, 2)


def test_extra_columns_reach_the_reward_function_in_the_order_of_its_prompts(tmp_path):
    """TRL: extra dataset columns crashed the collator."""
    rows = [
        {"prompt": f"film {chr(97 + i)} was", "number": i, "ragged": list(range(i % 3)),
         "maybe": None if i % 2 else "x", "nested": {"deep": [str(i)]}}
        for i in range(16)
    ]  # fmt: skip
    seen = []

    def reward(prompts, completions, number, ragged, maybe, nested, **kwargs):
        seen.extend(zip(prompts, number, ragged, maybe, nested, strict=True))
        return [0.0] * len(completions)

    train(tmp_path, config={"max_steps": 8}, train_dataset=Dataset.from_list(rows), reward_funcs=reward)
    # The first 8 are cheap answers to four of the prompts.
    assert sorted(item[0] for item in seen[8:]) == sorted(row["prompt"] for row in rows)
    for prompt, number, ragged, maybe, nested in seen:
        assert rows[number] == {
            "prompt": prompt, "number": number, "ragged": ragged, "maybe": maybe, "nested": nested,
        }  # fmt: skip


# Checkpoints, evaluation, seeds


def test_the_critic_and_its_optimizer_state_are_in_the_checkpoint(tmp_path):
    """TRL: the critic was not in checkpoints."""
    trainer, _ = train(tmp_path, config={"max_steps": 2, "save_strategy": "steps", "save_steps": 2})
    saved = load_file(tmp_path / "checkpoint-2" / "value_head.safetensors")
    head = trainer.model.value_head.state_dict()
    assert saved.keys() == head.keys() and all(torch.equal(saved[name], head[name]) for name in head)
    assert all(tensor.abs().max() > 0 for tensor in saved.values())
    optimizer = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    critic = optimizer["param_groups"][1]["params"]
    shapes = [optimizer["state"][index]["exp_avg_sq"].shape for index in critic]
    assert shapes == [tensor.shape for tensor in head.values()]


def test_training_resumes(tmp_path):
    """TRL: there was no resume."""
    whole, _ = train(tmp_path / "a", config={"max_steps": 3, "save_strategy": "steps", "save_steps": 2})
    resumed = make_trainer(tmp_path / "b", config={"max_steps": 3})
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.state.global_step == 3
    assert relative_gap(trained_weights(whole), trained_weights(resumed)) == 0.0


def test_evaluate_reports_the_mean_reward_of_the_answers_it_gave(tmp_path):
    """TRL: evaluate() raised."""
    answers = []

    def reward(prompts, completions, **kwargs):
        answers.extend(zip(prompts, completions, strict=True))
        return [float(len(c)) for c in completions]

    prompts = make_prompts(5)
    trainer = make_trainer(tmp_path, reward_funcs=reward, eval_dataset=prompts, config=UNEVEN)
    metrics = trainer.evaluate()
    assert [prompt for prompt, _ in answers] == prompts["prompt"]
    lengths = [len(completion) for _, completion in answers]
    assert metrics["eval_reward"] == pytest.approx(sum(lengths) / 5, rel=1e-6)
    assert len(set(lengths)) > 1
    assert metrics["eval_kl"] == pytest.approx(0.0, abs=1e-5)
    assert 1 <= metrics["eval_completions/mean_length"] <= 24
    assert trainer.evaluate() == metrics


def whimsical(completions, **kwargs):
    """A reward that draws from all three generators."""
    return [random.random() + np.random.rand() + torch.rand(()).item() + c.count("e") for c in completions]


def test_a_seed_fixes_every_bit_and_another_seed_changes_them(tmp_path):
    """TRL: a run was not reproducible with a fixed seed.

    The state in which a caller left the global generators must not matter either: the trainer makes the adapter.
    """

    def run(seed, global_seed):
        model = make_model()
        random.seed(global_seed)
        np.random.seed(global_seed)
        torch.manual_seed(global_seed)
        trainer = PPOTrainer(model, reward_funcs=whimsical, args=make_config(tmp_path, seed=seed, max_steps=3),
                             train_dataset=make_prompts(), processing_class=make_tokenizer(),
                             peft_config=lora(lora_dropout=0.1))  # fmt: skip
        trainer.train()
        return trained_weights(trainer)

    first = run(seed=1, global_seed=0)
    assert relative_gap(first, run(seed=1, global_seed=99)) == 0.0
    assert relative_gap(first, run(seed=2, global_seed=0)) > 1e-3


def test_a_saved_model_keeps_its_eos_ids(tmp_path):
    """TRL: the saved generation_config lost its EOS ids."""
    model = make_model()
    model.generation_config.eos_token_id = [EOS, 7, 9]
    trainer, _ = train(tmp_path, model=model, peft_config=None, config={"max_steps": 1})
    trainer.save_model(tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == [EOS, 7, 9]
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["eos_token_id"] == EOS
    assert trainer.stop_ids == [EOS, 7, 9]


def test_training_an_adapter_leaves_its_base_as_it_was(tmp_path):
    """TRL: the generation_config lost its EOS ids."""
    model = make_model()
    model.generation_config.eos_token_id = [EOS, 7, 9]
    config = {**model.config.to_dict(), "use_cache": False}  # Trainer's own doing, by TrainingArguments.use_cache
    generation_config = model.generation_config.to_dict()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer, _ = train(tmp_path, model=model, config={"max_steps": 4})
    base = trainer.model.language_model
    assert base.generation_config.to_dict() == generation_config
    assert base.config.to_dict() == config
    after = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


# Masks and scores


def test_pad_equal_to_eos_masks_no_eos_of_the_prompt(tmp_path):
    """TRL: where pad is EOS, the EOS tokens inside prompts were masked and positions shifted."""
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE, pad_token="<eos>")
    prompts = [
        [{"role": "user", "content": "hi" * (1 + i % 3)}, {"role": "assistant", "content": "ho"},
         {"role": "user", "content": "film"}]
        for i in range(8)
    ]  # fmt: skip
    _, recorder = train(
        tmp_path, train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer,
        model=make_model(pad_token_id=EOS), config={"max_steps": 1, "response_length": 12},
    )  # fmt: skip
    (rollout,), plain = recorder.rollouts, make_model(pad_token_id=EOS)
    wanted = Counter(
        tuple(tokenizer(tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True))["input_ids"])
        for p in prompts
    )
    assert min(ids.count(EOS) for ids in wanted) == 3
    assert len({len(ids) for ids in wanted}) == 3  # so there is padding
    assert Counter(tuple(prompt_of(rollout, row)) for row in range(8)) == wanted
    for row in range(8):
        response = response_of(rollout, row)
        logprobs = plain_distribution(plain, prompt_of(rollout, row), response, 0.7)
        expected = torch.stack([logprobs[t, token] for t, token in enumerate(response)])
        torch.testing.assert_close(rollout.logprobs[row, : len(response)], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pad_token", ["<pad>", "<eos>"])
def test_the_score_lands_on_the_eos_token_itself(tmp_path, pad_token):
    """TRL: the score landed one slot after EOS; and one token early where pad is EOS.

    Values are 0 and KL costs nothing, so the return of token t is the score, halved for every token to go.
    """
    config = {"gamma": 0.5, "lam": 1.0, "kl_coef": 0.0, "missing_eos_penalty": None, **UNEVEN}
    _, recorder = train(
        tmp_path, config={**config, "max_steps": 1}, processing_class=make_tokenizer(pad_token=pad_token),
        reward_funcs=lambda completions, **kwargs: [1.0 + i for i in range(len(completions))],
    )  # fmt: skip
    (rollout,) = recorder.rollouts
    ended = 0
    for row in range(len(rollout)):
        response = response_of(rollout, row)
        ended += response[-1] == EOS and len(response) < rollout.response_length
        expected = [(1.0 + row) * 0.5 ** (len(response) - 1 - t) for t in range(len(response))]
        expected += [0.0] * (rollout.response_length - len(response))
        assert rollout.returns[row].tolist() == pytest.approx(expected, abs=1e-6)
        assert rollout.action_mask[row].tolist() == [t < len(response) for t in range(rollout.response_length)]
    assert 0 < ended < len(rollout)


def test_a_reward_model_is_read_at_the_last_token_of_the_text_where_pad_is_eos(tmp_path):
    """TRL: where pad is EOS, the reward model was read one token early."""
    torch.manual_seed(3)
    sizes = {"vocab_size": len(make_tokenizer()), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2, "eos_token_id": EOS, "pad_token_id": EOS}  # fmt: skip
    reward_model = LlamaForSequenceClassification(LlamaConfig(num_labels=1, **sizes)).eval()
    reward_model.score.weight.data.mul_(100)
    tokenizer = make_tokenizer(pad_token="<eos>")
    _, recorder = train(
        tmp_path, config={"max_steps": 1, **UNEVEN}, processing_class=tokenizer,
        reward_funcs=reward_model, reward_processing_classes=make_tokenizer(pad_token="<eos>"),
    )  # fmt: skip
    (samples,) = recorder.samples
    texts = [p + c for p, c in zip(samples.completions.prompts, samples.completions.completions, strict=True)]
    assert len({len(text) for text in texts}) > 2
    for text, score in zip(texts, samples.scores.tolist(), strict=True):
        with torch.no_grad():
            hidden = reward_model.model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state
            expected, early = (reward_model.score(hidden[0, at]).item() for at in (-1, -2))
        assert score == pytest.approx(expected, abs=1e-5)
        assert abs(score - early) > 1e-3


def test_missing_eos_penalty_knows_the_custom_stop_token(tmp_path):
    """TRL: missing_eos_penalty ignored a custom stop token."""
    letter = make_tokenizer().convert_tokens_to_ids("e")
    _, recorder = train(
        tmp_path,
        config={"stop_token_id": letter, "missing_eos_penalty": 5.0, "response_length": 12, "max_steps": 5},
        reward_funcs=lambda completions, **kwargs: [1.0] * len(completions),
    )  # fmt: skip
    endings = Counter()
    for rollout in recorder.rollouts:
        for row in range(len(rollout)):
            response = response_of(rollout, row, stop_ids=(EOS, letter))
            last = response[-1] if response[-1] in (EOS, letter) else None
            endings[last] += 1
            assert rollout.sequence_scores[row].item() == (1.0 if last is not None else -4.0)
            assert rollout.action_mask[row].sum() == len(response)
    assert endings[letter] and endings[None]


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_one_valid_token_in_a_batch_gives_finite_weights(tmp_path, whiten_rewards):
    """TRL: whitening a single valid token divided by a variance that is NaN."""
    config = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_mini_batches": 1,
              "response_length": 1, "whiten_rewards": whiten_rewards, "max_steps": 4}  # fmt: skip
    trainer, recorder = train(tmp_path, config=config)
    assert [int(rollout.action_mask.sum()) for rollout in recorder.rollouts] == [1, 1]
    assert all(tensor.isfinite().all() for tensor in trained_weights(trainer).values())
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 4 and np.isfinite(losses).all()


# Memory, and dropout


class LargestTensor(TorchDispatchMode):
    """The most numbers that any tensor holds that an operation returns, by whether the model trains."""

    def __init__(self, model):
        super().__init__()
        self.model, self.largest = model, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                mode = self.model.training
                self.largest[mode] = max(self.largest[mode], leaf.numel())
        return result


def test_logits_of_all_response_tokens_never_exist_at_once(tmp_path, monkeypatch):
    """TRL: the fp32 logits of every response token of the rollout were kept, `[B, T, V]`."""
    vocabulary, rows, length = 2000, 4, 12
    sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, "num_mini_batches": 1}
    config = {**sizes, "response_length": length, "max_steps": 1, "entropy_coef": 0.01,
              "local_rollout_forward_batch_size": rows}  # fmt: skip

    def largest(chunk_elements):
        monkeypatch.setattr(logits, "CHUNK_ELEMENTS", chunk_elements)
        trainer = make_trainer(tmp_path, config=config, model=make_model(vocab_size=vocabulary))
        with LargestTensor(trainer.model) as seen:
            trainer.train()
        assert trainer._progress.rollout.response_length == length
        return seen.largest

    everything = rows * length * vocabulary
    chunked = largest(16 * vocabulary)
    assert chunked[False] < everything and chunked[True] < everything
    unchunked = largest(2**40)  # negative control: in one chunk, they are seen
    assert unchunked[False] >= everything and unchunked[True] >= everything


def first_gradients(tmp_path, *, lora_dropout=0.0, attention_dropout=0.0, **config):
    model = make_model(attention_dropout=attention_dropout)
    _, recorder = train(
        tmp_path, model=model, peft_config=lora(lora_dropout=lora_dropout), config={"max_steps": 1, **config}
    )
    return recorder.gradients[0]


def test_lora_dropout_stays_while_the_dropout_of_the_base_is_zeroed(tmp_path):
    """TRL: the dropout of the LoRA adapter was silently zeroed with the base's."""
    still = first_gradients(tmp_path)
    assert relative_gap(still, first_gradients(tmp_path, lora_dropout=0.5)) > 1e-2
    assert relative_gap(still, first_gradients(tmp_path, attention_dropout=0.5)) == 0.0
    assert relative_gap(still, first_gradients(tmp_path, attention_dropout=0.5, disable_dropout=False)) > 1e-2

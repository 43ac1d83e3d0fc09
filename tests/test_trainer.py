"""What `Trainer.train()` does with PPO inside, seen from outside: it learns, counts, evaluates, saves, and obeys."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import json
import math
import random
import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CHAT_TEMPLATE,
    as_text,
    count_e,
    lora,
    make_config,
    make_model,
    make_prompts,
    make_tokenizer,
    make_trainer,
    trained_weights,
)
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_plus import PPOCallback, PPOConfig, PPOTrainer
from ppo_plus.config.critic_fields import CriticFields
from ppo_plus.config.trl_fields import TRLFields
from ppo_plus.config.vllm_fields import VLLMFields
from ppo_plus.models.loading import load_tokenizer

# One step costs least like this: a rollout of 4 short responses, 4 steps each.
QUICK = {"gradient_accumulation_steps": 1, "response_length": 6, "max_steps": 8, "temperature": 1.0}
ONE_MINIBATCH = {**QUICK, "per_device_train_batch_size": 4, "num_mini_batches": 1, "max_steps": 4}
NO_CLOCK = ("time/", "train_", "epoch", "eval_runtime")


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Trainer collects garbage at the end of training, which takes longer than a tiny run: spare it the imports."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def one_layer(**overrides):
    return make_model(num_hidden_layers=1, **overrides)


def small_lora():
    return lora(target_modules=["q_proj", "up_proj"])


def log_of(trainer):
    return [{k: v for k, v in row.items() if not k.startswith(NO_CLOCK)} for row in trainer.state.log_history]


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def largest_gap(a, b):
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


class Recorder(PPOCallback):
    """Keeps what passes by, with the step it passed at."""

    def __init__(self):
        self.rollouts, self.samples, self.steps, self.micro_batches, self.rates = [], [], [], 0, []

    def on_rollout_end(self, args, state, control, rollout, samples, metrics, **kwargs):
        self.rollouts.append((state.global_step, rollout))
        self.samples.append(samples)

    def on_substep_end(self, args, state, control, **kwargs):
        self.micro_batches += 1

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_step_end(self, args, state, control, model, **kwargs):
        self.micro_batches += 1
        self.steps.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})


def recorded(tmp_path, config=None, **options):
    recorder = Recorder()
    callbacks = [recorder, *options.pop("callbacks", [])]
    options = {"model": one_layer(), "peft_config": small_lora(), **options}
    return make_trainer(tmp_path, config={**QUICK, **(config or {})}, callbacks=callbacks, **options), recorder


# --- it learns ---

LEARNING = {
    "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "temperature": 1.0,
    "kl_coef": 0.0, "missing_eos_penalty": None, "max_steps": 40, "logging_steps": 4, "lr_scheduler_type": "constant",
}  # fmt: skip


@pytest.mark.parametrize(
    ("adapter", "steps", "seed"),
    [(lora(), 60, 1), (lora(), 60, 42), (None, 32, 0)],
    ids=["LoRA, seed 1", "LoRA, seed 42", "whole model"],
)
def test_the_reward_rises_also_on_prompts_that_are_not_trained_on(tmp_path, adapter, steps, seed):
    config = {**LEARNING, "learning_rate": 5e-3, "max_steps": steps, "seed": seed}
    trainer = make_trainer(
        tmp_path, config=config, train_dataset=make_prompts(64), peft_config=adapter,
        eval_dataset=Dataset.from_dict({"prompt": [a + b for a in "xyzq" for b in "xyzq"]}),
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    rewards = logged(trainer, "reward")
    assert rewards[0] < 1 and sum(rewards[-2:]) / 2 > rewards[0] + 2
    assert after["eval_reward"] > before["eval_reward"] + 0.75
    assert after["eval_kl"] > before["eval_kl"] == 0.0


def test_the_reward_falls_if_e_is_punished(tmp_path):
    def punish_e(prompts, completions, **kwargs):
        return [-2.0 * e for e in count_e(prompts, completions)]

    trainer = make_trainer(
        tmp_path, config={**LEARNING, "max_steps": 16}, reward_funcs=[count_e, punish_e], train_dataset=make_prompts(64)
    )
    trainer.train()
    counts = logged(trainer, "rewards/count_e/mean")
    assert sum(counts[-2:]) < sum(counts[:2]) / 2


def end_of(tmp_path, name, **config):
    """What is logged under a name at the end of a run that moves far."""
    far = {
        "per_device_train_batch_size": 8,
        "num_mini_batches": 1,
        "max_steps": 16,
        "learning_rate": 2e-2,
        "response_length": 8,
    }
    trainer, _ = recorded(tmp_path, {**LEARNING, **far, **config}, train_dataset=make_prompts(64), peft_config=lora())
    trainer.train()
    return logged(trainer, name)[-1]


@pytest.mark.parametrize(("kl_penalty_in", "estimator"), [("reward", "k1"), ("loss", "k3")])
def test_a_heavy_kl_penalty_holds_the_policy_back(tmp_path, kl_penalty_in, estimator):
    penalty = {"kl_penalty_in": kl_penalty_in, "kl_estimator": estimator}
    free, held = (end_of(tmp_path, "kl", kl_coef=kl_coef, **penalty) for kl_coef in (0.0, 5.0))
    assert free > 3 * abs(held)


def test_an_entropy_bonus_keeps_the_entropy_up(tmp_path):
    without, with_bonus = (end_of(tmp_path, "entropy", entropy_coef=entropy_coef) for entropy_coef in (0.0, 0.5))
    assert with_bonus > without + 0.5


# --- the arithmetic of steps ---


@pytest.mark.parametrize(
    ("b", "g", "m", "k", "prompts", "lengths", "rollouts", "steps", "epochs"),
    [
        (2, 2, 2, 2, 16, {"num_train_epochs": 1}, 2, 8, 1.0),
        (2, 1, 1, 4, 10, {"num_train_epochs": 1}, 5, 20, 1.0),
        (1, 3, 2, 1, 20, {"num_train_epochs": 1}, 3, 6, 1.0),  # 2 prompts sit the epoch out
        (2, 2, 1, 3, 9, {"num_train_epochs": 2}, 4, 12, 2.0),
        (2, 1, 3, 1, 6, {"num_train_epochs": 3}, 3, 9, 3.0),
        (2, 2, 2, 2, 16, {"total_episodes": 16}, 2, 8, 1.0),
        (2, 2, 2, 2, 16, {"total_episodes": 20}, 3, 12, 1.5),  # a rollout that was begun is finished
        (2, 1, 2, 2, 4, {"total_episodes": 12, "num_train_epochs": 50}, 3, 12, 3.0),
        (2, 2, 2, 2, 16, {"max_steps": 5, "total_episodes": 100}, 2, 5, 0.625),
    ],
)
def test_rollouts_steps_epochs_and_episodes(tmp_path, b, g, m, k, prompts, lengths, rollouts, steps, epochs):
    config = {
        "per_device_train_batch_size": b, "gradient_accumulation_steps": g, "num_mini_batches": m, "num_ppo_epochs": k,
        "max_steps": -1, "response_length": 1, "logging_steps": None, **lengths,
    }  # fmt: skip
    data = Dataset.from_dict({"prompt": [f"{chr(97 + i)} prompt" for i in range(prompts)]})
    trainer, recorder = recorded(tmp_path, config, train_dataset=data)
    trainer.train()
    n = b * g * m
    assert trainer.args.rollout_batch_size == n and trainer.args.steps_per_rollout == k * m
    assert trainer.state.global_step == trainer.state.max_steps == len(recorder.steps) == steps
    assert recorder.micro_batches == steps * g
    assert [step for step, _ in recorder.rollouts] == [i * k * m for i in range(rollouts)]
    assert all(len(rollout) == n for _, rollout in recorder.rollouts)
    assert trainer.state.epoch == pytest.approx(epochs)
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [
        step for step in range(k * m, steps + 1, k * m)
    ]
    per_epoch = prompts // n
    for first in range(0, rollouts, per_epoch):
        seen = Counter(p for s in recorder.samples[first : first + per_epoch] for p in s.completions.prompts)
        assert set(seen.values()) == {1}


def test_every_response_is_learned_from_once_per_ppo_epoch(tmp_path, monkeypatch):
    taken = []
    data = Dataset.from_dict({"prompt": ["say a", "say", "b", "what is c", "d?", "e, e", "fine", "go"]})
    config = {"num_ppo_epochs": 3, "num_mini_batches": 4, "max_steps": 12}
    trainer, recorder = recorded(tmp_path, config, train_dataset=data)
    compute_loss = PPOTrainer.compute_loss

    def watched(self, model, inputs, **kwargs):
        for ids, real in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
            taken.append(tuple(ids[real].tolist()))
        return compute_loss(self, model, inputs, **kwargs)

    monkeypatch.setattr(PPOTrainer, "compute_loss", watched)
    trainer.train()
    epochs = [taken[i : i + 8] for i in range(0, 24, 8)]
    rollout = recorder.rollouts[0][1]
    rows = zip(rollout.input_ids, rollout.attention_mask.bool(), strict=True)
    all_rows = sorted(tuple(ids[real].tolist()) for ids, real in rows)
    assert len(set(all_rows)) == 8
    assert all(sorted(epoch) == all_rows for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_both_learning_rates_follow_the_schedule(tmp_path):
    config = {"learning_rate": 1e-2, "value_head_learning_rate": 3e-3, "warmup_steps": 2, "lr_scheduler_type": "linear"}
    trainer, recorder = recorded(tmp_path, config)
    trainer.train()
    factors = [0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert recorder.rates == [pytest.approx([1e-2 * f, 3e-3 * f]) for f in factors]
    assert logged(trainer, "learning_rate") == pytest.approx([1e-2 * f for f in factors])


def test_actor_and_value_head_are_two_groups_of_the_optimizer(tmp_path):
    trainer, _ = recorded(tmp_path, {"learning_rate": 1e-2, "value_head_learning_rate": 3e-3, "weight_decay": 0.5})
    trainer.train()
    actor, critic = trainer.optimizer.param_groups
    assert {id(p) for p in critic["params"]} == {id(p) for p in trainer.model.value_head.parameters()}
    assert {id(p) for p in actor["params"]} == {
        id(p) for name, p in trainer.model.policy.named_parameters() if "lora_" in name
    }
    assert (actor["initial_lr"], critic["initial_lr"]) == (1e-2, 3e-3)
    assert (actor["weight_decay"], critic["weight_decay"]) == (0.5, 0.0)
    assert actor["eps"] == critic["eps"] == 1e-5


def test_an_optimizer_of_ones_own_is_set_once_the_trainer_is_made(tmp_path):
    trainer, _ = recorded(tmp_path, {"max_steps": 4})
    before = trained_weights(trainer)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.optimizer = mine = torch.optim.SGD(trained, lr=0.1)
    trainer.train()
    assert getattr(trainer.optimizer, "optimizer", trainer.optimizer) is mine
    after = trained_weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("value_head") for name in moved) and any("lora_" in name for name in moved)


@pytest.mark.parametrize("still", ["learning_rate", "value_head_learning_rate"])
def test_each_rate_moves_its_own_part(tmp_path, still):
    trainer, _ = recorded(tmp_path, {"max_steps": 4, still: 0.0})
    before = trained_weights(trainer)
    trainer.train()
    after = trained_weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    head = {name for name in before if name.startswith("value_head")}
    assert moved & head == (head if still == "learning_rate" else set())
    assert bool(moved - head) == (still == "value_head_learning_rate")


def test_a_loud_critic_does_not_shrink_the_actors_step(tmp_path):
    """The norms are clipped apart: under one norm, a value loss times 10,000 would leave the actor nothing."""
    ends = []
    for vf_coef in (1.0, 1e4):
        config = {"max_steps": 4, "critic": "detached", "vf_coef": vf_coef, "max_grad_norm": 1.0, "logging_steps": 4}
        trainer, _ = recorded(tmp_path, config)
        trainer.train()
        ends.append({n: w for n, w in trained_weights(trainer).items() if "lora_" in n})
    assert logged(trainer, "critic/grad_norm")[0] > 1e3
    assert largest_gap(*ends) == 0.0


# --- what the loss is ---

OBJECTIVES = [
    {},
    {"cliprange": 0.05, "cliprange_high": 0.4, "dual_clip": 1.5},
    {"objective": "unclipped", "cliprange_value": None},
    {"objective": "kl_penalty", "old_policy_kl_coef": 0.7},
    {"kl_penalty_in": "loss", "kl_estimator": "k3", "kl_coef": 0.3},
    {"kl_penalty_in": "loss", "kl_estimator": "abs", "kl_coef": 0.3, "critic": "detached", "vf_coef": 0.4},
    {"entropy_coef": 0.2, "train_on_eos": False, "missing_eos_penalty": 2.0},
]


def token_loss(args, new, old, ref, advantage, value, old_value, target, entropy):
    """The loss of one response token, in Python floats."""
    ratio = math.exp(new - old)
    if args.objective == "clip":
        low, high = 1 - args.cliprange, 1 + (args.cliprange_high or args.cliprange)
        loss = -min(ratio * advantage, min(max(ratio, low), high) * advantage)
        if args.dual_clip and advantage < 0:
            loss = min(loss, -args.dual_clip * advantage)
    elif args.objective == "kl_penalty":
        loss = -ratio * advantage + args.old_policy_kl_coef * (ratio - 1 - (new - old))
    else:
        loss = -ratio * advantage
    squares = [(value - target) ** 2]
    if args.cliprange_value:
        near = min(max(value, old_value - args.cliprange_value), old_value + args.cliprange_value)
        squares.append((near - target) ** 2)
    loss += args.resolved_vf_coef * 0.5 * max(squares)
    loss -= args.entropy_coef * entropy
    if args.kl_penalty_in == "loss":
        distance = {"k3": math.exp(ref - new) - 1 + (new - ref), "abs": abs(new - ref)}[args.kl_estimator]
        loss += args.kl_coef * distance
    return loss


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: ", ".join(o) or "defaults")
def test_the_loss_is_the_mean_over_response_tokens_summed_by_hand(tmp_path, objective):
    trainer, recorder = recorded(tmp_path, {"max_steps": 7, **objective})
    trainer.train()
    args, rollout = trainer.args, recorder.rollouts[-1][1]
    batch, mask = rollout.micro_batch(torch.arange(len(rollout))), rollout.action_mask
    width = batch["action_mask"].shape[1]
    with torch.no_grad():
        output = trainer.model.eval()(batch["input_ids"], batch["attention_mask"], width, 1.0, with_entropy=True)
        found = trainer.compute_loss(trainer.model, batch, num_items_in_batch=mask.sum())
    # In the micro-batch responses end at the last column, in the rollout they begin at the first.
    shift = width - rollout.attention_mask[:, rollout.prompt_length :].sum(1)
    losses = [
        token_loss(
            args, output.logprobs[i, t + s].item(), rollout.logprobs[i, t].item(), rollout.ref_logprobs[i, t].item(),
            rollout.advantages[i, t].item(), output.values[i, t + s].item(), rollout.values[i, t].item(),
            rollout.returns[i, t].item(), output.entropy[i, t + s].item(),
        )
        for i, s in enumerate(shift.tolist()) for t in range(width) if mask[i, t]
    ]  # fmt: skip
    assert ((output.logprobs - batch["logprobs"]) * batch["action_mask"]).abs().max() > 1e-2
    assert found.item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize(
    "config",
    [{}, {"lam": 0.7, "gamma": 0.9}, {"whiten_rewards": True}, {"kl_penalty_in": "loss", "kl_estimator": "k2"}],
)
def test_advantages_are_those_of_a_loop_over_time(tmp_path, config):
    config = {"kl_coef": 0.4, "missing_eos_penalty": 1.5, "gradient_accumulation_steps": 2, **config}
    trainer, recorder = recorded(tmp_path, config)
    trainer.train()
    args, (_, rollout), samples = trainer.args, recorder.rollouts[1], recorder.samples[1]
    assert len(set(samples.stopped.tolist())) == 2 and rollout.sequence_kl.abs().min() > 0
    rewards = {}
    for i in range(len(rollout)):
        actions = int(rollout.action_mask[i].sum())
        for t in range(actions):
            penalty = (
                (rollout.logprobs[i, t] - rollout.ref_logprobs[i, t]).item() if args.kl_penalty_in == "reward" else 0.0
            )
            rewards[i, t] = -0.4 * penalty
        rewards[i, actions - 1] += samples.scores[i].item() - (0.0 if samples.stopped[i] else 1.5)
    if args.whiten_rewards:
        mean = sum(rewards.values()) / len(rewards)
        var = sum((r - mean) ** 2 for r in rewards.values()) / len(rewards)
        rewards = {k: (r - mean) / math.sqrt(var + 1e-8) + mean for k, r in rewards.items()}
    advantages = {}
    for i, t in sorted(rewards, reverse=True):
        following = rollout.values[i, t + 1].item() if (i, t + 1) in rewards else 0.0
        delta = rewards[i, t] + args.gamma * following - rollout.values[i, t].item()
        advantages[i, t] = delta + args.gamma * args.lam * advantages.get((i, t + 1), 0.0)
    mean = sum(advantages.values()) / len(advantages)
    std = math.sqrt(sum((a - mean) ** 2 for a in advantages.values()) / len(advantages))
    for (i, t), advantage in advantages.items():
        assert rollout.returns[i, t].item() == pytest.approx(advantage + rollout.values[i, t].item(), abs=1e-4)
        assert rollout.advantages[i, t].item() == pytest.approx((advantage - mean) / std, abs=1e-4)


def test_the_first_ratio_is_1_and_the_first_kl_0(tmp_path):
    trainer, recorder = recorded(tmp_path, {"temperature": 0.7, "max_steps": 12})
    trainer.train()
    errors, kls = logged(trainer, "ppo/initial_ratio_error"), logged(trainer, "kl")
    assert len(errors) == len(kls) == 3
    assert errors == [0.0, 0.0, 0.0]
    assert kls[0] == 0.0 and min(map(abs, kls[1:])) > 1e-3
    ratios = logged(trainer, "ppo/ratio")
    assert all(abs(ratios[i] - 1) < 1e-6 for i in (0, 4, 8))  # a mean, so up to the rounding of sums
    assert any(abs(ratios[i] - 1) > 1e-3 for i in range(12) if i % 4)
    assert torch.equal(recorder.rollouts[0][1].logprobs, recorder.rollouts[0][1].ref_logprobs)


def passes_of(trainer):
    """Train; what the backbone was given while scoring and in the first PPO epoch, in order."""
    seen = {"scored": [], "learned": []}

    def note(module, args, kwargs):
        if not kwargs["use_cache"]:
            seen["learned" if torch.is_grad_enabled() else "scored"].append(
                (kwargs["input_ids"].clone(), kwargs["attention_mask"].clone())
            )

    trainer.model.language_model.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    return seen


UNEVEN = {
    "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_mini_batches": 2, "num_ppo_epochs": 1,
    "response_length": 10, "max_steps": 4,
}  # fmt: skip


def test_a_rollout_is_scored_in_the_very_passes_that_it_is_first_learned_from(tmp_path):
    options = {"model": make_model(), "peft_config": lora()}
    seen = passes_of(recorded(tmp_path, UNEVEN, **options)[0])
    for rollout in range(2):
        learned = seen["learned"][4 * rollout : 4 * rollout + 4]
        actor, reference = (seen["scored"][8 * rollout + 4 * i :][:4] for i in range(2))
        for scored in (actor, reference):
            assert all(
                torch.equal(a, b)
                for one, other in zip(scored, learned, strict=True)
                for a, b in zip(one, other, strict=True)
            )
    assert len({ids.shape for ids, _ in seen["learned"]}) > 2  # or any cut would do


@pytest.mark.parametrize("exact", [True, False], ids=["as learned from", "all at once"])
def test_the_first_ratio_is_1_also_where_numbers_depend_on_the_shape_of_a_pass(tmp_path, exact):
    """As in half precision, where products of other shapes are summed up in another order."""
    trainer, recorder = recorded(tmp_path, UNEVEN, model=make_model(), peft_config=lora())
    if not exact:
        trainer._rollouts.scoring_micro_batches = lambda rollout_index, lengths: [torch.arange(len(lengths))]

    def shape_dependent(module, args, kwargs, output):
        output.last_hidden_state = output.last_hidden_state * (1 + 1e-3 * (kwargs["input_ids"].numel() % 7))
        return output

    trainer.model.language_model.model.register_forward_hook(shape_dependent, with_kwargs=True)
    trainer.train()
    errors = logged(trainer, "ppo/initial_ratio_error")
    assert len(errors) == 2 and (max(errors) == 0.0) == exact
    assert all(len(set(rollout.action_mask.sum(1).tolist())) > 1 for _, rollout in recorder.rollouts)


def test_what_is_logged_is_finite_and_counts_all_tokens(tmp_path):
    trainer, recorder = recorded(tmp_path, {"max_steps": 12, "logging_steps": None})
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    tokens = 0
    for row, samples in zip(rows, recorder.samples, strict=True):
        assert all(math.isfinite(value) for value in row.values())
        tokens += int(samples.attention_mask.sum())
        assert row["num_tokens"] == tokens
        assert row["ppo/kl_coef"] == 0.05
        assert row["reward"] == pytest.approx(samples.scores.mean().item(), abs=1e-6)


# --- no option does nothing ---


BASELINES = {}


def outcome(tmp_path, config, data, tokenizer, model):
    trainer = make_trainer(
        tmp_path, config={**ONE_MINIBATCH, **config}, model=model(), train_dataset=data(), processing_class=tokenizer(),
        peft_config=small_lora(),
    )  # fmt: skip
    trainer.train()
    return trained_weights(trainer), log_of(trainer)


def differs(option, value, *, given=None, data=make_prompts, tokenizer=make_tokenizer, model=one_layer):
    """A case: with `option=value` on top of `given`, weights or the number of logs must come out different."""

    def check(tmp_path):
        key = (repr(given), data, tokenizer, model)
        if key not in BASELINES:
            BASELINES[key] = outcome(tmp_path, given or {}, data, tokenizer, model)
        weights, log = BASELINES[key]
        other, other_log = outcome(tmp_path, {**(given or {}), option: value}, data, tokenizer, model)
        assert weights.keys() != other.keys() or largest_gap(weights, other) > 1e-6 or len(log) != len(other_log)

    return check


def chats():
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": "say " + c}] for c in "abcdefghijklmnop"]})


def chatty_tokenizer():
    return make_tokenizer(CHAT_TEMPLATE.replace("<|assistant|>", "<|assistant|>{{ mood | default('') }}"))


def dropping_model():
    return one_layer(attention_dropout=0.3)


OPTIONS = {
    "total_episodes": differs("total_episodes", 8, given={"max_steps": -1, "num_train_epochs": 1}),
    "num_ppo_epochs": differs("num_ppo_epochs", 4),
    "num_mini_batches": differs("num_mini_batches", 4),
    "num_generations": differs("num_generations", 2),
    "advantage_baseline": differs("advantage_baseline", "rloo", given={"num_generations": 2}),
    "response_length": differs("response_length", 5),
    "max_prompt_length": differs("max_prompt_length", 3),
    "temperature": differs("temperature", 0.9),
    "top_p": differs("top_p", 0.5),
    "top_k": differs("top_k", 3),
    "min_p": differs("min_p", 0.3),
    "stop_token_id": differs("stop_token_id", 14),
    "missing_eos_penalty": differs("missing_eos_penalty", None),
    "train_on_eos": differs("train_on_eos", False, given={"stop_token_id": 14}),
    "reward_weights": differs("reward_weights", [2.0]),
    "whiten_rewards": differs("whiten_rewards", True),
    "kl_coef": differs("kl_coef", 0.5),
    "kl_estimator": differs("kl_estimator", "k3", given={"kl_coef": 0.5}),
    "kl_penalty_in": differs("kl_penalty_in", "loss", given={"kl_estimator": "k3", "kl_coef": 0.5}),
    "gamma": differs("gamma", 0.8),
    "lam": differs("lam", 0.5),
    "objective": differs("objective", "unclipped", given={"learning_rate": 5e-2}),
    "cliprange": differs("cliprange", 0.05),
    "cliprange_high": differs("cliprange_high", 0.001),
    "dual_clip": differs("dual_clip", 1.01, given={"learning_rate": 5e-2}),
    "old_policy_kl_coef": differs("old_policy_kl_coef", 3.0, given={"objective": "kl_penalty"}),
    "entropy_coef": differs("entropy_coef", 0.1),
    "cliprange_value": differs("cliprange_value", 0.001),
    "vf_coef": differs("vf_coef", 0.5),
    "critic": differs("critic", "detached", given={"vf_coef": 0.1}),
    "critic_backbone_learning_rate": differs("critic_backbone_learning_rate", 1e-2, given={"critic": "adapter"}),
    "critic_warmup_steps": differs("critic_warmup_steps", 2),
    "value_head": differs("value_head", "mlp"),
    "value_head_activation": differs("value_head_activation", "gelu", given={"value_head": "mlp"}),
    "value_head_learning_rate": differs("value_head_learning_rate", 1e-3),
    "disable_dropout": differs("disable_dropout", False, model=dropping_model),
    "chat_template_kwargs": differs("chat_template_kwargs", {"mood": "sad: "}, data=chats, tokenizer=chatty_tokenizer),
    "shuffle_dataset": differs("shuffle_dataset", False),
    "data_seed": differs("data_seed", 7),
    "train_sampling_strategy": differs("train_sampling_strategy", "sequential"),
    "learning_rate": differs("learning_rate", 5e-3),
    "adam_epsilon": differs("adam_epsilon", 1e-2),
    "bf16": differs("bf16", True),
    "logging_steps": differs("logging_steps", None),
}  # fmt: skip

# Options whose effect is not on the numbers of a run, and the test that sees it.
ELSEWHERE = {
    "use_ppo_plus_kernels": "test_kernels.py",
    "cache_frozen_layers": "test_frozen_layers.py",
    "prefix_reward_baseline": "test_baseline.py",
    **dict.fromkeys(("lam_value", "length_adaptive_alpha", "critic_gate"), "test_critic_options.py"),
    **dict.fromkeys(
        ("critic_checkpoint", "critic_peft_config", "critic_warmup_explained_variance"), "test_critic_options.py"
    ),
    **dict.fromkeys(
        ("num_critic_updates", "reward_pessimism", "positive_example_nll_weight"), "test_critic_options.py"
    ),
    "importance_sampling_cap": "test_what_decoding_computed_otherwise_is_weighed",
    "local_rollout_forward_batch_size": "test_batch_sizes_without_gradients_change_memory_and_not_numbers",
    "generation_batch_size": "test_batch_sizes_without_gradients_change_memory_and_not_numbers",
    "stop_token": "test_stop_token_eos_says_what_holds_anyway",
    "model_init_kwargs": "test_a_model_by_name_is_loaded_as_told",
    "num_sample_generations": "test_samples_are_shown_as_often_as_asked",
    "log_completions": "test_samples_are_shown_as_often_as_asked",
    "num_completions_to_print": "test_samples_are_shown_as_often_as_asked",
    "logging_nan_inf_filter": "test_a_nan_loss_is_seen_in_the_log",
    "remove_unused_columns": "test_columns_cannot_be_kept_from_reward_functions",
    "restore_callback_states_from_checkpoint": "test_resume.py",
    "eval_win_rate": "test_evaluation.py",
    "skip_special_tokens": "test_completions.py",
    "html_report": "test_report.py",
    "report_rewards": "test_report.py",
    "push_report": "test_hub.py",
    "on_reward_error": "test_faults.py",
    "on_save_error": "test_faults.py",
    "reward_timeout": "test_faults.py",
    "max_tool_calling_iterations": "test_agents.py",
    "tool_timeout": "test_agents.py",
    "max_skipped_steps": "test_faults.py",
    **{field.name: "test_vllm.py" for field in dataclasses.fields(VLLMFields)},
    **{field.name: "test_legacy.py" for field in dataclasses.fields(TRLFields)},
}


def test_every_option_has_a_test():
    classes = (PPOConfig, CriticFields, VLLMFields, TRLFields)
    fields = {name for each in classes for name in each.__annotations__ if not name.startswith("_")}
    inherited = {"data_seed", "train_sampling_strategy"}  # which we read ourselves
    assert fields | inherited == OPTIONS.keys() | ELSEWHERE.keys()
    for option, test in ELSEWHERE.items():
        assert callable(globals().get(test)) or option in (Path(__file__).parent / test).read_text()


@pytest.mark.parametrize("option", OPTIONS)
def test_no_option_does_nothing(tmp_path, option):
    OPTIONS[option](tmp_path)


def test_the_same_options_end_in_the_same_bits(tmp_path):
    """Negative control of the above."""
    with pytest.raises(AssertionError, match="0.0 > 1e-06"):
        differs("seed", 42)(tmp_path)


@pytest.mark.parametrize("cap", [None, 1.0, 2.0])
def test_what_decoding_computed_otherwise_is_weighed(tmp_path, cap):
    """Decoding is made to report log-probabilities that are off by -1, 0, 0.5 nats in turn."""
    off = torch.tensor([-1.0, 0.0, 0.5]).repeat(3)[:8]
    advantages = []
    for spoiled in (False, True):
        trainer, recorder = recorded(tmp_path, {"max_steps": 1, "importance_sampling_cap": cap})
        generate = trainer.model.sample

        def other(*args, generate=generate, spoiled=spoiled, **kwargs):
            found = generate(*args, **kwargs)
            return type(found)(found.tokens, found.logprobs + off[: found.logprobs.shape[1]] * spoiled)

        trainer.model.sample = other
        trainer.train()
        advantages.append(recorder.rollouts[0][1].advantages)
    plain, weighed = advantages
    wanted = torch.ones(8) if cap is None else torch.tensor([min(math.e, cap), 1.0, math.exp(-0.5)]).repeat(3)[:8]
    length = plain.shape[1]
    assert torch.allclose(weighed, plain * wanted[:length], atol=1e-5) and (plain != 0).any(0).sum() > 2


def test_batch_sizes_without_gradients_change_memory_and_not_numbers(tmp_path):
    found = {}
    for forward, decode in ((64, None), (3, None), (3, 2), (64, 1)):
        sizes = {"scored": [], "decoded": []}
        config = {"local_rollout_forward_batch_size": forward, "generation_batch_size": decode, "max_steps": 4,
                  "per_device_train_batch_size": 4}  # fmt: skip
        trainer, recorder = recorded(tmp_path, config)

        def count_scored(module, args, sizes=sizes):
            if not torch.is_grad_enabled():
                sizes["scored"].append(len(args[0]))

        def count_decoded(module, args, kwargs, sizes=sizes):
            if kwargs["use_cache"]:
                sizes["decoded"].append(len(kwargs["input_ids"]))

        trainer.model.register_forward_pre_hook(count_scored)
        trainer.model.language_model.model.register_forward_pre_hook(count_decoded, with_kwargs=True)
        trainer.train()
        assert max(sizes["scored"]) == 4  # of what is learned from, the micro-batches
        assert max(sizes["decoded"]) == min(decode or forward, 8)
        found[forward, decode] = recorder.rollouts[0][1]
    whole = found.pop((64, None))
    for rollout in found.values():
        assert torch.equal(rollout.input_ids, whole.input_ids)
        for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns", "sequence_scores"):
            assert (getattr(rollout, name) - getattr(whole, name)).abs().max() < 1e-5


def test_stop_token_eos_says_what_holds_anyway(tmp_path):
    said, unsaid = (make_trainer(tmp_path, config={"stop_token": s}) for s in ("eos", None))
    assert said.stop_ids == unsaid.stop_ids == [2]
    assert make_trainer(tmp_path, config={"stop_token_id": 8}).stop_ids == [2, 8]


def test_samples_are_shown_as_often_as_asked(tmp_path, capsys):
    def tables(**config):
        capsys.readouterr()
        fewest = {"num_ppo_epochs": 1, "max_steps": 4, "response_length": 2}
        recorded(tmp_path, {**ONE_MINIBATCH, **fewest, **config})[0].train()
        printed = capsys.readouterr().out
        return printed.count("Samples at step"), printed

    assert tables(num_sample_generations=0)[0] == 0
    assert tables(num_sample_generations=2)[0] == 2
    assert tables(num_sample_generations=4)[0] == 4
    assert tables(log_completions=True)[0] == 4
    one, three = (tables(num_sample_generations=1, num_completions_to_print=n)[1] for n in (1, 3))
    assert three.count("the f") == 3 * one.count("the f") > 0


@pytest.mark.filterwarnings("ignore:Step 0 has gradients that are not finite")
@pytest.mark.parametrize("hidden", [True, False])
def test_a_nan_loss_is_seen_in_the_log(tmp_path, monkeypatch, hidden):
    compute_loss = PPOTrainer.compute_loss

    def spoiled(self, *args, **kwargs):
        return compute_loss(self, *args, **kwargs) * math.nan

    monkeypatch.setattr(PPOTrainer, "compute_loss", spoiled)
    trainer, _ = recorded(tmp_path, {"logging_nan_inf_filter": hidden, "max_steps": 1})
    trainer.train()
    assert math.isnan(logged(trainer, "loss")[0]) != hidden
    assert inspect.signature(PPOConfig).parameters["logging_nan_inf_filter"].default is False


def test_columns_cannot_be_kept_from_reward_functions(tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns=True is not supported.*dataset.remove_columns"):
        make_config(tmp_path, remove_unused_columns=True)


# --- evaluate ---


def random_state():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_evaluate_reports_what_a_loop_over_the_answers_finds(tmp_path):
    seen = []

    def watched(prompts, completions, completion_ids, **kwargs):
        scores = count_e(prompts, completions)
        seen.append((prompts, completion_ids, scores))
        return scores

    tokenizer, base = make_tokenizer(), one_layer().eval()
    trainer, _ = recorded(
        tmp_path, {"temperature": 0.7, "response_length": 12, "stop_token_id": 32}, reward_funcs=watched,
        eval_dataset=make_prompts(7),
    )  # fmt: skip
    trainer.train()
    seen.clear()
    metrics = trainer.evaluate()
    ((prompts, completions, scores),) = seen
    assert prompts == make_prompts(7)["prompt"]
    assert len({len(ids) for ids in completions}) > 1
    policy, kls = trainer.model.policy.eval(), []
    for prompt, response in zip(prompts, completions, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            now, start = (
                (model(torch.tensor([ids + response])).logits[0, len(ids) - 1 : -1].double() / 0.7).log_softmax(-1)
                for model in (policy, base)
            )
        kls.append(sum((now[t, token] - start[t, token]).item() for t, token in enumerate(response)))
    assert metrics["eval_reward"] == pytest.approx(sum(scores) / 7, abs=1e-6)
    assert metrics["eval_completions/mean_length"] == pytest.approx(sum(map(len, completions)) / 7, abs=1e-5)
    assert metrics["eval_kl"] == pytest.approx(sum(kls) / 7, abs=1e-4)
    assert abs(metrics["eval_kl"]) > 1e-2
    unfinished = sum(ids[-1] not in (2, 32) for ids in completions) / 7
    assert metrics["eval_completions/clipped_ratio"] == pytest.approx(unfinished, abs=1e-6)


def test_evaluate_can_be_repeated_and_touches_nothing(tmp_path):
    def noisy(prompts, completions, **kwargs):
        return [random.random() + np.random.rand() + torch.rand(()).item() for _ in prompts]

    trainer, _ = recorded(tmp_path, reward_funcs=[count_e, noisy], eval_dataset=make_prompts(6))
    trainer.train()
    weights, optimizer = trained_weights(trainer), trainer.optimizer.state_dict()["state"]
    moments = {key: value["exp_avg"].clone() for key, value in optimizer.items()}
    state = random_state()
    first = trainer.evaluate()
    assert trainer.evaluate() == first
    assert random_state() == state
    assert largest_gap(weights, trained_weights(trainer)) == 0.0
    assert all(torch.equal(optimizer[key]["exp_avg"], value) for key, value in moments.items())
    assert first["eval_rewards/noisy/mean"] != 0
    assert trainer.evaluate(make_prompts(5))["eval_reward"] != first["eval_reward"]


def test_several_evaluation_sets_by_name(tmp_path):
    sets = {"short": make_prompts(3), "long": make_prompts(9)}
    trainer, _ = recorded(tmp_path, {"eval_strategy": "steps", "eval_steps": 4}, eval_dataset=sets)
    trainer.train()
    assert [len(logged(trainer, f"eval_{name}_reward")) for name in sets] == [2, 2]
    assert not logged(trainer, "eval_reward")
    together = trainer.evaluate()
    for name, data in sets.items():
        alone = trainer.evaluate(data)
        assert together[f"eval_{name}_reward"] == alone["eval_reward"]
        assert together[f"eval_{name}_completions/mean_length"] == alone["eval_completions/mean_length"]


def test_evaluate_without_prompts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs prompts"):
        make_trainer(tmp_path).evaluate()


def test_rollouts_are_made_in_eval_mode_and_learned_from_in_train_mode(tmp_path, monkeypatch):
    modes = {"rollout": set(), "loss": set()}

    def watching(prompts, completions, **kwargs):
        modes["rollout"].add(trainer.model.training)
        return count_e(prompts, completions)

    compute_loss = PPOTrainer.compute_loss

    def watched(self, model, *args, **kwargs):
        modes["loss"].add(model.training)
        return compute_loss(self, model, *args, **kwargs)

    monkeypatch.setattr(PPOTrainer, "compute_loss", watched)
    config = {"eval_strategy": "steps", "eval_steps": 2}
    trainer, _ = recorded(tmp_path, config, reward_funcs=watching, eval_dataset=make_prompts(2))
    trainer.train()
    assert modes == {"rollout": {False}, "loss": {True}}


# --- checkpoints ---


def best_at_step_4(prompts, completions, trainer_state, **kwargs):
    return [(10.0 if trainer_state.global_step == 4 else 0.0) + e for e in count_e(prompts, completions)]


@pytest.mark.parametrize("adapter", [True, False], ids=["LoRA", "whole model"])
def test_the_best_adapter_and_value_head_are_restored(tmp_path, adapter):
    config = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "save_total_limit": 2,
    }  # fmt: skip
    trainer, recorder = recorded(
        tmp_path, config, reward_funcs=best_at_step_4, eval_dataset=make_prompts(4),
        peft_config=lora() if adapter else None,
    )  # fmt: skip
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-4"
    assert trainer.state.best_metric == max(logged(trainer, "eval_reward")) >= 10
    best, last, now = recorder.steps[3], recorder.steps[7], trained_weights(trainer)
    assert largest_gap(now, best) == 0.0
    head = {name: w for name, w in last.items() if name.startswith("value_head")}
    assert len(head) == 2 and largest_gap(head, {name: best[name] for name in head}) > 1e-4
    policy = {name: w for name, w in last.items() if name not in head}
    assert largest_gap(policy, {name: best[name] for name in policy}) > 1e-3
    assert {folder.name for folder in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}


@pytest.mark.parametrize(("limit", "kept"), [(1, {8}), (3, {4, 6, 8}), (None, {2, 4, 6, 8})])
def test_only_so_many_checkpoints_are_kept(tmp_path, limit, kept):
    config = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": limit}
    recorded(tmp_path, config)[0].train()
    assert steps_of_checkpoints(tmp_path) == kept


def steps_of_checkpoints(folder):
    return {int(found.name.split("-")[1]) for found in folder.glob("checkpoint-*")}


def test_checkpoints_of_another_run_are_named_and_push_out_none_of_this_one(tmp_path):
    config = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    recorded(tmp_path, config)[0].train()
    assert steps_of_checkpoints(tmp_path) == {8}
    (tmp_path / "checkpoint-3.bak").mkdir()  # a name of somebody else's, which is no checkpoint
    again, _ = recorded(tmp_path, {**config, "max_steps": 5})
    with pytest.warns(UserWarning, match="another run beyond step 0, where this one begins, up to checkpoint-8"):
        again.train()
    assert {folder.name for folder in tmp_path.glob("checkpoint-*")} == {
        "checkpoint-3.bak", "checkpoint-5", "checkpoint-8",
    }  # fmt: skip
    shutil.rmtree(tmp_path / "checkpoint-8")
    resumed, _ = recorded(tmp_path, config)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*another run")
        resumed.train(resume_from_checkpoint=True)  # from 5
    earlier, _ = recorded(tmp_path, {**config, "save_total_limit": None})
    shutil.copytree(tmp_path / "checkpoint-8", tmp_path / "checkpoint-9")
    with pytest.warns(UserWarning, match="another run beyond step 8, where this one begins, up to checkpoint-9"):
        earlier.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_model_saved_without_its_optimizer_is_not_resumed(tmp_path):
    config = {"save_strategy": "steps", "save_steps": 4, "save_only_model": True}
    trainer, recorder = recorded(tmp_path / "a", config)
    trainer.train()
    folder = tmp_path / "a" / "checkpoint-4"
    files = {file.name for file in folder.iterdir()}
    assert {"adapter_model.safetensors", "value_head.safetensors", "tokenizer.json"} <= files
    assert not {"optimizer.pt", "ppo_state_0.json", "rollout_0.safetensors"} & files
    fresh, _ = recorded(tmp_path / "b", config)
    before = trained_weights(fresh)
    with pytest.raises(ValueError, match="checkpoint-4.*cannot resume.*save_only_model"):
        fresh.train(resume_from_checkpoint=str(folder))
    assert largest_gap(before, trained_weights(fresh)) == 0.0
    fresh.model.load_weights(folder)
    assert largest_gap(trained_weights(fresh), recorder.steps[3]) == 0.0


def test_a_checkpoint_between_rollouts_holds_no_rollout(tmp_path):
    recorded(tmp_path, {"save_strategy": "steps", "save_steps": 1})[0].train()
    with_rollout = {int(file.parent.name.split("-")[1]) for file in tmp_path.glob("*/rollout_0.safetensors")}
    assert with_rollout == {1, 2, 3, 5, 6, 7}


def test_nothing_that_is_saved_is_pickled_by_us(tmp_path):
    trainer, _ = recorded(tmp_path)
    trainer.train()
    trainer.save_model()
    files = {file.name for file in tmp_path.iterdir() if file.is_file()} - {"README.md"}
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".jinja", ".svg"}
    assert json.loads((tmp_path / "training_args.json").read_text())["num_ppo_epochs"] == 2


# --- prompts and rewards ---

CHATS = {
    "one question": ([("user", "say a")], "<|user|>say a<eos><|assistant|>"),
    "a longer talk": (
        [("system", "be kind"), ("user", "hi"), ("assistant", "yes"), ("user", "go on")],
        "<|system|>be kind<eos><|user|>hi<eos><|assistant|>yes<eos><|user|>go on<eos><|assistant|>",
    ),
}


def test_conversations_go_through_the_chat_template_and_come_back_as_messages(tmp_path):
    talks = [[{"role": role, "content": text} for role, text in turns] for turns, _ in CHATS.values()]
    data = Dataset.from_dict({"prompt": talks * 4, "topic": ["x", "y"] * 4})
    tokenizer, seen = make_tokenizer(CHAT_TEMPLATE), []

    def watched(prompts, completions, completion_ids, topic, **kwargs):
        seen.append((prompts, completions, completion_ids, topic))
        return count_e(prompts, completions)

    trainer, recorder = recorded(tmp_path, reward_funcs=watched, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    _, *rollouts = seen  # before them: an empty answer, and the prompt repeated
    for (prompts, completions, ids, topics), samples in zip(rollouts, recorder.samples, strict=True):
        for i, prompt in enumerate(prompts):
            which = talks.index(prompt)
            assert topics[i] == "xy"[which]
            ((role, content),) = [tuple(message.values()) for message in completions[i]]
            assert list(completions[i][0]) == ["role", "content"] and role == "assistant"
            assert content == tokenizer.decode(ids[i], skip_special_tokens=True)
            width = samples.input_ids.shape[1] - samples.action_mask.shape[1]
            read = samples.input_ids[i, :width][samples.attention_mask[i, :width].bool()]
            assert tokenizer.decode(read) == list(CHATS.values())[which][1]


def test_a_reply_that_was_begun_is_continued(tmp_path):
    data = Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": "say a"}, {"role": "assistant", "content": "well"}]] * 4}
    )
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    trainer = make_trainer(tmp_path, config=QUICK, train_dataset=data, processing_class=tokenizer)
    assert tokenizer.decode(trainer.train_dataset[0]["input_ids"]) == "<|user|>say a<eos><|assistant|>well"


def test_text_is_continued_by_what_the_policy_wrote(tmp_path):
    seen = []

    def watched(prompts, completions, completion_ids, **kwargs):
        seen.extend(zip(prompts, completions, completion_ids, strict=True))
        return count_e(prompts, completions)

    trainer, _ = recorded(tmp_path, reward_funcs=watched)
    trainer.train()
    assert seen and set(trainer.train_dataset["prompt"]) >= {prompt for prompt, _, _ in seen}
    for _, completion, ids in seen:
        assert isinstance(completion, str)
        assert completion == make_tokenizer().decode(ids, skip_special_tokens=True)


def test_async_and_plain_reward_functions_mix(tmp_path):
    async def later(prompts, completions, **kwargs):
        import asyncio

        await asyncio.sleep(0.001)
        return count_e(prompts, completions)

    runs = []
    for second in (count_e, later):
        trainer, _ = recorded(tmp_path, reward_funcs=[count_e, second], callbacks=[])
        trainer.train()
        runs.append((trained_weights(trainer), logged(trainer, "reward")))
    assert "rewards/later/mean" in trainer.state.log_history[0]
    assert largest_gap(runs[0][0], runs[1][0]) == 0.0 and runs[0][1] == runs[1][1]


def length(prompts, completions, **kwargs):
    return [float(len(as_text(c))) for c in completions]


def sometimes(prompts, completions, wanted, **kwargs):
    """None for half of the prompts."""
    return [None if w in "ace" else float(as_text(c).count(w)) for c, w in zip(completions, wanted, strict=True)]


def test_rewards_are_weighted_and_none_is_left_out(tmp_path):
    config = {"reward_weights": [1.0, -0.5, 2.0], "missing_eos_penalty": None, "logging_steps": 4}
    trainer, recorder = recorded(tmp_path, config, reward_funcs=[count_e, length, sometimes])
    trainer.train()
    for (_, rollout), samples, row in zip(recorder.rollouts, recorder.samples, trainer.state.log_history, strict=False):
        data = samples.completions
        columns = [f(data.prompts, data.completions, **data.columns) for f in (count_e, length, sometimes)]
        assert None in columns[2] and any(x is not None for x in columns[2])
        totals = [
            sum(w * x for w, x in zip((1.0, -0.5, 2.0), scores, strict=True) if x is not None)
            for scores in zip(*columns, strict=True)
        ]
        assert rollout.sequence_scores.tolist() == pytest.approx(totals)
        assert row["reward"] == pytest.approx(sum(totals) / len(totals), abs=1e-6)
        for name, column in zip(("count_e", "length", "sometimes"), columns, strict=True):
            known = [x for x in column if x is not None]
            mean = sum(known) / len(known)
            assert row[f"rewards/{name}/mean"] == pytest.approx(mean, abs=1e-6)
            std = math.sqrt(sum((x - mean) ** 2 for x in known) / len(known))
            assert row[f"rewards/{name}/std"] == pytest.approx(std, abs=1e-5)


@pytest.mark.filterwarnings("ignore:Every reward function returned None")
def test_a_response_without_any_reward_is_not_learned_from(tmp_path):
    trainer, recorder = recorded(tmp_path, reward_funcs=sometimes, config={"gradient_accumulation_steps": 2})
    trainer.train()
    counts = set()
    for (_, rollout), samples in zip(recorder.rollouts, recorder.samples, strict=True):
        unscored = [w in "ace" for w in samples.completions.columns["wanted"]]
        assert rollout.action_mask.any(1).tolist() == [not u for u in unscored]
        counts.add(sum(unscored))
        for row, left_out in enumerate(unscored):
            trainer.model.zero_grad()
            micro_batch = rollout.micro_batch(torch.tensor([row]))
            loss = trainer.compute_loss(trainer.model, micro_batch, num_items_in_batch=torch.tensor(10))
            loss.backward()
            reached = any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.model.parameters())
            assert reached != left_out and (loss.item() == 0.0) == left_out
        known = rollout.action_mask
        assert rollout.advantages[known].mean().abs() < 1e-5
        assert rollout.advantages[known].var(unbiased=False).item() == pytest.approx(1.0, abs=1e-3)
    assert 0 not in counts and 8 not in counts


@pytest.mark.filterwarnings("ignore:Every reward function returned None")
def test_a_rollout_without_any_reward_leaves_the_weights_finite(tmp_path):
    def silent(prompts, completions, **kwargs):
        return [None] * len(prompts)

    trainer, recorder = recorded(tmp_path, reward_funcs=silent)
    before = trained_weights(trainer)
    trainer.train()
    assert not any(rollout.action_mask.any() for _, rollout in recorder.rollouts)
    assert largest_gap(before, trained_weights(trainer)) == 0.0


def test_reward_functions_can_log_and_know_the_state(tmp_path):
    steps = []

    def telling(prompts, completions, trainer_state, log_metric, log_extra, **kwargs):
        steps.append(trainer_state.global_step)
        log_metric("mood", 0.25 * len(steps))
        log_extra("length", [len(c) for c in completions])
        return count_e(prompts, completions)

    trainer, recorder = recorded(tmp_path, reward_funcs=telling, config={"logging_steps": 4})
    trainer.train()
    assert steps == [0, 0, 4]  # before the first rollout once more, and what is logged then is dropped
    assert logged(trainer, "mood") == [0.5, 0.75]
    assert recorder.samples[0].extra == {"length": [len(c) for c in recorder.samples[0].completions.completions]}


# --- models by name, and without PEFT ---


def by_name(tmp_path, base, **options):
    return make_trainer(
        tmp_path, config=options.pop("config", QUICK), model=str(base), processing_class=None, **options
    )


@pytest.mark.parametrize("adapter", [True, False], ids=["LoRA", "whole model"])
def test_a_model_by_name_is_trained_saved_and_loaded(tmp_path, base, adapter):
    trainer = by_name(tmp_path, base, peft_config=lora() if adapter else None)
    trainer.train()
    trainer.save_model()
    in_memory = make_trainer(tmp_path / "other", config=QUICK, peft_config=lora() if adapter else None)
    in_memory.train()
    assert largest_gap(trained_weights(trainer), trained_weights(in_memory)) < 1e-6
    kind = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    loaded = kind.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        found, wanted = loaded(ids).logits, trainer.model.policy.eval()(ids).logits
        assert torch.equal(found, wanted)
        assert (found - make_model().eval()(ids).logits).abs().max() > 1e-2
    if adapter:
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == str(base)
        assert not (tmp_path / "model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(tmp_path)("abc")["input_ids"] == make_tokenizer()("abc")["input_ids"]


def test_a_model_by_name_is_loaded_as_told(tmp_path, base):
    trainer = by_name(
        tmp_path, base, config={"model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "eager"}}
    )
    model = trainer.model.language_model
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    other = by_name(tmp_path, base).model.language_model
    assert other.model.embed_tokens.weight.dtype == torch.float32 and other.config._attn_implementation == "sdpa"


def test_the_whole_model_is_trained_without_an_adapter(tmp_path):
    trainer, recorder = recorded(tmp_path, peft_config=None)
    before = trained_weights(trainer)
    trainer.train()
    after = trained_weights(trainer)
    start = one_layer().state_dict()
    assert {name for name in before if name.startswith("policy.")} == {f"policy.{name}" for name in start}
    assert all(not torch.equal(before[name], after[name]) for name in before)
    reference = trainer.model._ref_model[0].state_dict()
    assert all(torch.equal(reference[name], value) for name, value in start.items())
    assert logged(trainer, "kl")[0] == 0.0 and abs(logged(trainer, "kl")[1]) > 1e-3
    assert max(logged(trainer, "ppo/initial_ratio_error")) < 1e-5
    assert len(recorder.rollouts) == 2


def sft_adapter(base, folder, **tokenizer):
    """An adapter on a saved base, far from it, in a folder with a tokenizer."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    make_tokenizer(**tokenizer).save_pretrained(folder)
    return model


@pytest.mark.parametrize("by_name", [False, True], ids=["PeftModel", "name"])
def test_an_adapter_is_continued_against_itself(tmp_path, base, by_name):
    sft = sft_adapter(base, tmp_path / "sft")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        start = sft(ids).logits
    model, tokenizer = (str(tmp_path / "sft"), None) if by_name else (sft, make_tokenizer())
    trainer, recorder = recorded(tmp_path / "out", model=model, peft_config=None, processing_class=tokenizer)
    trainer.train()
    first, second = (rollout for _, rollout in recorder.rollouts)
    assert torch.equal(first.logprobs, first.ref_logprobs)
    assert (second.logprobs - second.ref_logprobs).abs().max() > 1e-2
    assert all(".default." in n or n.startswith("value_head") for n in trained_weights(trainer))
    policy = trainer.model.eval().policy
    with torch.no_grad(), trainer.model.role("reference"):
        assert torch.allclose(policy(ids).logits, start, atol=1e-6)
    trainer.save_model()
    assert not (tmp_path / "out" / "ref").exists()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, policy(ids).logits, atol=1e-6)
        assert (loaded(ids).logits - start).abs().max() > 1e-2


def test_an_adapter_by_name_takes_what_a_model_by_name_takes(tmp_path, base):
    sft_adapter(base, tmp_path / "sft")
    loaded = {"dtype": "bfloat16"}
    trainer = by_name(tmp_path, tmp_path / "sft", peft_config=None, config={**QUICK, "model_init_kwargs": loaded})
    assert trainer.model.language_model.dtype == torch.bfloat16
    assert {p.dtype for p in trainer.model.actor_parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [42, 43]}],
    ids=["resized", "trained", "single tokens"],
)
def test_an_adapter_by_name_brings_the_tokens_that_were_added_for_it(tmp_path, base, options):
    tokenizer, model = make_tokenizer(), AutoModelForCausalLM.from_pretrained(base)
    tokenizer.add_tokens(["<begin>", "<end>"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    sft = get_peft_model(model, lora(**options))
    with torch.no_grad():
        for _, parameter in filter(lambda named: named[1].requires_grad, sft.named_parameters()):
            parameter.normal_(std=0.1)
    sft.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    ids = torch.tensor([[5, 42, 43, 8]])
    trainer = by_name(tmp_path / "out", tmp_path / "sft", peft_config=None, train_dataset=begun_with("<begin>"))
    with torch.no_grad():
        assert torch.allclose(trainer.model.eval().policy(ids).logits, sft.eval()(ids).logits, atol=1e-6)
    trainer.train()
    assert logged(trainer, "kl")[0] == 0.0 and abs(logged(trainer, "kl")[1]) > 1e-3


def begun_with(token):
    return make_prompts().map(lambda row: {"prompt": token + row["prompt"]})


def test_an_adapter_that_does_not_fit_its_base_is_named(tmp_path, base):
    folder = tmp_path / "sft"
    get_peft_model(make_model(hidden_size=64), lora()).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    with pytest.raises(
        ValueError, match=r"sft does not fit this model \(size mismatch .* Load it with the base that it was trained on"
    ):
        by_name(tmp_path / "out", folder, peft_config=None)


def test_the_tokenizer_of_an_adapter_is_its_own_or_that_of_its_base(tmp_path, base):
    folder = tmp_path / "sft"
    sft_adapter(base, folder, chat_template=CHAT_TEMPLATE)
    assert load_tokenizer(str(folder), False).chat_template == CHAT_TEMPLATE
    for file in folder.glob("*token*"):
        file.unlink()
    alone = load_tokenizer(str(folder), False)
    assert alone.chat_template is None and alone("abc")["input_ids"] == make_tokenizer()("abc")["input_ids"]


def test_training_can_go_on_with_a_second_call(tmp_path):
    trainer, recorder = recorded(tmp_path)
    trainer.train()
    first = trained_weights(trainer)
    trainer.train()
    assert len(recorder.rollouts) == 4
    assert largest_gap(first, trained_weights(trainer)) > 1e-3

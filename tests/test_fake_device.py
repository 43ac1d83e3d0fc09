"""On an accelerator nothing is left on the CPU: training there gives the numbers that it gives here.

The accelerator is that of fake_device.py. Each case runs on both, in a process of its own for each group.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import fake_device
import pytest
import torch
from conftest import classifier, lora, make_model, make_prompts, make_tokenizer, make_trainer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_architectures import TARGETS, build
from torch import nn
from transformers import AutoModelForCausalLM

import ppo_plus.models.actor_critic
from ppo_plus import AdaptiveKLCallback, PPOCallback, RewardConfig, RewardTrainer
from ppo_plus.callbacks.reward_normalization import RewardNormalizationCallback
from ppo_plus.data.seeding import isolated_rng
from ppo_plus.models.actor_critic import ActorCritic
from ppo_plus.utils.devices import generator_state, has_float64

pytestmark = pytest.mark.skipif(
    not hasattr(fake_device.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no backends that are written in Python",
)
GROUPS = {}
WITHOUT_FLOAT64 = set()


def group(name, float64=True):
    """A case of a group: a function of its folder, of whether it runs on the CPU, and of what `saved_models` wrote.

    Without `float64`, it also runs on a device that has none, as Apple's GPUs are.
    """

    def add(case):
        GROUPS.setdefault(name, {})[case.__name__] = case
        WITHOUT_FLOAT64.update(() if float64 else [case.__name__])
        return case

    return add


def saved_models(folder):
    """A base on disk, and a reward adapter on it."""
    base, adapter = folder / "base", folder / "reward"
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(classifier(base, seed=3), config)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(adapter)
    return base, adapter


def trained(folder, cpu, config=None, resume=None, **overrides):
    """What a run logged, and the sum of each weight that it trained."""
    trainer = make_trainer(folder, config={"use_cpu": cpu, "max_steps": 4, **(config or {})}, **overrides)
    trainer.train(resume_from_checkpoint=resume)
    weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert weights and all((weight.device.type == "cpu") == cpu for weight in weights.values())
    return [
        *trainer.state.log_history,
        {name: weight.cpu().double().abs().sum().item() for name, weight in weights.items()},
    ]


# --- what is trained, and by what loss ---


@group("training", float64=False)
def default(folder, cpu, base, adapter):
    return trained(folder, cpu)


@group("training")
def all_losses(folder, cpu, base, adapter):
    config = {
        "entropy_coef": 0.1,
        "kl_penalty_in": "loss",
        "kl_estimator": "k3",
        "dual_clip": 3.0,
        "cliprange_high": 0.3,
    }
    return trained(folder, cpu, config)


@group("training", float64=False)
def all_rewards(folder, cpu, base, adapter):
    config = {"lam": 0.5, "gamma": 0.9, "kl_coef": 0.2, "train_on_eos": False, "whiten_rewards": True,
              "importance_sampling_cap": 2.0, "missing_eos_penalty": 0.5}  # fmt: skip
    return trained(folder, cpu, config, train_dataset=make_prompts(32).to_iterable_dataset())


@group("training", float64=False)
def sampling(folder, cpu, base, adapter):
    return trained(folder, cpu, {"top_k": 5, "top_p": 0.9, "temperature": 2.0, "stop_token_id": 7})


@group("training")
def checkpointing(folder, cpu, base, adapter):
    return trained(folder, cpu, {"gradient_checkpointing": True})


@group("training")
def top_layers(folder, cpu, base, adapter):
    return trained(folder, cpu, peft_config=lora(layers_to_transform=[1], target_modules=["q_proj", "v_proj"]))


@group("training")
def whole_model(folder, cpu, base, adapter):
    return trained(folder, cpu, peft_config=None)


@group("training")
def whole_model_and_its_reference(folder, cpu, base, adapter):
    return trained(folder, cpu, peft_config=None, ref_model=make_model())


@group("training")
def model_that_is_there_already(folder, cpu, base, adapter):
    return trained(folder, cpu, model=make_model().to("cpu" if cpu else fake_device.NAME))


@group("training")
def adapter_that_is_there_already(folder, cpu, base, adapter):
    """Its first weights are kept as reference."""
    torch.manual_seed(0)
    model = get_peft_model(make_model(), lora()).to("cpu" if cpu else fake_device.NAME)
    return trained(folder, cpu, model=model, peft_config=None)


@group("training")
def little_memory(folder, cpu, base, adapter):
    """Only one row at a time fits into a pass."""
    inner = ActorCritic.forward

    def forward(self, input_ids, *args, **kwargs):
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("no more than one row fits")
        return inner(self, input_ids, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActorCritic, "forward", forward)
        return trained(folder, cpu)


def some_do_not_know(completions, **kwargs):
    return [None if i % 3 == 0 else float(len(c)) for i, c in enumerate(completions)]


@group("training", float64=False)
def steps_skipped(folder, cpu, base, adapter):
    """The third gradient is not finite, and the response that it comes from is looked for."""
    trainer = make_trainer(folder, config={"use_cpu": cpu, "max_steps": 6}, reward_funcs=some_do_not_know)
    inner, calls = trainer.compute_loss, []

    def compute_loss(*args, **kwargs):
        calls.append(None)
        return inner(*args, **kwargs) * (math.inf if len(calls) in (5, 6) else 1.0)

    trainer.compute_loss = compute_loss
    with pytest.warns(UserWarning, match="gradients that are not finite"):
        trainer.train()
    return trainer.state.log_history


# --- critics and rewards ---


@group("roles")
def detached(folder, cpu, base, adapter):
    return trained(folder, cpu, {"critic": "detached", "value_head": "mlp"})


@group("roles")
def adapter_as_critic(folder, cpu, base, adapter):
    return trained(folder, cpu, {"critic": "adapter", "critic_warmup_steps": 2})


@group("roles")
def model_as_critic(folder, cpu, base, adapter):
    return trained(folder, cpu, value_model=classifier(base))


@group("roles")
def models_as_rewards(folder, cpu, base, adapter):
    """A classifier that was loaded on the CPU, and one by name."""
    classifier(base).save_pretrained(folder / "scorer")
    make_tokenizer().save_pretrained(folder / "scorer")
    return trained(folder, cpu, reward_funcs=[classifier(base), str(folder / "scorer")])


@group("roles", float64=False)
def adapter_as_reward(folder, cpu, base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return trained(folder, cpu, {"stop_token_id": 7}, model=model, reward_funcs=str(adapter))


@group("roles")
def adapter_as_reward_and_critic(folder, cpu, base, adapter):
    return trained(folder, cpu, {"critic": "adapter"}, model=str(base), reward_funcs=str(adapter))


class PaysTheFirstToken(PPOCallback):
    def on_rewards_computed(self, args, state, control, scores, token_rewards, **kwargs):
        token_rewards[:, 0] += 0.5
        scores *= 2


@group("roles", float64=False)
def callbacks(folder, cpu, base, adapter):
    given = [RewardNormalizationCallback(), AdaptiveKLCallback(target=1.0, horizon=8), PaysTheFirstToken()]
    return trained(folder, cpu, callbacks=given)


# --- what Trainer does beside ---


@group("Trainer", float64=False)
def evaluation_and_reports(folder, cpu, base, adapter):
    config = {"eval_strategy": "steps", "eval_steps": 2, "html_report": True, "num_sample_generations": 2,
              "log_completions": True}  # fmt: skip
    return trained(folder, cpu, config, eval_dataset=make_prompts(8))


@group("Trainer", float64=False)
def resumed(folder, cpu, base, adapter):
    config = {"save_strategy": "steps", "save_steps": 3}
    whole = trained(folder / "whole", cpu, {**config, "max_steps": 8})
    again = trained(folder / "whole", cpu, {"max_steps": 8}, resume=str(folder / "whole" / "checkpoint-3"))
    assert whole[-1] == again[-1]
    return again


@group("Trainer")
def best_of_all(folder, cpu, base, adapter):
    config = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
              "load_best_model_at_end": True, "metric_for_best_model": "eval_reward"}  # fmt: skip
    return trained(folder, cpu, config, eval_dataset=make_prompts(8))


@group("Trainer")
def full_determinism(folder, cpu, base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    try:
        return trained(folder, cpu, {"full_determinism": True, "top_p": 0.9}, model=model, reward_funcs=str(adapter))
    finally:
        torch.use_deterministic_algorithms(False)


@group("Trainer", float64=False)
def reward_model(folder, cpu, base, adapter):
    rows = {"prompt": ["ab", "cd "] * 4, "chosen": ["good", "fine film"] * 4, "rejected": ["bad", "awful"] * 4}
    config = RewardConfig(
        str(folder), max_steps=3, use_cpu=cpu, report_to="none", bf16=False, per_device_train_batch_size=2,
        logging_steps=1, disable_tqdm=True, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = RewardTrainer(
        str(base), config, train_dataset=Dataset.from_dict(rows), eval_dataset=Dataset.from_dict(rows),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=2, task_type="SEQ_CLS", modules_to_save=["score"], target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    return [*trainer.state.log_history, trainer.calibrate()]


# --- caches, masks and positions of every kind ---


def family(name):
    def run(folder, cpu, base, adapter):
        given = {"model": build(name), "peft_config": lora(target_modules=TARGETS.get(name, "all-linear"))}
        return trained(folder, cpu, {"stop_token_id": 7, "temperature": 2.0}, **given)

    return run


GROUPS["roles"] |= {name: family(name) for name in ("OPT", "Gemma 3", "Mamba 2", "Falcon-H1", "LFM 2")}


@group("Trainer", float64=False)
def generator_of_the_device(folder, cpu, base, adapter):
    """It is left alone by rollouts and evaluations, and goes on from a checkpoint."""
    generator = torch.fake_device.generator
    generator.manual_seed(7)
    before = generator.get_state()
    with isolated_rng(1):
        torch.rand(1, generator=generator)
    assert torch.equal(generator.get_state(), before)
    config = {"save_strategy": "steps", "save_steps": 2}
    trained(folder, cpu, config)
    saved = json.loads((folder / "checkpoint-4" / "ppo_state_0.json").read_text(encoding="utf-8"))["generator"]
    assert saved == generator_state()
    generator.manual_seed(8)
    again = trained(folder, cpu, {"max_steps": 5}, resume=str(folder / "checkpoint-4"))
    assert generator_state() == saved
    return again


# --- negative control: what was on the wrong device would be found ---


@group("device")
def reference_left_behind(folder, cpu, base, adapter):
    ppo_plus.models.actor_critic.move_if_movable = lambda model, device: None
    return trained(folder, cpu, peft_config=None)


def compared(name, work):
    """Of each case of a group what it gave on the CPU and on each kind of device, or the error there."""
    base, adapter = saved_models(work)
    found = {}
    for case, run in GROUPS[name].items():
        found[case] = {}
        for place in ("CPU", "device", *(["no float64"] if case in WITHOUT_FLOAT64 else [])):
            fake_device.FLOAT64 = place != "no float64"
            has_float64.cache_clear()
            found[case][place] = result = {}
            os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
            with contextlib.nullcontext() if place == "CPU" else fake_device.fake_device() as device:
                if place != "CPU":
                    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
                try:
                    result["rows"] = run(work / case / place, place == "CPU", base, adapter)
                except Exception as error:
                    result["error"] = f"{type(error).__name__}: {error}"
    return found


def is_number(value):
    return isinstance(value, int | float)


def figures(rows):
    """All numbers of a log but those that measure time."""
    clocks = ("time", "second")
    return [{k: v for k, v in row.items() if is_number(v) and not any(c in k for c in clocks)} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["training", "roles", "Trainer"])
def test_training_on_an_accelerator_gives_the_numbers_of_the_cpu(name):
    found = process(name)
    places = [(case, place) for case, results in found.items() for place in results if place != "CPU"]
    assert {case for case, _ in places} == {*GROUPS[name]} and any(place == "no float64" for _, place in places)
    assert {key: found[key[0]][key[1]].get("error") for key in places} == dict.fromkeys(places)
    for case, place in places:
        ours, wanted = figures(found[case][place]["rows"]), figures(found[case]["CPU"]["rows"])
        assert len(ours) == len(wanted) > 2, case
        for row, expected in zip(ours, wanted, strict=True):
            assert row == pytest.approx(expected, rel=5e-5, abs=1e-5, nan_ok=True), (case, place)


def process(name):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, name], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_device_keeps_its_tensors_apart_and_a_model_left_behind_is_found():
    found = process("device")["reference_left_behind"]
    assert "rows" in found["CPU"] and "embedding was given tensors of two devices" in found["device"]["error"]


def device_keeps_its_tensors_apart():
    with fake_device.fake_device() as device:
        fake_device.FLOAT64 = False
        for operation in (lambda: torch.ones(1, device=device).double(), lambda: torch.ones(1).double().to(device)):
            with pytest.raises(TypeError, match="float64"):
                operation()
        fake_device.FLOAT64 = True
        here, x = torch.arange(6.0).view(2, 3), torch.arange(6.0, device=device).view(2, 3)
        index, scalar = torch.tensor([1, 0]), torch.tensor(2.0)
        refused = [
            lambda: x + here, lambda: here + x, lambda: x @ here.T, lambda: torch.cat([x, here]),
            lambda: torch.stack([x[0, 0], scalar]), lambda: here[index.to(device)], lambda: x.numpy(),
            lambda: x.index_put_((index,), here), lambda: nn.functional.embedding(index, x), lambda: here.add_(x),
            lambda: torch.where(x > 2, x, here),
        ]  # fmt: skip
        for operation in refused:
            with pytest.raises((RuntimeError, TypeError), match="two devices|convert|numpy"):
                operation()
        allowed = [x + scalar, x[index], x[:, index], x.clone().index_put_((index,), scalar)]
        wanted = [here + 2, here[index], here[:, index], torch.full((2, 3), 2.0)]
        for found, expected in zip(allowed, wanted, strict=True):
            assert found.device == device and torch.equal(found.cpu(), expected)
        torch.use_deterministic_algorithms(True)
        with pytest.raises(RuntimeError, match="cumsum has no deterministic algorithm"):
            x.cumsum(-1)
        assert x.long().cumsum(-1).tolist() == [[0, 1, 3], [3, 7, 12]]
        torch.use_deterministic_algorithms(False)
        assert x.cumsum(-1).tolist() == [[0, 1, 3], [3, 7, 12]]
        # Views share their numbers, copies do not; gradients are computed there.
        view, copied = x[0], x.to(device, copy=True)
        view.mul_(10)
        assert x.tolist() == [[0.0, 10.0, 20.0], [3.0, 4.0, 5.0]] and copied.tolist() == here.tolist()
        here.copy_(x)
        assert here.tolist() == x.tolist()
        layer = nn.Linear(3, 1)
        moved = copy.deepcopy(layer).to(device)
        for one, numbers in ((layer, here), (moved, x)):
            one(numbers).sum().backward()
        assert isinstance(moved.weight, nn.Parameter) and moved.weight.grad.device == device
        assert torch.equal(moved.weight.grad.cpu(), layer.weight.grad)
        assert copy.deepcopy(moved).weight.tolist() == layer.weight.tolist()


if __name__ == "__main__":
    torch.set_num_threads(1)
    fake_device.set_up()
    with tempfile.TemporaryDirectory() as temporary:
        if sys.argv[1] == "device":
            device_keeps_its_tensors_apart()
        result = compared(sys.argv[1], Path(temporary))
    print("\n" + json.dumps(result, default=str))

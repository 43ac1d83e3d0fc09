"""A learning step waits for nothing: no host synchronization in a micro-batch, and no trace of neighbors in one."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path

import pytest
import torch
from conftest import lora, make_model, make_trainer
from peft import get_peft_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_plus import PPOCallback
from ppo_plus.models.actor_critic import ActorCritic
from ppo_plus.models.value_head import ValueHead

# Each makes the host wait for a GPU: it reads numbers, or makes a tensor whose shape depends on them.
OPERATORS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "_unique2", "equal")
METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero")


def asked_by() -> str:
    """The function, outside of torch, that the current operator was called from."""
    frame = sys._getframe(1)
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_name in ("__torch_dispatch__", "__torch_function__"):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"


class Operators(TorchDispatchMode):
    """Writes down the operators above as they reach the dispatcher, from forward and backward."""

    def __init__(self):
        super().__init__()
        self.found, self.seen = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            getattr(index, "dtype", None) is torch.bool for x in args if isinstance(x, list | tuple) for index in x
        )
        self.seen += 1
        if name in OPERATORS or by_mask:
            self.found.append((name, asked_by()))
        return function(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Writes down methods that never reach the dispatcher where the tensor is on the CPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        from_host = name in ("tensor", "as_tensor") and not isinstance(args[0], torch.Tensor)  # a copy that waits
        if name in METHODS or from_host:
            self.found.append((name, asked_by()))
        return function(*args, **(kwargs or {}))


class Keep(PPOCallback):
    def on_rollout_end(self, args, state, control, rollout, samples, metrics, **kwargs):
        self.rollout = rollout


def learning(tmp_path, config=None, **overrides):
    """A trainer that has learned from a rollout with responses of 1 to 8 tokens, and that rollout."""
    keep = Keep()
    trainer = make_trainer(tmp_path, config={"max_steps": 4, **(config or {})}, callbacks=[keep], **overrides)
    trainer.train()
    trainer.model.zero_grad()
    rollout = keep.rollout
    shorter = torch.arange(rollout.response_length) <= torch.arange(len(rollout))[:, None]
    attention_mask = rollout.attention_mask.clone()
    attention_mask[:, rollout.prompt_length :] *= shorter
    return trainer, dataclasses.replace(
        rollout, attention_mask=attention_mask, action_mask=rollout.action_mask & shorter
    )


def waits(trainer, rollout):
    """What would have waited in one micro-batch of Trainer's own `training_step`, and how many operators ran."""
    batch, tokens = rollout.micro_batch(torch.arange(4, 8)), rollout.action_mask.sum()
    with Operators() as operators, Methods() as methods:
        trainer.training_step(trainer.model, batch, tokens)
    return operators.found + methods.found, operators.seen


CONFIGS = [
    {},
    {"objective": "kl_penalty", "entropy_coef": 0.1},
    {"kl_penalty_in": "loss", "kl_estimator": "k3", "dual_clip": 3.0, "cliprange_value": None},
    {"activation_checkpointing": True, "critic": "detached", "value_head": "mlp"},
    {"critic": "adapter"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: ", ".join(c) or "defaults")
def test_nothing_in_a_micro_batch_waits_for_the_device(tmp_path, config):
    found, seen = waits(*learning(tmp_path, config, model=make_model(attn_implementation="eager")))
    assert found == []
    assert seen > 300  # the forward and backward pass of two layers did go by


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: ", ".join(c) or "defaults")
def test_without_padding_neither(tmp_path, config):
    found, seen = waits(*learning(tmp_path, config, model=make_model(attn_implementation="sdpa")))
    assert found == []
    assert seen > 300


@pytest.mark.parametrize("layers", [2, 4])
def test_with_padding_sdpa_of_transformers_asks_once_per_forward_whether_there_is_any(tmp_path, layers):
    """Its masking_utils reads the attention mask before the first layer; what is ours still waits for nothing."""
    trainer, rollout = learning(tmp_path, model=make_model(attn_implementation="sdpa", num_hidden_layers=layers))
    trainer.model.runner.packable_models = []
    found, _ = waits(trainer, rollout)
    assert {who for _, who in found} == {"masking_utils._ignore_causal_mask_sdpa"}
    assert len(found) <= 4


@pytest.mark.parametrize("pinned", [True, False])
def test_copies_to_a_gpu_do_not_wait_where_memory_may_be_pinned(tmp_path, monkeypatch, pinned):
    trainer, rollout = learning(tmp_path)
    trainer.args.dataloader_pin_memory = pinned
    batch, copies, locked = rollout.micro_batch(torch.arange(4)), [], set()

    def pin_memory(tensor):
        locked.add(id(tensor))
        return tensor

    def to(tensor, device, non_blocking=False):
        copies.append((id(tensor) in locked, str(device), non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(type(trainer.args), "device", torch.device("cuda"))
    batch["there"] = torch.empty(2, device="meta")  # not on the CPU: it cannot be pinned
    trainer._prepare_inputs(batch)
    assert copies.pop() == (False, "cuda", False)
    del batch["there"]
    assert copies == [(pinned, "cuda", pinned)] * sum(isinstance(value, torch.Tensor) for value in batch.values())


@pytest.mark.parametrize("leaving", [False, True])
def test_a_step_of_decoding_waits_once_and_once_more_where_rows_leave(leaving):
    """For how many rows go on; then for which."""
    actor = ActorCritic(get_peft_model(make_model(), lora()), ValueHead(32)).eval()
    torch.manual_seed(0)
    ids, noise = torch.randint(4, 30, (6, 5)), torch.rand(6, 9, dtype=torch.float64)
    options = {"pad_token_id": 0, "on_step": (alive := []).append}
    never = actor.num_embeddings
    tokens = actor.sample(ids, torch.ones_like(ids), noise, stop_ids=[never], **options).tokens
    assert alive == [6] * 9
    stop, alive[:] = tokens[0, 3].item() if leaving else never, []
    with Operators() as operators:
        actor.sample(ids, torch.ones_like(ids), noise, stop_ids=[stop], **options)
    left = sum(before > after > 0 for before, after in itertools.pairwise(alive))
    assert (left > 0) == leaving
    ours = [name for name, who in operators.found if who == "generation._decode"]
    assert (ours.count("_local_scalar_dense"), ours.count("nonzero")) == (len(alive), left)
    assert len(ours) == len(alive) + left


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (lambda loss: loss.item(), "_local_scalar_dense"),
        (lambda loss: loss.tolist(), "tolist"),
        (lambda loss: bool(loss > 0), "_local_scalar_dense"),
        (lambda loss: loss[None][loss[None] > 0], "index"),
        (lambda loss: loss.register_hook(lambda grad: grad * float(grad)), "_local_scalar_dense"),
        (lambda loss: loss.detach().cpu(), "cpu"),
        (lambda loss: loss + torch.tensor(1.0, device=loss.device), "tensor"),
    ],
    ids=["item", "tolist", "if", "boolean index", "in the backward pass", "copy", "number to the device"],
)
def test_a_wait_would_be_seen(tmp_path, monkeypatch, wait, name):
    """Negative control: one more line in the loss."""
    trainer, rollout = learning(tmp_path, model=make_model(attn_implementation="eager"))
    compute_loss = trainer.compute_loss

    def waiting(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        wait(loss)
        return loss

    monkeypatch.setattr(trainer, "compute_loss", waiting)
    assert name in [operator for operator, _ in waits(trainer, rollout)[0]]


def gradients(trainer, parts, tokens):
    trainer.model.zero_grad()
    for part in parts:
        trainer.compute_loss(trainer.model, part, num_items_in_batch=tokens).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "config", [{}, {"kl_penalty_in": "loss", "kl_estimator": "k3", "entropy_coef": 0.1}], ids=["", "k3"]
)
def test_a_row_leaves_no_trace_in_its_neighbors(tmp_path, implementation, config):
    """The gradient of a micro-batch is the sum over its rows alone; a short row's prompt, which stands in the columns
    of longer responses, is so unlikely at this temperature that its ratio to anything overflows."""
    model = make_model(attn_implementation=implementation)
    trainer, rollout = learning(tmp_path, {"temperature": 0.02, "learning_rate": 1e-6, **config}, model=model)
    batch, tokens = rollout.micro_batch(torch.arange(8)), rollout.action_mask.sum()
    assert not batch["action_mask"].all() and not batch["attention_mask"].all()
    output = trainer.model(batch["input_ids"], batch["attention_mask"], batch["action_mask"].shape[1], 0.02)
    assert output.logprobs[~batch["action_mask"]].min() < -100
    together = gradients(trainer, [batch], tokens)
    alone = gradients(trainer, [rollout.micro_batch(torch.tensor([row])) for row in range(8)], tokens)
    assert alone.abs().max() > 1e-3
    assert (together - alone).abs().max() <= 1e-4 * alone.abs().max()
    assert all(torch.isfinite(pair).all() for pair in trainer._progress.meter._sums.values())

"""Layers that no adapter reaches run once per rollout, and training ends where it would have ended without that."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from conftest import lora, make_model, make_prompts, make_trainer
from datasets import Dataset
from peft import get_peft_model
from test_architectures import FAMILIES, TARGETS, build, left_padded
from test_modeling import moved, reward_folder
from test_resume import make_value_model
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.pytorch_utils import Conv1D

from ppo_plus import PPOCallback
from ppo_plus.kernels.frozen_layers import decoder_layers, relative_error
from ppo_plus.kernels.packing import PackedMask
from ppo_plus.models.actor_critic import ActorCritic
from ppo_plus.models.value_head import ValueHead

LAYERS = 4
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# One shape for every pass: prompts of one length, answers that nothing ends, rows scored as they are learned from.
ONE_SHAPE = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "local_rollout_forward_batch_size": 4,
    "missing_eos_penalty": None,
}  # fmt: skip


def top(*layers, **overrides):
    """LoRA on these layers alone."""
    return lora(**{"target_modules": PROJECTIONS, "layers_to_transform": list(layers), **overrides})


def deep_model(**overrides):
    return make_model(num_hidden_layers=LAYERS, **overrides)


def endless(**overrides):
    """A model that never ends an answer."""
    model = deep_model(**overrides)
    with torch.no_grad():
        model.lm_head.weight[2] = 0
    model.lm_head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.tensor(2), -1e4))
    return model


def trained(folder, cached, *, config=None, callbacks=(), **arguments):
    """A trainer that has trained, and all weights that it trained."""
    trainer = make_trainer(
        folder,
        config={"cache_frozen_layers": cached, "logging_steps": 1, **(config or {})},
        **{"model": deep_model(), "peft_config": top(2, 3), "callbacks": list(callbacks), **arguments},
    )
    trainer.train()
    return trainer, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def gap(a, b):
    assert a.keys() == b.keys() and a
    return max((a[name] - b[name]).abs().max().item() for name in a)


def distance(model, weights):
    """How far training moved what it trained."""
    return max((weights[n] - p).abs().max().item() for n, p in model.named_parameters() if n in weights)


def losses(trainer):
    names = ("loss", "ppo/policy_loss", "ppo/value_loss", "grad_norm", "critic/grad_norm", "kl", "entropy")
    return [{n: row[n] for n in names if n in row} for row in trainer.state.log_history if "loss" in row]


# --- the same training ---


@pytest.mark.parametrize("critic", ["shared", "detached", "adapter"])
def test_where_all_passes_have_one_shape_training_is_the_same_to_the_last_bit(tmp_path, critic):
    """Kernels round differently for other shapes; here they have no occasion to."""
    config = {**ONE_SHAPE, "critic": critic, "num_ppo_epochs": 3, "max_steps": 12}
    data = Dataset.from_dict({"prompt": [f"the film {a}{b}" for a in "abcd" for b in "abcd"]})
    found = [
        trained(tmp_path / str(cached), cached, config=config, train_dataset=data, model=endless())
        for cached in (True, False)
    ]
    (cached, weights), (plain, expected) = found
    assert (cached.model.num_cached_layers, plain.model.num_cached_layers) == (2, 0)
    assert losses(cached) == losses(plain) and len(losses(plain)) == 12
    assert gap(weights, expected) == 0.0


SETTINGS = {
    "shared": {},
    "detached": {"critic": "detached"},
    "its own adapter": {"critic": "adapter"},
    "KL in the loss": {"kl_penalty_in": "loss", "kl_estimator": "k3", "kl_coef": 0.5},
    "entropy bonus": {"entropy_coef": 0.1},
    "critic warm-up": {"critic_warmup_steps": 2},
    "activation checkpointing": {"activation_checkpointing": True},
    "checkpointing, own adapter": {"activation_checkpointing": True, "critic": "adapter"},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "3 rows scored at a time": {"local_rollout_forward_batch_size": 3},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_with_padding_training_is_the_same_up_to_rounding(tmp_path, setting):
    config = {"max_steps": 8, **SETTINGS[setting]}
    cached, weights = trained(tmp_path / "cached", True, config=config)
    plain, expected = trained(tmp_path / "plain", False, config=config)
    assert (cached.model.num_cached_layers, plain.model.num_cached_layers) == (2, 0)
    assert gap(weights, expected) < 1e-5
    start = make_trainer(tmp_path, model=deep_model(), peft_config=top(2, 3), config=SETTINGS[setting])
    assert distance(start.model, expected) > 1e-3


def test_states_of_other_rows_would_be_noticed(tmp_path):
    """Negative control of the above."""

    class Mix(PPOCallback):
        def on_rollout_end(self, args, state, control, rollout, **kwargs):
            rollout.frozen_hidden_states.copy_(rollout.frozen_hidden_states.roll(1, 0))

    config = {"max_steps": 4}
    _, weights = trained(tmp_path / "mixed", True, config=config, callbacks=[Mix()])
    assert gap(weights, trained(tmp_path / "plain", False, config=config)[1]) > 1e-4


def test_a_value_model_runs_by_itself(tmp_path):
    value_model = make_value_model()
    config = {"max_steps": 4, "critic": "separate"}
    found = [
        trained(tmp_path / str(c), c, config=config, value_model=copy.deepcopy(value_model)) for c in (True, False)
    ]
    assert found[0][0].model.num_cached_layers == 2
    assert gap(found[0][1], found[1][1]) < 1e-5


# --- the work that is saved ---


class Counted(LlamaDecoderLayer):
    """Counts the rows of each pass of more than one position: all but the steps of decoding."""

    def forward(self, hidden_states, *args, **kwargs):
        mask = kwargs["attention_mask"]
        rows = (
            sum(len(part.mask) for part in mask.buckets.parts) if isinstance(mask, PackedMask) else len(hidden_states)
        )
        self.rows = getattr(self, "rows", 0) + rows * (hidden_states.shape[1] > 1)
        return super().forward(hidden_states, *args, **kwargs)


@pytest.mark.parametrize(("cached", "below"), [(True, 2), (False, 5)])
def test_lower_layers_run_once_per_response_and_rollout(tmp_path, cached, below):
    """Each of 8 responses: its prompt in generation, 2 PPO epochs, actor, reference; or all but the prompt once."""
    model = deep_model()
    trainer = make_trainer(
        tmp_path, model=model, peft_config=top(2, 3), config={"cache_frozen_layers": cached, "max_steps": 4}
    )
    for layer in model.model.layers:
        layer.__class__ = Counted
    trainer.train()
    assert [layer.rows for layer in model.model.layers] == [8 * below, 8 * below, 8 * 5, 8 * 5]


# --- where adapters begin ---


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (top(2, 3), 2),
        (top(3), 3),
        (top(1, 3), 1),
        (top(0), 0),
        (lora(), 0),
        (lora(target_modules=["lm_head"]), 3),
        (lora(target_modules=["lm_head", "embed_tokens"]), 0),
        (top(3, modules_to_save=["embed_tokens"]), 0),
        (top(3, modules_to_save=["lm_head"]), 3),
    ],
)
def test_layers_are_shared_up_to_the_lowest_that_is_trained(options, count):
    policy = get_peft_model(deep_model(), options)
    actor = ActorCritic(policy, ValueHead(32))
    actor.enable_frozen_layer_cache()
    assert actor.num_cached_layers == count


def test_what_the_user_trains_besides_counts_too():
    policy = get_peft_model(deep_model(), top(3))
    decoder_layers(policy.get_base_model().model)[1].input_layernorm.weight.requires_grad_(True)
    actor = ActorCritic(policy, ValueHead(32))
    actor.enable_frozen_layer_cache()
    assert actor.num_cached_layers == 1


def test_a_model_trained_in_full_has_none(tmp_path):
    assert make_trainer(tmp_path, peft_config=None).model.num_cached_layers == 0


def test_dropout_in_the_base_model_keeps_all_layers_running(tmp_path):
    config = {"disable_dropout": False}
    trainer = make_trainer(tmp_path, model=deep_model(), peft_config=top(3), config=config)
    assert trainer.model.num_cached_layers == 0


def test_a_critic_whose_adapter_reaches_further_down_runs_all_layers(tmp_path):
    policy = get_peft_model(deep_model(), top(2, 3))
    policy.add_adapter("critic", lora())
    actor = ActorCritic(policy, ValueHead(32), critic="adapter").eval()
    nn.init.normal_(actor.value_head.layers[0].weight)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    actor.enable_frozen_layer_cache()
    assert actor.num_cached_layers == 2
    ids, mask = left_padded()
    with torch.no_grad():
        states = actor.frozen_hidden_states(ids, mask)
        found, expected = actor(ids, mask, 3, frozen_hidden_states=states), actor(ids, mask, 3)
        other = actor(ids, mask, 3, frozen_hidden_states=states.roll(1, 0))
    assert torch.equal(found.values, expected.values) and torch.equal(found.logprobs, expected.logprobs)
    assert torch.equal(other.values, expected.values) and not torch.equal(other.logprobs, expected.logprobs)


def test_a_reward_adapter_further_down_changes_nothing(tmp_path):
    reward_folder(tmp_path)
    actor = ActorCritic(moved(get_peft_model(make_model(), top(1))), ValueHead(32)).eval()
    actor.enable_frozen_layer_cache()
    ids, mask = left_padded()
    with torch.no_grad():
        states = actor.frozen_hidden_states(ids, mask)
        actor.load_reward_adapter("judge", tmp_path)
        assert torch.equal(actor.frozen_hidden_states(ids, mask), states)
        assert torch.equal(actor(ids, mask, 3, frozen_hidden_states=states).logprobs, actor(ids, mask, 3).logprobs)


# --- architectures ---


HAND_ON_MORE = ("Gemma 3n", "Gemma 4")  # than hidden states: inputs of each layer, keys of other layers


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_on_to_the_same_numbers(family):
    model = build(family)
    linear = [n.split(".")[-1] for n, m in model.base_model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    policy = get_peft_model(model, top(1, target_modules=sorted(set(TARGETS.get(family, linear)))))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    actor = ActorCritic(policy, ValueHead(policy.config.get_text_config().hidden_size)).eval()
    actor.enable_frozen_layer_cache()
    assert actor.num_cached_layers == (family not in HAND_ON_MORE)
    if family in HAND_ON_MORE:
        return
    ids, mask = left_padded()
    with torch.no_grad():
        states, scored = actor.frozen_hidden_states(ids, mask), {}
        for role in ("actor", "reference"):
            with actor.role(role):
                scored[role] = actor(ids, mask, 3).logprobs
                assert torch.equal(actor(ids, mask, 3, frozen_hidden_states=states).logprobs, scored[role])
                assert (
                    actor(ids, mask, 3, frozen_hidden_states=states.roll(1, 1)).logprobs - scored[role]
                ).abs().max() > 1e-4
    assert (scored["actor"] - scored["reference"]).abs().max() > 1e-4


class Leaky(LlamaDecoderLayer):
    """Leaves something for the layer above, beside its hidden states."""

    left: list = []

    def forward(self, hidden_states, *args, **kwargs):
        output = super().forward(hidden_states + sum(self.left[-1:]), *args, **kwargs)
        self.left.append(output / 2)  # by token: rows of a batch must not reach each other
        return output


def test_layers_that_hand_on_more_than_hidden_states_all_run(tmp_path):
    model = deep_model()
    for layer in model.model.layers:
        layer.__class__ = Leaky
    model.model.register_forward_pre_hook(lambda module, args: Leaky.left.clear())
    with pytest.warns(UserWarning, match=r"^All layers of Llama\w+ run in every pass: .* differs by \d\.\de"):
        trainer = make_trainer(tmp_path, model=model, peft_config=top(2, 3))
    assert isinstance(model, LlamaForCausalLM) and trainer.model.num_cached_layers == 0


def test_states_are_apart_by_more_than_rounding():
    mask, states = torch.tensor([[0, 1]]), torch.tensor([[[9.0], [2.0]]])
    for dtype, within, beyond in ((torch.float32, 1e-5, 1e-4), (torch.bfloat16, 2e-2, 0.125)):
        expected = states.to(dtype)
        assert relative_error(expected * 1.0, expected, mask) == 0
        assert relative_error(expected - torch.tensor([[[1.0], [within]]]), expected, mask) == 0  # the first is padding
        off = relative_error(expected - torch.tensor([[[0.0], [beyond]]]), expected, mask)
        assert off == pytest.approx(beyond / 2, rel=1e-2)
        assert math.isnan(relative_error(expected * math.nan, expected, mask)), "not a number is not the same number"


def test_layers_are_themselves_again_after_each_pass():
    policy = get_peft_model(deep_model(), top(2, 3))
    actor = ActorCritic(policy, ValueHead(32)).eval()
    own = [dict(vars(layer)) for layer in decoder_layers(actor.language_model.base_model)]
    actor.enable_frozen_layer_cache()
    ids, mask = left_padded()
    states = actor.frozen_hidden_states(ids, mask)
    with pytest.raises(RuntimeError):
        actor(ids, mask, 3, frozen_hidden_states=states[:, :-1])
    for layer, before in zip(decoder_layers(actor.language_model.base_model), own, strict=True):
        assert "forward" not in vars(layer) and vars(layer).keys() == before.keys()
        assert layer.training == before["training"]


# --- rollouts and checkpoints ---


def test_a_resumed_run_computes_them_again_to_the_same_bits(tmp_path):
    config = {"save_strategy": "steps", "save_steps": 1, "max_steps": 8, "local_rollout_forward_batch_size": 3}
    _, expected = trained(tmp_path, True, config=config)
    for step in (1, 3, 6):
        trainer = make_trainer(
            tmp_path / f"from {step}", model=deep_model(), peft_config=top(2, 3), config={"max_steps": 8, **config}
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        found = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert gap(found, expected) == 0.0


def test_states_move_with_their_tokens(tmp_path):
    class Keep(PPOCallback):
        def on_rollout_end(self, args, state, control, rollout, **kwargs):
            self.rollout = rollout

    keep = Keep()
    trainer, _ = trained(tmp_path, True, config={"max_steps": 1}, callbacks=[keep], train_dataset=make_prompts(16))
    rollout = keep.rollout
    batch = rollout.micro_batch(torch.tensor([5, 0, 3]))
    assert batch["frozen_hidden_states"].shape == (*batch["input_ids"][:, 1:].shape, 32)
    with torch.no_grad():
        again = trainer.model.eval().frozen_hidden_states(batch["input_ids"], batch["attention_mask"])
    assert trainer.generate_completions(trainer.train_dataset).frozen_hidden_states is None  # there may be many more
    real = batch["attention_mask"][:, :-1].bool()
    assert (again - batch["frozen_hidden_states"])[real].abs().max() < 1e-5
    plain = dataclasses.replace(rollout, frozen_hidden_states=None)
    assert "frozen_hidden_states" not in plain.micro_batch(torch.tensor([1]))

"""Four critics: a head on the actor, the same without gradient, an adapter of its own, a model of its own."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import classifier, lora, make_config, make_model, make_tokenizer, make_trainer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from ppo_plus import PPOCallback
from ppo_plus.models.adapters import use_adapter
from ppo_plus.models.critic import CriticSpec
from ppo_plus.models.loading import build_actor_critic, load_policy

IDS = torch.arange(4, 34).view(3, 10)
MASK = torch.ones_like(IDS)


def prefix_scores(model, ids, response_length):
    """What a sequence classifier says after each prefix that ends before a response token, one forward pass each."""
    start = ids.shape[1] - response_length
    with torch.no_grad():
        rows = [[model(input_ids=row[None, :end]).logits[0, 0] for end in range(start, ids.shape[1])] for row in ids]
    return torch.tensor(rows)


def critic_of(base, reward_adapter, kind):
    """Keyword arguments of PPOTrainer for each critic."""
    return {
        "shared": {},
        "detached": {"config": {"critic": "detached"}},
        "adapter": {"config": {"critic": "adapter"}},
        "adapter from reward": {"config": {"critic": "adapter"}, "value_model": reward_adapter},
        "separate": {"value_model": classifier(base) if base else None},
    }[kind]


KINDS = ["shared", "detached", "adapter", "adapter from reward", "separate"]


def trainer_with(tmp_path, base, reward_adapter, kind, **overrides):
    options = critic_of(base, reward_adapter, kind)
    config = {**options.pop("config", {}), **overrides.pop("config", {})}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return make_trainer(tmp_path, model=overrides.pop("model", model), config=config, **options, **overrides)


def snapshot(parameters):
    return [p.detach().clone() for p in parameters]


def moved(before, after):
    return [not torch.equal(b, a) for b, a in zip(before, after, strict=True)]


# --- where it starts ---


def test_an_adapter_critic_starts_as_the_reward_model_it_comes_from(tmp_path, base, reward_adapter):
    alone = PeftModel.from_pretrained(classifier(base), reward_adapter).eval()
    trainer = trainer_with(tmp_path, base, reward_adapter, "adapter", reward_funcs=str(reward_adapter))
    expected = prefix_scores(alone, IDS, 4)
    with torch.no_grad():
        found = trainer.model.eval()(IDS, MASK, 4)
    assert torch.allclose(found.values, expected, rtol=1e-4, atol=1e-5) and expected.std() > 0.1
    # The reward adapter is mounted as well, and is not the critic's.
    names = set(trainer.model.policy.peft_config)
    assert names == {"default", "critic", reward_adapter.name}


def test_a_reward_adapter_as_value_model_is_where_the_critic_starts_whatever_the_rewards_weigh(
    tmp_path, base, reward_adapter
):
    alone = PeftModel.from_pretrained(classifier(base), reward_adapter).eval()
    trainer = trainer_with(
        tmp_path, base, reward_adapter, "adapter from reward", config={"critic": "adapter", "reward_weights": [3.0]}
    )
    with torch.no_grad():
        found = trainer.model.eval()(IDS, MASK, 4)
    assert torch.allclose(found.values, prefix_scores(alone, IDS, 4), rtol=1e-4, atol=1e-5)
    assert set(trainer.model.policy.peft_config) == {"default", "critic"}


def test_the_weight_of_the_reward_scales_the_critic(tmp_path, base, reward_adapter):
    values = []
    for weight in (1.0, 3.0):
        trainer = trainer_with(
            tmp_path, base, reward_adapter, "adapter", reward_funcs=[lambda **kw: [0.0] * 8, str(reward_adapter)],
            config={"reward_weights": [0.5, weight]},
        )  # fmt: skip
        with torch.no_grad():
            values.append(trainer.model.eval()(IDS, MASK, 4).values)
    assert torch.allclose(values[1], 3 * values[0], rtol=1e-5) and values[0].std() > 0.1


def test_without_a_reward_adapter_it_starts_at_zero_on_the_bare_base(tmp_path, base, reward_adapter):
    trainer = trainer_with(tmp_path, base, reward_adapter, "adapter")
    model = trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(model(IDS, MASK, 4).values, torch.zeros(3, 4))
        torch.nn.init.normal_(model.value_head.layers[0].weight)
        hidden = make_model().eval().model(IDS).last_hidden_state[:, 5:9]
        assert torch.allclose(model(IDS, MASK, 4).values, model.value_head(hidden), atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_value_model_is_named(tmp_path, base, frozen):
    value_model = classifier(base).requires_grad_(not frozen)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(tmp_path, value_model=value_model)
    assert any("only the value head is trained" in str(w.message) for w in caught) == frozen
    assert bool(trainer.model.critic_parameters()) == (not frozen)


def test_a_value_model_starts_with_its_own_score_head(tmp_path, base, reward_adapter):
    value_model = classifier(base, seed=5)
    torch.nn.init.normal_(value_model.score.weight)
    expected = prefix_scores(copy.deepcopy(value_model).eval(), IDS, 4)
    trainer = trainer_with(tmp_path, base, reward_adapter, "shared", value_model=value_model)
    assert trainer.args.critic == "separate" and trainer.args.resolved_vf_coef == 1.0
    with torch.no_grad():
        assert torch.allclose(trainer.model.eval()(IDS, MASK, 4).values, expected, rtol=1e-4, atol=1e-5)


def test_a_value_model_is_loaded_by_name(tmp_path, base, reward_adapter):
    trainer = trainer_with(tmp_path, base, reward_adapter, "shared", value_model=str(base))
    assert isinstance(trainer.model.value_model, LlamaForSequenceClassification)
    assert trainer.model.value_model.dtype == torch.float32
    head = trainer.model.value_head.layers[0].weight
    assert torch.equal(head, torch.zeros_like(head))  # the base is a language model, and has no score head
    scored = classifier(base, seed=5)
    scored.save_pretrained(tmp_path / "scored")
    head = trainer_with(tmp_path, base, reward_adapter, "shared", value_model=tmp_path / "scored").model.value_head
    assert torch.equal(head.layers[0].weight, scored.score.weight) and scored.score.weight.abs().min() > 0


def saved_classifier(base, folder, labels):
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_model_without_a_trained_head_scores_nothing(tmp_path, base):
    """Its head would be drawn at random, and transformers no more than mentions it."""
    with pytest.raises(ValueError, match="tiny-llama' is .* trained reward model: its files lack score.weight"):
        make_trainer(tmp_path, reward_funcs=str(base))
    make_trainer(tmp_path, reward_funcs=saved_classifier(base, tmp_path / "one", 1))


def test_a_model_of_classes_is_neither_a_reward_nor_a_critic(tmp_path, base):
    two = saved_classifier(base, tmp_path / "two", 2)
    for role in ({"reward_funcs": two}, {"value_model": two}):
        with pytest.raises(ValueError, match="two' was trained with more than one label"):
            make_trainer(tmp_path, **role)


# --- what learns ---


@pytest.mark.parametrize("kind", KINDS)
def test_actor_and_critic_learn_and_the_base_and_the_reward_stay(tmp_path, base, reward_adapter, kind):
    trainer = trainer_with(
        tmp_path, base, reward_adapter, kind, reward_funcs=[str(reward_adapter), lambda **kw: [0.5] * 8]
    )
    model = trainer.model
    actor, critic = model.actor_parameters(), model.critic_parameters()
    assert bool(critic) == (kind not in ("shared", "detached"))
    trained = {id(p) for p in [*actor, *critic, *model.value_head.parameters()]}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in trained}
    assert any(reward_adapter.name in name for name in frozen) and any("embed_tokens" in name for name in frozen)
    before = snapshot(actor), snapshot(critic), snapshot(model.value_head.parameters())
    texts = IDS[:, 3:]
    scores = model.reward_scores(reward_adapter.name, trainer.collector.rewards.rewards[0].head, texts, MASK[:, 3:], 0)
    trainer.train()
    for parts, now in zip(before, (actor, critic, model.value_head.parameters()), strict=True):
        assert all(moved(parts, now))
    assert all(torch.equal(frozen[n], p) for n, p in model.named_parameters() if n in frozen)
    again = model.reward_scores(reward_adapter.name, trainer.collector.rewards.rewards[0].head, texts, MASK[:, 3:], 0)
    assert torch.equal(scores, again)


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_warm_up_only_the_critic_learns(tmp_path, base, reward_adapter, kind):
    trainer = trainer_with(tmp_path, base, reward_adapter, kind, config={"critic_warmup_steps": 3, "max_steps": 5})
    model, seen = trainer.model, []
    actor, head = model.actor_parameters(), list(model.value_head.parameters())
    start = snapshot(actor)

    class Watch(PPOCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((any(moved(start, actor)), snapshot(head)))

    trainer.add_callback(Watch())
    trainer.train()
    assert [actor_moved for actor_moved, _ in seen] == [False, False, False, True, True]
    assert all(any(moved(seen[i][1], seen[i + 1][1])) for i in range(4))
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert ["ppo/policy_loss" in row for row in logs] == [False, False, False, True, True]
    assert all("ppo/value_loss" in row for row in logs)


def test_each_part_has_its_own_rate(tmp_path, base, reward_adapter):
    rates = {"learning_rate": 1e-3, "value_head_learning_rate": 2e-3, "critic_backbone_learning_rate": 3e-3}
    for kind in ("adapter", "separate"):
        trainer = trainer_with(tmp_path, base, reward_adapter, kind, config={**rates, "weight_decay": 0.1})
        model, groups = trainer.model, trainer.create_optimizer().param_groups
        found = {id(p): group["lr"] for group in groups for p in group["params"]}
        assert len(found) == sum(p.requires_grad for p in model.parameters())
        assert {found[id(p)] for p in model.actor_parameters()} == {1e-3}
        assert {found[id(p)] for p in model.value_head.parameters()} == {2e-3}
        assert {found[id(p)] for p in model.critic_parameters()} == {3e-3}


@pytest.mark.parametrize("kind", ["shared", "adapter", "separate"])
def test_a_large_gradient_of_the_critic_does_not_shrink_the_actors(tmp_path, base, reward_adapter, kind):
    """The actor's first update under clipping is the same whatever the critic's gradient is."""
    ends = []
    for vf_coef in (1e-6, 1e3):
        # With a shared critic the actor's own gradient holds the critic's: detach it by a head that starts at zero.
        trainer = trainer_with(
            tmp_path, base, reward_adapter, kind,
            config={"vf_coef": vf_coef, "max_grad_norm": 1e-3, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0},
        )  # fmt: skip
        before = snapshot(trainer.model.actor_parameters())
        trainer.train()
        ends.append([a.detach() - b for a, b in zip(trainer.model.actor_parameters(), before, strict=True)])
    size = torch.stack([d.norm() for d in ends[0]]).norm()
    gap = torch.stack([(a - b).norm() for a, b in zip(*ends, strict=True)]).norm()
    assert 0.5e-3 < size < 1.1e-3 and gap < 1e-3 * size


# --- activation checkpointing ---


def gradients(base, reward_adapter, checkpointing, spoil=False):
    torch.manual_seed(0)
    policy = load_policy(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), peft_config=lora())
    source = CriticSpec("adapter", adapter=Path(reward_adapter))
    model = build_actor_critic(policy, critic=source).train()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    if spoil:
        model.critic = "shared"  # so that the adapter of the forward pass is forgotten
    if checkpointing:
        model.activation_checkpointing_enable()
    model.critic = "adapter"
    out = model(IDS, MASK, 4)
    (out.logprobs.sum() + out.values.square().sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_what_is_recomputed_is_computed_by_the_adapter_of_the_forward_pass(base, reward_adapter):
    expected, found = (gradients(base, reward_adapter, on) for on in (False, True))
    assert expected.keys() == found.keys() and any(".critic." in name for name in found)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5, rtol=1e-4), name


def test_with_another_adapter_the_gradients_would_be_lost(base, reward_adapter):
    """Negative control: without the context of the forward pass torch sees another graph, or gradients differ."""
    expected = gradients(base, reward_adapter, False)
    try:
        found = gradients(base, reward_adapter, True, spoil=True)
    except RuntimeError:
        return
    assert any(n not in found or not torch.allclose(found[n], g, atol=1e-4) for n, g in expected.items())


# --- on disk ---


def test_an_adapter_critic_is_saved_beside_the_actor_and_loads(tmp_path, base, reward_adapter):
    trainer = trainer_with(tmp_path, base, reward_adapter, "adapter from reward")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "critic" / "adapter_model.safetensors")
    weights = {n: p for n, p in trainer.model.named_parameters() if ".critic." in n}
    assert len(saved) == len(weights) == len(trainer.model.critic_parameters())
    for name, tensor in saved.items():
        inside = "policy." + name.replace(".weight", ".critic.weight")
        assert torch.equal(tensor, weights[inside])
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "saved"
    )
    with torch.no_grad():
        assert torch.allclose(plain(IDS).logits, trainer.model.eval().policy(IDS).logits, atol=1e-5)
    other = trainer_with(tmp_path / "other", base, reward_adapter, "adapter from reward")
    with torch.no_grad():
        expected = trainer.model(IDS, MASK, 4).values
        assert not torch.allclose(other.model.eval()(IDS, MASK, 4).values, expected, atol=1e-3)
        other.model.load_weights(tmp_path / "saved")
        assert torch.equal(other.model(IDS, MASK, 4).values, expected)


def test_a_value_model_is_saved_as_a_plain_classifier_and_loads(tmp_path, base, reward_adapter):
    trainer = trainer_with(tmp_path, base, reward_adapter, "separate")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved" / "value_model", dtype=torch.float32)
    assert torch.equal(
        plain.model.layers[0].mlp.up_proj.weight, trainer.model.value_model.model.layers[0].mlp.up_proj.weight
    )
    other = trainer_with(tmp_path / "other", base, reward_adapter, "separate")
    other.model.load_weights(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(other.model.eval()(IDS, MASK, 4).values, trainer.model.eval()(IDS, MASK, 4).values)


@pytest.mark.parametrize("kind", ["adapter", "separate"])
def test_training_resumes_to_the_same_bits(tmp_path, base, reward_adapter, kind):
    def run(folder, resume=None):
        config = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "critic_warmup_steps": 4}
        trainer = trainer_with(folder, base, reward_adapter, kind, config=config)
        trainer.train(resume_from_checkpoint=resume)
        return [p.detach() for p in trainer.model.parameters() if p.requires_grad]

    whole = run(tmp_path / "whole")
    for step in (3, 6):
        resumed = run(tmp_path / f"from {step}", str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert not any(moved(whole, resumed))


def test_the_folder_of_the_critic_is_part_of_what_makes_a_checkpoint_whole(tmp_path, base, reward_adapter):
    from ppo_plus.training.checkpoint import integrity_error

    config = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = trainer_with(tmp_path, base, reward_adapter, "adapter", config=config)
    trainer.train()
    assert integrity_error(tmp_path / "checkpoint-2") is None
    file = tmp_path / "checkpoint-2" / "critic" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "critic/adapter_model.safetensors was changed or truncated" in integrity_error(tmp_path / "checkpoint-2")


# --- what is refused ---


def refused(message, **case):
    return message, case


REFUSED = {
    "adapter critic without peft": refused("pass peft_config, or take another", kind="adapter", peft_config=None),
    "separate critic without a model": refused("pass value_model", kind="shared", config={"critic": "separate"}),
    "an adapter as value_model": refused(
        "set critic='adapter'", kind="adapter from reward", config={"critic": "shared"}
    ),
    "a value_model and another critic": refused("exclude each other", kind="separate", config={"critic": "detached"}),
    "a value_model of the wrong kind": refused(
        "value_model must be a sequence classifier", kind="shared", value_model=3
    ),
    "negative warm-up": refused("critic_warmup_steps must be", kind="shared", config={"critic_warmup_steps": -1}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_critic_is_refused(tmp_path, base, reward_adapter, case):
    message, options = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=message):
        trainer_with(tmp_path / "out", base, reward_adapter, **options)
    assert not (tmp_path / "out").exists()


def test_a_value_model_that_shares_weights_or_lacks_tokens_or_has_two_labels_is_refused(tmp_path, base, reward_adapter):
    model = make_model()
    model.config.num_labels = 1
    shared = LlamaForSequenceClassification(model.config)
    shared.model = model.model
    sizes = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
             "num_attention_heads": 4, "pad_token_id": 0}  # fmt: skip
    small = LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1))
    two = LlamaForSequenceClassification(LlamaConfig(**{**sizes, "vocab_size": 42}, num_labels=2))
    for value_model, message in (
        (shared, "model and value_model share"),
        (small, "vocabulary of 8"),
        (two, "num_labels=2"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path / "out", model=model, value_model=value_model)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("role", ["reward", "critic"])
def test_adapters_of_another_base_or_kind_are_refused_before_anything_is_written(tmp_path, base, reward_adapter, role):
    def attempt(folder, message):
        options = {"reward_funcs": folder} if role == "reward" else {"value_model": folder}
        config = {} if role == "reward" else {"critic": "adapter"}
        with pytest.raises(ValueError, match=message):
            trainer_with(tmp_path / "out", base, reward_adapter, "shared", config=config, **options)
        assert not (tmp_path / "out").exists()

    def adapter(name, model, **options):
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["score"], **options)
        get_peft_model(model, config).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    other = classifier(base)
    other.config._name_or_path = other.name_or_path = "another/base"
    attempt(adapter("other base", other), "trained on 'another/base',( but)? the actor's base is '.*tiny-llama'")
    two = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, dtype=torch.float32)
    attempt(adapter("two labels", two), r"score head has shape \[\(2, 32\)\].*num_labels=1")
    empty = adapter("no weights", classifier(base))
    (Path(empty) / "adapter_model.safetensors").unlink()
    attempt(empty, "no adapter_model.safetensors")


def test_an_adapter_by_the_name_of_nobody_is_refused():
    policy = load_policy(make_model(), peft_config=lora())
    with pytest.raises(ValueError, match="no adapter 'nobody' here, only"), use_adapter(policy, "nobody"):
        pass


# --- references ---


@pytest.mark.parametrize("kind", ["adapter off", "frozen copy of an adapter", "ref_model", "frozen copy of a model"])
def test_a_reference_says_at_first_what_the_policy_says_and_never_moves(tmp_path, base, reward_adapter, kind):
    model, options = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), {}
    if kind == "frozen copy of an adapter":
        model, options = get_peft_model(model, lora()), {"peft_config": None}
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    elif kind == "ref_model":
        options = {"ref_model": AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)}
    elif kind == "frozen copy of a model":
        options = {"peft_config": None}
    trainer = make_trainer(tmp_path, model=model, **options)
    actor = trainer.model

    def look():
        actor.eval()
        with torch.no_grad():
            own = actor(IDS, MASK, 4).logprobs
            with actor.role("reference"):
                return own, actor(IDS, MASK, 4).logprobs

    own, reference = look()
    assert torch.equal(own, reference)
    trainer.train()
    own, after = look()
    assert torch.equal(after, reference) and (own - after).abs().max() > 1e-3


def test_make_config_is_untouched(tmp_path):
    """The cases above change `args.critic` of their own configuration only."""
    assert make_config(tmp_path).critic == "shared" and replace(CriticSpec()).kind == "shared"

"""Memory: the planner says what a run takes, and logits never take more than a chunk."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from conftest import PeakMemory, lora, make_model, make_trainer
from peft import get_peft_model
from test_architectures import build
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    T5Config,
)

from ppo_plus.memory import DryRun, MemoryTracker, PlannerConfig, plan, planning
from ppo_plus.memory.__main__ import main
from ppo_plus.memory.dry_run import causal
from ppo_plus.memory.layers import ExtrapolatedEstimator, predict, reduced_depth_configs
from ppo_plus.memory.planning import GIB, table
from ppo_plus.models import actor_critic as modeling
from ppo_plus.models import logprobs as logits_module
from ppo_plus.models.critic import CriticSpec
from ppo_plus.models.loading import build_actor_critic
from ppo_plus.rollout.collector import ForwardBatch

SIZES = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, head_dim=16, sliding_window=16),
    "gpt2": GPT2Config(vocab_size=500, n_embd=64, n_layer=3, n_head=4, n_positions=256),
}
PROMPT, RESPONSE = 24, 40


def setup(**overrides):
    return PlannerConfig(**{"prompt_length": PROMPT, "response_length": RESPONSE, "quantization": "fp32", "lora_r": 4,
                    "reward": "none", **overrides})  # fmt: skip


@functools.cache
def dry_run(name, **overrides):
    """What a configuration's phases take; one for all tests, because no phase leaves anything behind."""
    return DryRun(CONFIGS[name], setup(**overrides))


def real_actor(config, checkpointing=False, dtype=torch.float32, base=None, critic="shared"):
    torch.manual_seed(0)
    base = base or AutoModelForCausalLM.from_config(config, dtype=dtype)
    actor = build_actor_critic(get_peft_model(base, lora()), critic=CriticSpec(critic))
    actor.runner.sdpa_models = []  # the planner plans for a card
    if checkpointing:
        actor.activation_checkpointing_enable()
    return actor


def padded(rows, vocabulary=500):
    ids = torch.randint(3, vocabulary, (rows, PROMPT + RESPONSE), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, :3] = 0  # as almost every batch is
    return ids, mask


def measured(actor, phase, rows, autocast=False):
    """Bytes of the highest moment of a real pass, above what the model, its gradients and Adam's moments hold."""
    actor.train(phase == "learn")
    for parameter in actor.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    state = [*actor.parameters(), *actor.buffers()]
    known = [*state, *(p.grad for p in state if p.grad is not None)]
    ids, mask = padded(rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), PeakMemory(known) as found:
        if phase == "learn":
            output = actor(ids, mask, RESPONSE)
            (output.logprobs.sum() + output.values.sum()).backward()
        else:
            with torch.no_grad():
                actor(ids, mask, RESPONSE, with_entropy=True)
    return found.peak


def working(phase):
    return sum(phase.parts[part] for part in ("activations", "logits", "kv_cache"))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_predicted_activations_are_within_3_percent_of_a_real_pass(name, checkpointing):
    dry = dry_run(name, activation_checkpointing=checkpointing)
    actor = real_actor(CONFIGS[name], checkpointing)
    for phase, rows in (("learn", 2), ("learn", 6), ("score", 4)):
        assert working(getattr(dry, phase)(rows)) == pytest.approx(measured(actor, phase, rows), rel=0.03)


@pytest.mark.parametrize("phase", ["learn", "score"])
def test_logits_are_planned_as_a_card_works_on_them(monkeypatch, phase):
    dry, actor = dry_run("llama", activation_checkpointing=False), real_actor(CONFIGS["llama"])
    monkeypatch.setattr(logits_module, "SLICE_ELEMENTS", 2 * actor.num_embeddings)
    sliced = measured(actor, phase, 6)  # on a CPU, two tokens at a time
    predicted = working(getattr(dry, phase)(6))
    assert 2 * actor.num_embeddings == logits_module.SLICE_ELEMENTS
    monkeypatch.undo()
    assert predicted == pytest.approx(measured(actor, phase, 6), rel=0.03)
    assert predicted > 1.05 * sliced


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_critic_with_an_adapter_of_its_own_is_a_second_pass(checkpointing):
    actor = real_actor(CONFIGS["llama"], checkpointing, critic="adapter")
    found = dry_run("llama", critic="adapter", activation_checkpointing=checkpointing).learn(3)
    assert working(found) == pytest.approx(measured(actor, "learn", 3), rel=0.03)
    assert found.parts["optimizer"] == 2 * bytes_of(actor, frozen=False)
    one_pass = dry_run("llama", activation_checkpointing=checkpointing).learn(3)
    assert working(found) > 1.1 * working(one_pass)  # checkpoints of both passes are held


def test_the_comparison_can_fail():
    checkpointed = dry_run("llama", activation_checkpointing=True).learn(4)
    assert working(checkpointed) < 0.7 * measured(real_actor(CONFIGS["llama"]), "learn", 4)
    other = dry_run("llama", response_length=2 * RESPONSE).learn(4)
    assert working(other) > 1.2 * measured(real_actor(CONFIGS["llama"]), "learn", 4)


def test_bf16_under_autocast_is_predicted_too():
    dry = dry_run("llama", quantization="bf16")
    actor = real_actor(CONFIGS["llama"], dtype=torch.bfloat16)
    assert working(dry.learn(4)) == pytest.approx(measured(actor, "learn", 4, autocast=True), rel=0.03)
    assert dry.learn(4).parts["weights"] == pytest.approx(bytes_of(actor, frozen=True), rel=0.001)


def bytes_of(actor, frozen):
    tensors = [p for p in actor.parameters() if p.requires_grad != frozen]
    return sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_stands_still_is_counted_as_it_is(name):
    actor, dry = real_actor(CONFIGS[name]), dry_run(name, activation_checkpointing=False)
    parts = dry.learn(1).parts
    trained = bytes_of(actor, frozen=False)
    assert (parts["adapters"], parts["gradients"], parts["optimizer"]) == (trained, trained, 2 * trained)
    assert parts["weights"] == pytest.approx(bytes_of(actor, frozen=True), rel=0.001)
    assert sum(dry.parameters.values()) == AutoModelForCausalLM.from_config(CONFIGS[name]).num_parameters()
    assert DryRun(CONFIGS[name], setup(reward="adapter")).learn(1).parts["adapters"] == pytest.approx(
        2 * trained, rel=0.05
    )


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_takes_what_bitsandbytes_takes(quantization, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 500}
    make_model(**sizes).save_pretrained(tmp_path)
    options = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "int8": {"load_in_8bit": True},
    }[quantization]
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**options)
    )
    tensors = list(base.parameters())
    for parameter in base.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset]
        tensors += [parameter.SCB] if getattr(parameter, "SCB", None) is not None else []
    real = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    dry = DryRun(make_model(**sizes).config, setup(quantization=quantization))
    assert dry.score(1).parts["weights"] == pytest.approx(real, rel=0.01)
    assert DryRun(make_model(**sizes).config, setup(quantization="bf16")).score(1).parts["weights"] > 1.3 * real


def test_a_quantized_base_keeps_the_activations_that_bitsandbytes_keeps(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1, "vocab_size": 500}
    make_model(**sizes).save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=nf4)
    actor, dry = real_actor(None, base=base), DryRun(base.config, setup(quantization="nf4"))
    assert working(dry.learn(1)) == pytest.approx(measured(actor, "learn", 1, autocast=True), rel=0.01)


@pytest.mark.parametrize(
    ("config", "bytes_per_row"),
    [
        # layers x keys and values x heads x tokens x dimension x bytes
        (LlamaConfig(**SIZES), 3 * 2 * 2 * 64 * 16 * 4),
        (LlamaConfig(**{**SIZES, "num_key_value_heads": 4}), 3 * 2 * 4 * 64 * 16 * 4),
        (MistralConfig(**SIZES, sliding_window=17), 3 * 2 * 2 * 17 * 16 * 4),
        (
            Gemma3TextConfig(
                **SIZES, head_dim=16, sliding_window=17,
                layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            ),
            2 * 2 * 16 * 4 * (2 * 17 + 64),
        ),
    ],
    ids=["grouped", "all-heads", "sliding", "mixed"],
)  # fmt: skip
def test_the_cache_grows_by_key_value_heads_and_stops_at_the_window(config, bytes_per_row):
    [*_, parts] = DryRun(config, setup()).segment_peaks("decode", rows=3)  # the last begins after the layers
    # Windows count their tokens in a few bytes of their own.
    assert 0 <= parts["kv_cache"] - 3 * bytes_per_row <= 24 and parts["activations"] > 0


DEEP = {
    "llama": LlamaConfig(**{**SIZES, "num_hidden_layers": 6}),
    "gemma2": Gemma2Config(**{**SIZES, "num_hidden_layers": 16}, head_dim=16, sliding_window=16),
    "gemma3": Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 16}, head_dim=16, sliding_window=17,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"] * 4,
    ),
    "gpt2": GPT2Config(vocab_size=500, n_embd=64, n_layer=6, n_head=4, n_positions=256),
}  # fmt: skip
MIXED = ("gemma2", "gemma3")  # layers of two kinds, of which it takes fifteen to leave any out
SEPARATE = LlamaConfig(**{**SIZES, "num_hidden_layers": 6, "hidden_size": 32, "intermediate_size": 64})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(
            pytest.param(name, {"activation_checkpointing": on}, marks=[pytest.mark.slow] if name in MIXED else [])
            for name in DEEP
            for on in (False, True)
        ),
        ("llama", {"critic": "adapter"}),
        ("llama", {"critic": "adapter", "activation_checkpointing": True}),
        ("llama", {"critic": "separate"}),
        ("llama", {"critic": "separate", "activation_checkpointing": True}),
        ("llama", {"quantization": "nf4", "reward": "adapter"}),
        ("llama", {"quantization": "int8"}),
    ],
    ids=str,
)
def test_a_few_layers_tell_what_all_of_them_take(name, options):
    asked, critic = setup(**options), SEPARATE if options.get("critic") == "separate" else None
    whole, few = DryRun(DEEP[name], asked, critic), predict(DEEP[name], asked, critic)
    assert isinstance(few, ExtrapolatedEstimator)
    assert few.parameters == whole.parameters
    # To the byte; where kinds mix, the highest layer may have other neighbors.
    tolerance = 0.005 if len(few.extra) > 1 and critic is None else 0
    for phase, rows in (("generate", 3), ("learn", 5), *([("learn", 1)] if len(few.extra) == 1 else [])):
        found, expected = getattr(few, phase)(rows), getattr(whole, phase)(rows)
        assert found.total == pytest.approx(expected.total, rel=tolerance, abs=0)
        assert tolerance or found == expected


def test_a_layer_too_few_is_seen():
    """The comparison above can fail."""
    few = predict(DEEP["llama"], setup())
    exact = few.learn(2).total
    for count in (3, 5):
        assert ExtrapolatedEstimator(few.base, [(few.extra[0][0], count)]).learn(2).total != exact


def test_all_layers_run_where_a_few_do_not_tell():
    def every_second_is_another(config):
        model = causal(config)
        for layer in model.model.layers[1::2]:
            layer.mlp = torch.nn.Linear(config.hidden_size, config.hidden_size)
        return model

    shares_kv = LlamaConfig(**DEEP["llama"].to_diff_dict(), num_kv_shared_layers=4)
    assert reduced_depth_configs(DEEP["llama"], every_second_is_another) == (DEEP["llama"], [])
    assert reduced_depth_configs(shares_kv, causal) == (shares_kv, [])
    assert reduced_depth_configs(CONFIGS["llama"], causal) == (CONFIGS["llama"], [])  # few as they are
    [(longer, left_out)] = reduced_depth_configs(DEEP["llama"], causal)[1]
    assert (longer.num_hidden_layers, left_out) == (3, 4)
    assert isinstance(predict(CONFIGS["llama"], setup()), DryRun)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_critic_of_its_own_is_a_second_model_and_trained_whole(checkpointing):
    torch.manual_seed(0)
    critic = AutoModelForSequenceClassification.from_config(Qwen2Config(**SIZES, num_labels=1))
    policy = get_peft_model(AutoModelForCausalLM.from_config(CONFIGS["llama"]), lora())
    actor = build_actor_critic(policy, critic=CriticSpec("separate", model=critic))
    actor.runner.sdpa_models = []
    if checkpointing:
        actor.activation_checkpointing_enable()
    asked = setup(critic="separate", activation_checkpointing=checkpointing)
    found = DryRun(CONFIGS["llama"], asked, Qwen2Config(**SIZES)).learn(3)
    assert working(found) == pytest.approx(measured(actor, "learn", 3), rel=0.03)
    assert found.parts["optimizer"] == 2 * found.parts["gradients"] == 2 * bytes_of(actor, frozen=False)
    assert found.parts["optimizer"] > 2 * bytes_of(critic, frozen=False) > 10 * bytes_of(policy, frozen=False)
    held = sum(p.numel() * p.element_size() for p in actor.parameters())
    assert found.parts["weights"] + found.parts["adapters"] == pytest.approx(held, rel=0.001)


def test_the_proposal_fits_and_twice_as_much_would_not(monkeypatch):
    monkeypatch.setattr(planning, "CUDA_CONTEXT", 0)
    found = plan(CONFIGS["llama"], setup(rollout_batch_size=16), 8 / 1024)
    generate, score, learn = found.phases
    assert found.fits and 1 < learn.rows < 8
    assert learn.rows * found.gradient_accumulation_steps * 2 == 16
    dry = dry_run("llama", activation_checkpointing=False)
    assert dry.learn(learn.rows).total == learn.total <= found.budget < dry.learn(2 * learn.rows).total
    for phase in (generate, score):
        assert phase.rows == 16 or getattr(dry, phase.name)(2 * phase.rows).total > found.budget
    assert found.budget == int(8 / 1024 * GIB * 0.95)


def test_what_does_not_fit_is_said_with_what_would_help(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planning, "CUDA_CONTEXT", 0)
    CONFIGS["llama"].save_pretrained(tmp_path)
    command = [
        "--model",
        str(tmp_path),
        "--prompt-length",
        "24",
        "--response-length",
        "40",
        "--rollout-batch-size",
        "4",
    ]
    assert main([*command, "--vram", "0.002", "--quantization", "fp32"]) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out and "quantization='nf4'" in out and "activation_checkpointing" in out
    assert main([*command, "--vram", "0.004", "--critic", "separate", "--value-model", str(tmp_path)]) == 1
    assert "critic='shared'" in capsys.readouterr().out
    command[1] = str(tmp_path / "config.json")  # the file serves as well as its folder
    assert main([*command, "--vram", "1", "--json", "--activation-checkpointing"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["fits"] and found["setup"]["activation_checkpointing"] and found["batch_sizes"]["num_mini_batches"] == 2
    )
    assert found["phases"]["learn"]["rows"] == found["batch_sizes"]["per_device_train_batch_size"] == 2


@pytest.mark.parametrize("size", ["inf", "nan", "1e300", "much"])
def test_a_card_has_a_size(tmp_path, capsys, size):
    CONFIGS["llama"].save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["--model", str(tmp_path), "--prompt-length", "4", "--response-length", "4", f"--vram={size}"])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(
        "error: argument --vram: invalid float value: 'much'"
        if size == "much"
        else f"error: vram={float(size)} is not the memory of a card: pass a number of GiB, such as 24."
    )


def test_the_table_ends_in_the_sizes():
    found = plan(CONFIGS["llama"], setup(rollout_batch_size=4), 1)
    lines = table(found).splitlines()
    sizes = "per_device_train_batch_size=2, gradient_accumulation_steps=1, num_mini_batches=2"
    assert lines[-1].startswith(f"PPOConfig({sizes}")
    total = next(line for line in lines if line.startswith("total"))
    assert total.split()[1:] == [f"{phase.total / GIB:.2f}" for phase in found.phases]


@pytest.mark.parametrize(
    ("change", "vram", "message"),
    [
        ({"prompt_length": 0}, 8, "prompt_length must be at least 1; got 0"),
        ({"num_mini_batches": 3}, 8, "rollout_batch_size=64 is not a multiple of num_mini_batches=3"),
        ({"quantization": "fp4"}, 8, "quantization must be one of 'nf4', 'int8', 'bf16', 'fp32'; got 'fp4'"),
        ({"gather_layers": True}, 8, "gather_layers=True has no effect with processes=1"),
        ({"response_length": 300}, 8, "324 tokens are more than this model's context of 256"),
        ({"critic": "separate"}, 8, "critic='separate' needs a model for the critic"),
        ({}, 0.25, "vram=0.25 GiB must be more than a CUDA context takes"),
        ({}, float("inf"), "vram=inf is not the memory of a card"),
        ({}, float("nan"), "vram=nan is not the memory of a card"),
    ],
)
def test_a_wrong_plan_is_refused(change, vram, message):
    with pytest.raises(ValueError, match=message):
        plan(CONFIGS["llama"], setup(**change), vram)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("processes", [2, 8])
def test_a_sharded_base_takes_its_share_and_what_a_pass_gathers(name, processes):
    """Embeddings, last norm and head are gathered with every pass; a tied head is one tensor with the embeddings."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    base, layer = (4 * sum(p.numel() for p in m.parameters()) for m in (model, model.model.layers[0]))
    ends = base - len(model.model.layers) * layer
    whole = DryRun(CONFIGS[name], setup())
    for options, score in (({}, base), ({"gather_layers": True}, ends + layer)):
        sharded = DryRun(CONFIGS[name], setup(processes=processes, **options))
        for phase, gathered in (("learn", ends + 2 * layer), ("score", score), ("generate", score)):
            found, expected = (dict(getattr(run, phase)(2).parts) for run in (sharded, whole))
            weights = found.pop("weights"), expected.pop("weights")
            assert weights[0] - weights[1] == pytest.approx(base / processes + gathered - base, abs=1)
            assert found == expected


def test_scales_of_quantized_weights_stay_whole():
    whole, sharded = (DryRun(CONFIGS["llama"], setup(quantization="nf4", processes=n)) for n in (1, 4))
    model = whole.actor.language_model
    scales = sum(b.nbytes for n, b in model.named_buffers() if n.endswith(("absmax", "absmax2", "codes")))
    base = whole.score(1).parts["weights"] - sum(b.nbytes for n, b in model.named_buffers() if "rotary" in n)
    assert sharded.score(1).parts["weights"] - whole.score(1).parts["weights"] == pytest.approx(
        (base - scales) / 4, abs=1
    )


def test_a_model_that_cannot_run_without_its_weights_is_named(tmp_path, capsys):
    build("Qwen3-MoE").config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["--model", str(tmp_path), "--vram", "8", "--prompt-length", "4", "--response-length", "4"])
    assert stop.value.code == 2
    assert "error: The memory of model_type='qwen3_moe' cannot be planned" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["Bamba", "Gemma 3, with vision", "Gemma 4", "GPT-2", "Qwen3.5", "SmolVLM"])
def test_bases_of_other_kinds_are_planned_in_4_bits(family):
    """Their linear layers are of other classes, hold weights the other way round, or are asked for them."""
    sizes = {"prompt_length": 4, "response_length": 4, "rollout_batch_size": 1, "num_mini_batches": 1}
    config = build(family).config
    four, half = (plan(config, setup(quantization=kind, **sizes), 8) for kind in ("nf4", "bf16"))
    assert four.fits and 0 < four.phases[1].parts["weights"] < half.phases[1].parts["weights"]


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path, capsys):
    T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, vocab_size=50).save_pretrained(tmp_path)
    for model in (str(tmp_path), str(tmp_path / "nothing")):
        with pytest.raises(SystemExit) as stop:
            main(["--model", model, "--vram", "8"])
        assert stop.value.code == 2
        assert "error:" in capsys.readouterr().err


def test_the_tracker_agrees_with_another_account_of_real_tensors():
    def work():
        a = torch.ones(1000)
        with tracker.category("weights"):
            b = torch.ones(2000)
        c = (a[:, None] * torch.ones(7)).sum()
        del a
        return b, c

    tracker = MemoryTracker(vocabulary=7)
    with PeakMemory() as other, tracker:
        held = work()
    assert sum(tracker.peak.values()) == other.peak
    # highest where the product is made: a, b, the seven ones, and the product itself
    assert tracker.peak == {"activations": 4000, "weights": 8000, "logits": 4 * 7 + 4 * 7000}
    assert tracker.current == {"activations": 4, "weights": 8000, "logits": 0}
    del held
    assert sum(tracker.current.values()) == 0


# The loss step


def whole_logits(head, hidden, targets, temperature, with_entropy, frozen_head):
    logits = head(hidden).float() / temperature
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1) if with_entropy else None
    return logprobs.gather(-1, targets[..., None]).squeeze(-1), entropy


def peak_of(trainer, phase, length, vocabulary):
    ids = torch.randint(3, 40, (2, 4 + length), generator=torch.Generator().manual_seed(0))
    zeros, mask = torch.zeros(2, length), torch.ones(2, length, dtype=torch.bool)
    known = [*trainer.model.parameters(), *trainer.model.buffers()]
    with PeakMemory(known) as found:
        if phase == "score":
            with torch.no_grad():
                trainer.collector._forward(ForwardBatch(ids, torch.ones_like(ids), length), None)
        else:
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "action_mask": mask, "logprobs": zeros,
                     "ref_logprobs": zeros, "values": zeros, "value_baselines": zeros, "advantages": zeros + 1,
                     "returns": zeros + 1}  # fmt: skip
            trainer.compute_loss(trainer.model.train(), batch).backward()
    return found.peak


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("phase", ["score", "learn"])
def test_the_peak_of_a_step_does_not_grow_with_vocabulary_times_tokens(tmp_path, monkeypatch, phase, chunked):
    vocabulary, chunk = 150_000, logits_module.CHUNK_ELEMENTS // 150_000
    lengths = (chunk, 2 * chunk)  # two and four whole chunks of two rows
    model = make_model(
        vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1, max_position_embeddings=256
    )
    trainer = make_trainer(tmp_path, model=model, config={"entropy_coef": 0.01})
    if not chunked:
        monkeypatch.setattr(modeling, "chunked_logprobs", whole_logits)
    short, long = (peak_of(trainer, phase, length, vocabulary) for length in lengths)
    growth = 2 * (lengths[1] - lengths[0]) * vocabulary * 4  # bytes, of whole fp32 logits
    assert (long - short < growth / 20) if chunked else (long - short > growth)

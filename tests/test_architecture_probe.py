"""A model whose numbers depend on padding, or on a cache, is refused or named when an actor-critic is made of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import SIZES, lora, make_model, make_prompts, make_tokenizer, make_trainer
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    Cache,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
)

from ppo_plus import ActorCritic, RewardConfig, RewardTrainer, ValueHead
from ppo_plus.models import backbone
from ppo_plus.models.backbone import backbone_interface, hidden_state_error, narrow_windows
from ppo_plus.models.loading import load_policy, quantized_share

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import architectures

PADDED = "hidden states for a left-padded row"
CACHED = "hidden states with its cache than without"


def actor_of(model, **options) -> ActorCritic:
    policy = get_peft_model(model, lora(target_modules=["q_proj"]))
    return ActorCritic(policy, ValueHead(model.config.hidden_size), **options)


def pooling(heeds_mask: bool):
    """A Llama whose first layer adds the mean of what came before, of real tokens or of all."""
    model = make_model().eval()
    forward = model.model.forward

    def pooled(input_ids, attention_mask=None, **kwargs):
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        outputs = forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        weights = (real if heeds_mask else torch.ones_like(real))[..., None].float()
        states = outputs.last_hidden_state
        mean = (states * weights).cumsum(1) / weights.cumsum(1).clamp(min=1)
        if input_ids.shape[1] > 1:  # cached steps are another matter
            outputs.last_hidden_state = states + mean
        return outputs

    model.model.forward = pooled
    return model


def test_what_reads_pads_is_refused():
    assert backbone_interface(pooling(heeds_mask=False)).padding_error > 0.05
    assert backbone_interface(pooling(heeds_mask=True)).padding_error < 1e-5  # negative control
    with pytest.raises(ValueError, match=PADDED):
        backbone.check_padding(pooling(heeds_mask=False))
    backbone.check_padding(pooling(heeds_mask=True))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("deepseek_v4", torch.float32), ("deepseek_v4", torch.bfloat16), ("trocr", torch.float32),
        ("trocr", torch.bfloat16), ("recurrent_gemma", torch.float32),
    ],
)  # fmt: skip
def test_decoders_to_which_padding_is_context_are_refused(kind, dtype):
    """Compressed attention that pools pads, positions that count them, and a state that runs through them."""
    model = architectures.tiny_model(kind)
    assert architectures.off(*scored(model)) > 0.05  # the oracle: left-padded rows against each row by itself
    with pytest.raises(ValueError, match=PADDED):
        backbone.check_padding(model.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_moe", "mamba2", "falcon_h1"])
def test_decoders_to_which_it_is_none_are_taken(kind, dtype):
    model = architectures.tiny_model(kind)
    assert architectures.off(*scored(model)) < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.check_decoding(model.to(dtype))


def scored(model):
    """Log-probabilities of left-padded rows by one pass, and of each row by itself."""
    ids, mask, _, answers = architectures.responses()
    expected = [architectures.plain_logprobs(model, p, a) for p, a in zip(architectures.PROMPTS, answers, strict=True)]
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        try:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits
        except TypeError:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logprobs = (logits / architectures.TEMPERATURE).log_softmax(-1)[:, -architectures.STEPS - 1 : -1]
    return logprobs.gather(-1, ids[:, -architectures.STEPS :, None]).squeeze(-1), expected


@pytest.mark.parametrize("kind", ["ref_model", "value_model"])
def test_a_reference_or_a_critic_that_reads_pads_is_refused(kind):
    others = {"critic": "separate" if kind == "value_model" else "shared", "ref_model": make_model()}
    with pytest.raises(ValueError, match=PADDED):
        ActorCritic(make_model(), ValueHead(32), **{**others, kind: pooling(heeds_mask=False)})
    ActorCritic(make_model(), ValueHead(32), **{**others, kind: pooling(heeds_mask=True)})


class Forgetful(torch.nn.Module):
    """A hook that multiplies the values in a cache before each cached step."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, module, args, kwargs):
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        for layer in cache.layers if cache is not None else []:
            layer.values.mul_(self.factor)


@pytest.mark.parametrize(("factor", "outcome"), [(1.0, "taken"), (1.001, "named"), (0.0, "refused")])
def test_by_how_much_a_cache_changes_numbers(factor, outcome):
    model = make_model(initializer_range=0.3).eval()
    model.model.register_forward_pre_hook(Forgetful(factor), with_kwargs=True)
    expected = {
        "taken": contextlib.nullcontext(),
        "named": pytest.warns(UserWarning, match=CACHED),
        "refused": pytest.raises(ValueError, match=CACHED),
    }
    with warnings.catch_warnings(), expected[outcome]:
        if outcome != "named":
            warnings.simplefilter("error")
        backbone.check_decoding(model)


@pytest.mark.parametrize("kind", ["nemotron_h", "zamba2"])
def test_time_steps_that_only_several_tokens_clamp_are_named(kind):
    with pytest.warns(UserWarning, match=CACHED):
        backbone.check_decoding(architectures.tiny_model(kind))


def test_time_steps_without_a_limit_are_the_same_in_a_cached_step():
    """Negative control: of the same model, without the clamp."""
    model = architectures.tiny_model("nemotron_h")
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.check_decoding(model)


# --- adapters ---


def trained(tmp_path, model, **adapter):
    """What two rollouts of one step each warn of, and the trainer."""
    config = {"max_steps": 2, "num_ppo_epochs": 1, "num_mini_batches": 1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(tmp_path, model=model, config=config, peft_config=lora(**adapter))
        before = {n: p.detach().clone() for n, p in trainer.model.policy.named_parameters() if ".lora_B" in n}
        trainer.train()
    said = [str(w.message) for w in caught if "get no gradient" in str(w.message)]
    still = {n.split(".")[-4] for n, p in trainer.model.policy.named_parameters() if n in before and not p.any()}
    return said, still, len(before)


def test_adapters_that_never_learn_are_named_once(tmp_path):
    """The indexer of sparse attention chooses tokens, and a choice passes no gradient on."""
    indexer = {"wq_b", "wk", "weights_proj"}
    said, still, count = trained(tmp_path, architectures.tiny_model("deepseek_v32"))
    assert len(said) == 1 and all(name in said[0] for name in indexer)
    assert still == indexer and count > len(indexer)  # the oracle: what training did not move
    model = architectures.tiny_model("deepseek_v32")
    said, still, _ = trained(tmp_path, model, exclude_modules=sorted(indexer))  # negative control
    assert said == [] and still == set()


ROWS = json.loads(architectures.RESULT.read_text())["rows"]
WITHOUT_GRADIENT = {
    row["model_type"]: row["cells"]["lora"].removeprefix("no: no gradient for ").split(", ")
    for row in ROWS if row.get("cells", {}).get("lora", "").startswith("no: ")
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", WITHOUT_GRADIENT)
def test_training_names_what_the_table_of_architectures_names(kind, tmp_path):
    said, still, _ = trained(tmp_path, architectures.tiny_model(kind))
    names = WITHOUT_GRADIENT[kind]
    others = f" and of {len(names) - 8} other kinds" if len(names) > 8 else ""
    assert len(said) == 1 and f"those of {', '.join(names[:8])}{others} (the first is" in said[0]
    assert still >= set(names)


def test_an_adapter_with_which_a_model_fails_is_refused(tmp_path):
    """The router of PhiMoE is a linear layer that returns three tensors, and PEFT expects one."""
    with pytest.raises(ValueError, match="PhimoeForCausalLM fails on a few tokens of text .*exclude_modules"):
        make_trainer(tmp_path, model=architectures.tiny_model("phimoe"))
    adapter = lora(exclude_modules=["router"])
    make_trainer(tmp_path, model=architectures.tiny_model("phimoe"), peft_config=adapter)  # negative control


# --- windows ---


def test_a_cache_that_keeps_fewer_tokens_than_are_seen_is_refused_however_wide_its_window(monkeypatch):
    """Moshi's cache keeps a window, 3000 tokens wide, and its full pass sees all tokens."""
    model = architectures.tiny_model("moshi")
    model.config.sliding_window = 3000
    with pytest.raises(ValueError, match=CACHED):
        backbone.check_decoding(model)
    assert model.config.sliding_window == 3000
    monkeypatch.setattr(backbone, "narrow_windows", contextlib.nullcontext)  # negative control: rows are shorter
    other = architectures.tiny_model("moshi")
    other.config.sliding_window = 3000
    backbone.check_decoding(other)


def test_windows_are_narrow_inside_alone():
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
    model = MistralForCausalLM(
        MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, sliding_window=4096)
    ).eval()
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        wide = model(ids).logits
        with narrow_windows(model):
            assert model.config.sliding_window == 4
            narrow = model(ids).logits
        assert model.config.sliding_window == 4096 and torch.equal(model(ids).logits, wide)
    assert torch.equal(narrow[:, :4], wide[:, :4]) and not torch.equal(narrow[:, -1], wide[:, -1])
    backbone.check_decoding(model)


# --- where ---


def test_a_model_is_probed_again_on_the_device_to_which_it_is_moved():
    model = make_model().eval()
    actor = actor_of(model)
    actor.move_auxiliary_modules(torch.device("cpu"))
    found = backbone_interface(model)
    backbone._interfaces[model] = dataclasses.replace(found, device=torch.device("meta"))  # as if it had been there
    forward = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: forward(  # as kernels of that device have it
        *args, attention_mask=None if attention_mask is None else torch.ones_like(attention_mask), **kwargs
    )
    with pytest.raises(ValueError, match=PADDED):
        actor.move_auxiliary_modules(torch.device("cpu"))


def ignoring_its_mask(model, when=lambda: True):
    """A model whose backbone attends to padding while a condition holds, as a kernel that reads no mask."""
    forward = model.base_model.forward

    def unmasked(*args, attention_mask=None, **kwargs):
        mask = torch.ones_like(attention_mask) if attention_mask is not None and when() else attention_mask
        return forward(*args, attention_mask=mask, **kwargs)

    model.base_model.forward = unmasked
    return model


def in_autocast() -> bool:
    return torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("kind", ["policy", "reference", "critic"])
def test_models_are_probed_in_the_dtype_of_training(kind, tmp_path):
    """Kernels differ between dtypes: this one reads no mask in bf16, and the weights are in fp32."""

    def train(bf16, when=in_autocast):
        flawed = ignoring_its_mask(critic() if kind == "critic" else make_model(), when)
        options = {
            "policy": {"model": flawed}, "reference": {"peft_config": None, "ref_model": flawed},
            "critic": {"value_model": flawed},
        }[kind]  # fmt: skip
        make_trainer(tmp_path, config={"bf16": bf16}, **options)

    train(bf16=False)
    train(bf16=True, when=lambda: False)  # negative controls
    with pytest.raises(ValueError, match=PADDED):
        train(bf16=True)


def critic():
    torch.manual_seed(1)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).eval()


def test_the_probe_in_autocast_leaves_that_of_the_weights(tmp_path):
    trainer = make_trainer(tmp_path, config={"bf16": True})
    interface = backbone_interface(trainer.model.language_model)
    assert interface.dtype == torch.float32 and interface.rounding == backbone.ERRORS[0]
    assert trainer.model.runner.packable_models == [trainer.model.language_model]


def test_a_model_that_was_cast_is_probed_again():
    model = make_model().eval()
    assert backbone_interface(model).dtype == torch.float32
    ignoring_its_mask(model.bfloat16())
    backbone.check_padding(model)  # what the first probe found
    with pytest.raises(ValueError, match=PADDED):
        actor_of(model)
    assert backbone_interface(model).dtype == torch.bfloat16


@pytest.mark.parametrize(("compares", "factor"), [(True, 0.0), (True, 1.0), (False, 0.0)])
def test_a_reference_that_answers_decodes_as_it_is_scored(compares, factor, tmp_path):
    """A reference is only scored, unless evaluations compare its answers with those of the policy."""
    reference = make_model(initializer_range=0.3)
    reference.model.register_forward_pre_hook(Forgetful(factor), with_kwargs=True)
    is_refused = compares and factor == 0.0
    with pytest.raises(ValueError, match=CACHED) if is_refused else contextlib.nullcontext():
        make_trainer(
            tmp_path, config={"eval_win_rate": compares}, eval_dataset=make_prompts(), peft_config=None,
            ref_model=reference,
        )  # fmt: skip


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = BertForSequenceClassification(BertConfig(vocab_size=42, num_labels=1, pad_token_id=0, **sizes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("is_trained", [False, True], ids=["scores", "is trained"])
def test_classifiers_are_tried_in_the_dtype_of_training(is_trained, tmp_path):
    def warns(bf16, when=in_autocast):
        model = ignoring_its_mask(bert(), when)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if is_trained:
                args = RewardConfig(str(tmp_path), use_cpu=True, bf16=bf16, report_to="none")
                rows = Dataset.from_dict({"chosen": ["so"], "rejected": ["no"]})
                RewardTrainer(model, args, train_dataset=rows, processing_class=make_tokenizer())
            else:
                make_trainer(
                    tmp_path, config={"bf16": bf16}, reward_funcs=model, reward_processing_classes=make_tokenizer()
                )
        return any("depend on the padding" in str(w.message) for w in caught)

    assert warns(bf16=True)
    assert not warns(bf16=False) and not warns(bf16=True, when=lambda: False)  # negative controls


def test_errors_of_hidden_states_by_hand():
    expected = torch.tensor([[[4.0, 0.0], [2.0, 0.0], [1.0, 0.0]]])
    found = expected + torch.tensor([[[0.0, 1.0], [0.0, 0.5], [0.25, 0.0]]])
    assert hidden_state_error(found, expected, in_half=False) == 0.25
    assert hidden_state_error(found, expected, in_half=True) == 0.125  # of the median token


# --- quantization ---


@pytest.mark.parametrize(("kind", "share"), [("llama", 1.0), ("falcon", 0.0), ("mixtral", 6144 / 43264)])
def test_a_quantization_that_leaves_most_of_a_model_as_it_was_is_named(kind, share, tmp_path):
    """Falcon's layers are a class of their own, and Mixtral's experts are one tensor of each layer."""
    architectures.tiny_model(kind).save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy = load_policy(str(tmp_path), peft_config=lora(), quantization_config=nf4)
    said = [str(w.message) for w in caught if "quantization_config applies to" in str(w.message)]
    assert len(said) == (share < 0.5) and all(f"{quantized_share(policy):.0%}" in text for text in said)
    sizes = {True: 0, False: 0}  # the oracle: bytes of the layers, 4 bits a weight or as many as on disk
    for name, parameter in policy.get_base_model().named_parameters():
        if parameter.ndim > 1 and ".lora_" not in name and "embed" not in name and "lm_head" not in name:
            packed = parameter.dtype == torch.uint8
            sizes[packed] += parameter.numel() * (2 if packed else 1)
    assert quantized_share(policy) == sizes[True] / sum(sizes.values()) == share, sizes

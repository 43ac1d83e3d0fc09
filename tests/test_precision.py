"""Which half precision a run is in: bf16 where the card has it in hardware, fp16 on the cards before, never both."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import lora, make_model, make_tokenizer
from datasets import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments
from trl import RewardConfig as TRLRewardConfig

from ppo_plus import PPOConfig, RewardConfig, RewardTrainer
from ppo_plus.models import precision
from ppo_plus.training.setup import load_policy_from_args

KINDS = pytest.mark.parametrize("kind", [PPOConfig, RewardConfig])


@pytest.fixture
def card(monkeypatch):
    """Let a CUDA card of some compute capability be there, for what a configuration asks of it."""

    def put_in(capability, name="Some card"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
        # Every card that torch runs on multiplies bf16 in software.
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True: including_emulation or capability >= (8, 0),
        )
        for kind in (TrainingArguments, TRLRewardConfig):
            monkeypatch.setattr(kind, "__post_init__", lambda self: None)  # it would use the card

    return put_in


@KINDS
@pytest.mark.parametrize(
    ("capability", "bf16", "fp16"),
    [
        ((6, 1), False, False),
        ((7, 0), False, True),
        ((7, 5), False, True),
        ((8, 0), True, False),
        ((9, 0), True, False),
    ],
    ids=["GTX 1080", "V100", "T4", "A100", "H100"],
)
def test_the_card_decides(card, tmp_path, kind, capability, bf16, fp16):
    card(capability)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = kind(str(tmp_path))
    assert (bool(found.bf16), bool(found.fp16)) == (bf16, fp16)


@KINDS
@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"fp16": True}, (False, True)),
        ({"bf16": False}, (False, False)),
        ({"fp16": True, "bf16": False}, (False, True)),
    ],
)
def test_what_is_asked_for_stays(card, tmp_path, kind, capability, given, wanted):
    card(capability)
    found = kind(str(tmp_path), **given)
    assert (bool(found.bf16), bool(found.fp16)) == wanted


@KINDS
def test_bf16_in_software_is_refused_by_the_name_of_the_card(card, tmp_path, kind):
    card((7, 5), "Tesla T4")
    with pytest.raises(ValueError, match=r"bf16=True.*Tesla T4.*7\.5"):
        kind(str(tmp_path), bf16=True)
    card((8, 0))
    assert kind(str(tmp_path), bf16=True).bf16


@KINDS
@pytest.mark.parametrize(
    ("option", "minimum", "named"),
    [
        ({"torch_compile": True}, (7, 0), r"torch_compile=True requires compute capability 7\.0"),
        (
            {"model_init_kwargs": {"attn_implementation": "flash_attention_2"}}, (8, 0),
            r"attn_implementation='flash_attention_2' requires compute capability 8\.0",
        ),
    ],
)  # fmt: skip
def test_what_a_card_is_too_old_for_is_refused(card, tmp_path, kind, option, minimum, named):
    card((minimum[0] - 1, 5), "Old card")
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: {named}, and Old card has"):
        kind(str(tmp_path), **option)
    kind(str(tmp_path), **option, use_cpu=True)
    card(minimum)
    kind(str(tmp_path), **option)


@KINDS
def test_a_card_does_not_decide_for_a_run_on_the_cpu(card, tmp_path, kind):
    for capability in ((7, 5), (8, 0)):
        card(capability)
        found = kind(str(tmp_path), use_cpu=True)
        assert not found.bf16 and not found.fp16
    assert kind(str(tmp_path), use_cpu=True, bf16=True).bf16


# --- what is loaded for a run in fp16 ---


def arguments(device="cuda", **given):
    """What `load_policy_from_args` reads of a configuration whose device is not there."""
    names = {
        "seed": 0,
        "fp16": True,
        "bf16": False,
        "model_adapter_name": None,
        "ref_adapter_name": None,
        "model_init_kwargs": None,
    }
    return SimpleNamespace(**names, device=torch.device(device), **given)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_model(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def nf4(dtype):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def frozen_dtypes(model):
    return {p.dtype for p in model.parameters() if not p.requires_grad}


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.float16), ("cpu", torch.bfloat16)])
def test_a_base_in_bf16_is_loaded_in_fp16_for_a_run_in_fp16(base, device, dtype):
    policy = load_policy_from_args(base, arguments(device), None, lora())
    assert frozen_dtypes(policy) == {dtype}
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}  # or a scaler would refuse


def test_4_bit_layers_multiply_in_fp16_in_a_run_in_fp16(base):
    asked = nf4(torch.bfloat16)
    with pytest.warns(UserWarning, match="bnb_4bit_compute_dtype"):
        policy = load_policy_from_args(base, arguments(), asked, lora())
    assert policy.base_model.model.model.layers[0].mlp.up_proj.base_layer.compute_dtype == torch.float16
    assert asked.bnb_4bit_compute_dtype == torch.bfloat16  # the user's
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_policy_from_args(base, arguments(), nf4(torch.float16), lora())
        policy = load_policy_from_args(base, arguments("cpu"), asked, lora())
    assert policy.base_model.model.model.layers[0].mlp.up_proj.base_layer.compute_dtype == torch.bfloat16


def test_a_model_that_is_there_in_bf16_is_named(base):
    for dtype in (torch.float16, torch.float32):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            load_policy_from_args(make_model().to(dtype), arguments(), None, lora())
    with pytest.warns(UserWarning, match="loaded in bf16"):
        load_policy_from_args(make_model().to(torch.bfloat16), arguments(), None, lora())


def test_a_reward_model_is_loaded_in_fp16_for_a_run_in_fp16(base, tmp_path, monkeypatch):
    monkeypatch.setattr("ppo_plus.reward_trainer.runs_in_fp16", lambda args: True)
    args = RewardConfig(str(tmp_path), use_cpu=True, report_to="none", bf16=False, fp16=False)
    pairs = Dataset.from_dict({"chosen": ["good"] * 2, "rejected": ["bad"] * 2})
    with pytest.warns(UserWarning, match="bnb_4bit_compute_dtype"):
        trainer = RewardTrainer(
            base, args, peft_config=lora(), train_dataset=pairs, processing_class=make_tokenizer(),
            quantization_config=nf4(torch.bfloat16),
        )  # fmt: skip
    assert frozen_dtypes(trainer.model) == {torch.float16, torch.uint8}
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


# --- CPUs without instructions for half precision ---


@pytest.fixture
def cpu(monkeypatch):
    """Set what torch says of this CPU, and count every weight as one of a large model."""

    def set_capabilities(**known):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)

    monkeypatch.setattr(precision, "MIN_SLOW_WEIGHTS", 1)
    return set_capabilities


def warned(model, autocast=False):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        precision.warn_of_slow_half_precision(model, autocast)
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_software_is_named_with_its_fix(cpu, dtype):
    cpu(architecture="x86_64", amx_bf16=False, avx512_bf16=False)
    [message] = warned(make_model().to(dtype))
    assert 'model_init_kwargs={"dtype": "float32"}' in message
    assert warned(make_model()) == []
    [message] = warned(make_model(), autocast=True)
    assert "bf16=False" in message


def test_4_bit_layers_that_multiply_in_software_are_named_with_their_fix(cpu, base):
    cpu(architecture="x86_64")

    def load(dtype):
        return AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4(dtype), dtype=torch.float32)

    [message] = warned(load(torch.bfloat16))
    assert "bnb_4bit_compute_dtype=torch.float32" in message
    assert warned(load(torch.float32)) == []


@pytest.mark.parametrize(
    "known", [{"amx_bf16": True}, {"avx512_bf16": True}, {"architecture": "aarch64"}, {"architecture": ""}]
)
def test_cpus_with_instructions_or_of_another_kind_give_no_warning(cpu, known):
    cpu(**{"architecture": "x86_64", **known})
    assert warned(make_model().to(torch.bfloat16)) == []


def test_a_small_model_gives_no_warning(cpu, monkeypatch):
    cpu(architecture="x86_64")
    monkeypatch.setattr(precision, "MIN_SLOW_WEIGHTS", 20_000_000)
    assert warned(make_model().to(torch.bfloat16)) == []

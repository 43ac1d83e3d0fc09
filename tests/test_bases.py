"""A base is told apart by its weights, whatever its folder is called and however its weights are held."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from conftest import classifier, lora, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from ppo_plus import RewardConfig, RewardTrainer
from ppo_plus.models import base_weights
from ppo_plus.models.adapter_checks import check_base_weights
from ppo_plus.models.adapter_loading import load_reward_adapter
from ppo_plus.models.base_weights import (
    are_different,
    decode_samples,
    encode_samples,
    local_folder,
    sample_files,
    sample_model,
)
from ppo_plus.rewards import Completions
from ppo_plus.rewards.adapters import check_same_base

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5}


def saved(folder, seed=0, **options):
    make_model(seed, **{**SIZES, **options}).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def merged(base, folder, target_modules="all-linear", size=0.05):
    """The base with an adapter merged into it: embeddings and norms stay as they are."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(target_modules=target_modules))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=size)
    model.merge_and_unload().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def plain_adapter(base, folder):
    """A reward adapter that PEFT saves, which knows its base by name alone."""
    model = classifier(base)
    get_peft_model(model, lora(task_type="SEQ_CLS", modules_to_save=["score"])).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two bases in folders of the same last name, the second a merge of the first."""
    root = tmp_path_factory.mktemp("bases")
    first = saved(root / "a" / "merged")
    return first, merged(first, root / "b" / "merged")


@pytest.mark.parametrize("role", ["reward_funcs", "value_model"])
def test_another_base_in_a_folder_of_the_same_name_is_refused_before_it_is_loaded(bases, tmp_path, monkeypatch, role):
    adapter = plain_adapter(bases[0], tmp_path / "reward")
    roles = (
        {"reward_funcs": str(adapter)}
        if role == "reward_funcs"
        else {role: str(adapter), "config": {"critic": "adapter"}}
    )
    make_trainer(tmp_path, model=str(bases[0]), **roles)  # control
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match="a/merged.*b/merged"):
        make_trainer(tmp_path, model=str(bases[1]), **roles)


def copied(base, tmp_path):
    return shutil.copytree(base, tmp_path / "models--me--tiny" / "snapshots" / "0123abc")


def sharded(base, tmp_path):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    return tmp_path / "shards"


def in_bf16(base, tmp_path):
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    return tmp_path / "half"


def in_fp16(base, tmp_path):
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16).save_pretrained(tmp_path / "half")
    return tmp_path / "half"


def in_4_bits(base, tmp_path):
    AutoModelForCausalLM.from_pretrained(base, quantization_config=NF4).save_pretrained(tmp_path / "nf4")
    return tmp_path / "nf4"


def with_more_tokens(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(70, mean_resizing=False)
    model.save_pretrained(tmp_path / "more")
    return tmp_path / "more"


SAME = [copied, sharded, in_bf16, in_fp16, in_4_bits, with_more_tokens]


@pytest.mark.parametrize("form", SAME)
def test_the_same_base_is_taken_under_any_name_and_in_any_form(bases, tmp_path, form):
    adapter = plain_adapter(bases[0], tmp_path / "reward")
    other = form(bases[0], tmp_path)
    assert (len(list(other.glob("*.safetensors"))) > 1) == (form is sharded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_same_base(adapter, str(other), sample_files(other))
    with pytest.raises(ValueError, match="other weights|different weights"):  # control: another base in that form
        another = form(saved(tmp_path / "another", seed=9), tmp_path / "control")
        check_same_base(adapter, str(another), sample_files(another))


def test_an_adapter_is_loaded_onto_its_base_with_more_tokens(bases, tmp_path):
    """PEFT would save the resized embeddings of that base with each adapter; this one has none, and lacks none."""
    adapter = plain_adapter(bases[0], tmp_path / "reward")
    options = {"model": str(with_more_tokens(bases[0], tmp_path)), "reward_funcs": str(adapter)}
    reward = make_trainer(tmp_path / "out", **options).collector.rewards.rewards[0]
    same = make_trainer(tmp_path / "out", **{**options, "model": str(bases[0])}).collector.rewards.rewards[0]
    batch = Completions(["the sea"], [" is"], [[10, 11, 12]])
    assert reward(batch) == pytest.approx(same(batch), abs=1e-5)


def test_the_same_base_under_the_name_of_its_snapshot_trains(bases, tmp_path):
    adapter = plain_adapter(bases[0], tmp_path / "reward")
    trainer = make_trainer(tmp_path / "out", model=str(copied(bases[0], tmp_path)), reward_funcs=str(adapter))
    assert len(trainer.collector.rewards.names) == 1


def test_a_loaded_model_is_told_by_its_weights_and_not_by_its_name(bases, tmp_path):
    adapter = plain_adapter(bases[0], tmp_path / "reward")
    model = AutoModelForCausalLM.from_pretrained(bases[1])
    model.config._name_or_path = str(bases[0])  # as a merge in memory leaves it
    with pytest.raises(ValueError, match="different weights"):
        make_trainer(tmp_path / "out", model=model, reward_funcs=str(adapter))
    model = AutoModelForCausalLM.from_pretrained(bases[0])
    model.config._name_or_path = ""
    make_trainer(tmp_path / "out", model=model, reward_funcs=str(adapter))


def quantized_policy(base):
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=NF4, dtype=torch.float32)
    return get_peft_model(model, lora())


def test_an_adapter_of_a_4_bit_base_is_recorded_and_taken_on_that_base_in_any_precision(bases, tmp_path):
    """The base has gone from its folder: what RewardTrainer wrote is all that is known of it."""
    base = shutil.copytree(bases[0], tmp_path / "gone")
    args = RewardConfig(
        str(tmp_path / "reward"), max_steps=1, report_to="none", use_cpu=True,
        model_init_kwargs={"quantization_config": NF4, "dtype": torch.float32},
    )  # fmt: skip
    pairs = Dataset.from_dict({"chosen": ["see"] * 8, "rejected": ["xx"] * 8})
    trainer = RewardTrainer(str(base), args, peft_config=lora(), train_dataset=pairs, processing_class=make_tokenizer())
    trainer.train()
    trainer.save_model()
    shutil.rmtree(base)
    recorded = json.loads((tmp_path / "reward" / "reward_model.json").read_text())["base_weights"]
    assert any(name.endswith(":nf4") for name in recorded) and len(json.dumps(recorded)) < 6000
    for policy in (quantized_policy(bases[0]), get_peft_model(AutoModelForCausalLM.from_pretrained(bases[0]), lora())):
        load_reward_adapter(policy, "judge", tmp_path / "reward")
    # Of a merge embeddings and norms are the same, so its 4-bit weights tell.
    with pytest.raises(ValueError, match="different weights"):
        load_reward_adapter(quantized_policy(bases[1]), "judge", tmp_path / "reward")


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj"], ["down_proj"]])
def test_a_merge_into_one_kind_of_layer_is_seen(bases, tmp_path, targets):
    other = merged(bases[0], tmp_path / "merged", targets)
    assert are_different(sample_files(bases[0]), sample_files(other)) is True
    assert are_different(sample_files(bases[0]), sample_files(bases[0])) is False


@pytest.mark.parametrize("quantization", [NF4, BitsAndBytesConfig(load_in_8bit=True)], ids=["nf4", "int8"])
def test_quantized_weights_in_memory_are_dequantized(bases, quantization):
    config = {"quantization_config": quantization, "dtype": torch.float32}
    models = [AutoModelForCausalLM.from_pretrained(base, **config) for base in (*bases, bases[0])]
    first, second, again = map(sample_model, models)
    kind = next(name for name in first if "q_proj" in name)
    plain = sample_files(bases[0])[kind.partition(":")[0]]
    scale = plain.abs().max()
    assert ":" in kind and (first[kind] - plain).abs().max() < 0.2 * scale  # near what was quantized
    assert are_different(first, again) is False and are_different(first, second) is True
    with torch.no_grad():
        models[0].eval()(input_ids=torch.tensor([[5, 6, 7]]))  # moves the scales of 8-bit rows
    assert are_different(sample_model(models[0]), again) is False


def test_adapters_of_a_policy_are_no_weights_of_its_base(bases):
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(bases[0]), lora(modules_to_save=["embed_tokens"], init_lora_weights=False)
    )
    with torch.no_grad():
        policy.get_input_embeddings().weight.add_(1)
    policy.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    found, expected = sample_model(policy), sample_files(bases[0])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_classifier_and_a_language_model_of_one_base_have_the_same_samples(bases):
    model = AutoModelForSequenceClassification.from_pretrained(bases[0], num_labels=1)
    found, expected = sample_model(model), sample_model(AutoModelForCausalLM.from_pretrained(bases[0]))
    assert found.keys() == expected.keys() and len(found) > 25
    assert {int(name.split(".")[1]) for name in found if name.startswith("layers.")} == {0, 2, 4}


def test_samples_survive_json(bases):
    samples = sample_files(bases[0])
    again = decode_samples(json.loads(json.dumps(encode_samples(samples))))
    assert again.keys() == samples.keys() and all(torch.equal(again[name], samples[name]) for name in samples)


def test_names_decide_where_the_base_is_not_on_this_machine(bases, tmp_path):
    adapter = plain_adapter(bases[0], tmp_path / "reward")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for theirs, expected in (("me/tiny", "taken"), ("you/tiny", "warned"), ("me/other", "refused"), ("", "taken")):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": theirs}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if expected == "refused":
                with pytest.raises(ValueError, match="'me/other',( but)? the actor's base is 'me/tiny'"):
                    check_same_base(adapter, "me/tiny", sample_files(bases[0]))
            else:
                check_same_base(adapter, "me/tiny", sample_files(bases[0]))
        assert any("you/tiny" in str(w.message) and "me/tiny" in str(w.message) for w in caught) == (
            expected == "warned"
        )


def test_another_revision_of_the_same_name_is_told_by_what_was_recorded(bases, tmp_path):
    adapter = plain_adapter(bases[0], tmp_path / "reward")
    recorded = {"base_model": "me/tiny", "base_weights": encode_samples(sample_files(bases[0]))}
    (adapter / "reward_model.json").write_text(json.dumps(recorded))
    assert check_base_weights(adapter, sample_files(bases[0]), "me/tiny")
    with pytest.raises(ValueError, match="'me/tiny',( but| and)? the actor's base is 'me/tiny'"):
        check_same_base(adapter, "me/tiny", sample_files(bases[1]))


def test_what_was_recorded_is_compared_with_the_loaded_weights_where_files_tell_nothing(bases, tmp_path):
    """As of a policy whose base is downloaded only when it is loaded."""
    adapter = plain_adapter(bases[0], tmp_path / "reward")
    recorded = {"base_model": "me/tiny", "base_weights": encode_samples(sample_files(bases[0]))}
    (adapter / "reward_model.json").write_text(json.dumps(recorded))
    check_same_base(adapter, "you/another-name", {})  # not known yet
    policy = PeftModel(AutoModelForCausalLM.from_pretrained(bases[1]), lora())
    with pytest.raises(ValueError, match="different weights"):
        load_reward_adapter(policy, "judge", adapter)


def test_files_without_weights_tell_nothing(tmp_path):
    assert sample_files(None) == {} and sample_files(tmp_path) == {}
    assert are_different({}, {"norm.weight": torch.ones(2)}) is None
    assert local_folder("") is None and local_folder("me/not-here") is None and local_folder("/not/here") is None
    save_file(
        {"model.scale": torch.tensor(1.0), "model.packed": torch.ones(3, dtype=torch.uint8)},
        tmp_path / "model.safetensors",
    )
    assert sample_files(tmp_path) == {} and load_file(tmp_path / "model.safetensors")


def test_names_that_two_stacks_of_layers_share_are_not_sampled():
    """HrmText: `low.layers.0` and `high.layers.0` have the same name in a layer, and files list them in any order."""
    names = [f"model.{stack}.layers.{n}.mlp.up_proj.weight" for stack in ("low", "high") for n in range(3)]
    unique = ["model.low.layers.0.gate.weight", "model.embed_tokens.weight"]
    expected = {"layers.0.gate.weight": unique[0], "embed_tokens.weight": unique[1]}
    assert base_weights._choose([*names, *unique]) == base_weights._choose([*reversed(names), *unique]) == expected
    alone = base_weights._choose(names[:3])  # control: one stack is sampled
    assert set(alone) == {f"layers.{n}.mlp.up_proj.weight" for n in range(3)}

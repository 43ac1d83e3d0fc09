"""A merged model is read without ppo_plus: the same outputs, with tokenizer and generation config, and no critic."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
from conftest import CHAT_TEMPLATE, classifier, close, lora, make_model, make_tokenizer, make_trainer
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from ppo_plus.models.merging import PROBE, merge_adapter

IDS = torch.tensor([[1, 8, 9, 20, 33, 4, 17]])


@pytest.fixture(scope="module")
def policy(base, tmp_path_factory):
    """What a run saves: a trained adapter, its critic, a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("run") / "policy"
    model = make_model()
    model.generation_config = GenerationConfig(temperature=0.3, do_sample=True, max_new_tokens=7, eos_token_id=[2, 5])
    source = folder.parent / "base"
    model.save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    trainer = make_trainer(folder, model=str(source), processing_class=make_tokenizer(CHAT_TEMPLATE))
    trainer.train()
    trainer.save_model()
    return source, folder


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits


def tensor_names(folder):
    return {name for file in folder.glob("*.safetensors") for name in safe_open(file, "pt").keys()}  # noqa: SIM118


def test_a_merged_policy_reloads_to_the_same_logits(policy, tmp_path):
    source, folder = policy
    result = merge_adapter(folder, tmp_path / "merged", dtype="float32")
    adapted = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), folder))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    close(logits(merged), adapted, atol=1e-4)
    assert (logits(AutoModelForCausalLM.from_pretrained(source)) - adapted).abs().max() > 1  # control: the bare base
    assert result.error < 1e-5 and result.architecture == "LlamaForCausalLM"
    assert tensor_names(tmp_path / "merged") == tensor_names(source)  # as a GGUF converter maps them
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
    generation = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert (generation.temperature, generation.max_new_tokens, generation.eos_token_id) == (0.3, 7, [2, 5])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (
        tokenizer.chat_template == CHAT_TEMPLATE
        and tokenizer("he sees").input_ids == make_tokenizer()("he sees").input_ids
    )


def test_a_gguf_converter_finds_a_name_for_each_tensor_and_the_vocabulary(policy, tmp_path):
    gguf = pytest.importorskip("gguf")
    merge_adapter(policy[1], tmp_path / "merged")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    mapped = {names.get_name(name, try_suffixes=(".weight",)) for name in tensor_names(tmp_path / "merged")}
    assert None not in mapped and {"output.weight", "blk.1.attn_q.weight"} <= mapped
    assert names.get_name("base_model.model.lm_head.weight", try_suffixes=(".weight",)) is None  # control: PEFT's names
    special = gguf.SpecialVocab(tmp_path / "merged", load_merges=True)
    assert special.special_token_ids["eos"] == 2 and special.chat_template == CHAT_TEMPLATE


def test_bf16_is_the_default_and_rounds_each_weight_once(policy, tmp_path):
    source, folder = policy
    merge_adapter(folder, tmp_path / "merged")
    exact = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), folder).merge_and_unload()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert found.dtype == torch.bfloat16
    for name, weight in found.state_dict().items():
        expected = exact.state_dict()[name]
        assert ((weight.float() - expected).abs() <= expected.abs() * 2**-7 + 2**-12).all(), name


def test_the_error_of_a_merge_is_that_of_its_weights(base, tmp_path):
    """Against a loop in fp32; products in bf16, as a model in bf16 computes, would add a larger error."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=3e-3)
    model.save_pretrained(tmp_path / "adapter")
    ids = make_tokenizer()(PROBE, return_tensors="pt").input_ids
    half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).float()  # the base's weights, rounded
    plain, adapted = logits(half, ids), logits(PeftModel.from_pretrained(half, tmp_path / "adapter"), ids)
    error = merge_adapter(tmp_path / "adapter", tmp_path / "merged").error
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected = (logits(merged, ids) - adapted).norm() / (adapted - plain).norm()
    assert abs(error - expected.item()) < 1e-3 < error
    in_bf16 = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(in_bf16, ids) - adapted).norm() / (adapted - plain).norm() > 1.5 * error


def test_the_critic_is_named_as_left_out(policy, tmp_path):
    _, folder = policy
    result = merge_adapter(folder, tmp_path / "merged")
    assert result.left_out == ["value_head.safetensors"]
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert "value_head.safetensors" in card.text and not list((tmp_path / "merged").glob("value_head*"))
    assert card.data.library_name == "transformers" and card.data.base_model is None
    assert str(folder.parent) not in (tmp_path / "merged" / "README.md").read_text()


def test_a_merged_reward_model_keeps_its_score_head(base, reward_adapter, tmp_path):
    result = merge_adapter(reward_adapter, tmp_path / "merged", dtype="float32")
    adapted = PeftModel.from_pretrained(classifier(base), reward_adapter)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    close(logits(merged), logits(adapted))
    assert (logits(classifier(base, seed=3)) - logits(adapted)).abs().max() > 0.01  # control: an untrained head
    assert result.left_out == [] and result.architecture == "LlamaForSequenceClassification"


def run_block(folder, monkeypatch):
    """Run the Python of a merged model's card next to its folder, in which nothing of ppo_plus is imported."""
    monkeypatch.chdir(folder.parent)
    [block] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert "ppo_plus" not in block
    variables = {}
    exec(block, variables)
    return variables


def test_the_card_of_a_merged_policy_runs(policy, tmp_path, monkeypatch):
    merge_adapter(policy[1], tmp_path / "merged")
    pipe = run_block(tmp_path / "merged", monkeypatch)["pipe"]
    assert pipe.model.dtype == torch.bfloat16 and pipe.model.generation_config.max_new_tokens == 7
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert (
        len(re.findall("^# ", card.text, re.MULTILINE)) == 1
        and "PeftModel" not in card.text
        and "## Training" in card.text
    )
    assert card.data.model_name == "merged" and (tmp_path / "merged" / "curves.svg").is_file()


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
def test_the_card_of_a_merged_reward_model_scores(base, reward_adapter, tmp_path, monkeypatch, template):
    shutil.copytree(reward_adapter, tmp_path / "reward")
    make_tokenizer(template).save_pretrained(tmp_path / "reward")
    (tmp_path / "reward" / "reward_model.json").write_text('{"pad_token_id": 0}')
    merge_adapter(tmp_path / "reward", tmp_path / "merged", dtype="float32")
    variables = run_block(tmp_path / "merged", monkeypatch)
    batch = variables["pipe"]([variables["text"], "longer " * 5], batch_size=2, add_special_tokens=False)
    inputs = make_tokenizer()(variables["text"], return_tensors="pt", add_special_tokens=False)
    expected = logits(PeftModel.from_pretrained(classifier(base), reward_adapter), inputs.input_ids).item()
    assert abs(batch[0]["score"] - expected) < 1e-5  # next to a longer text: padding is not scored


def test_a_quantized_base_is_refused_before_its_weights_are_read(base, policy, tmp_path):
    _, folder = policy
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "quantized").mkdir()
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"bitsandbytes.*--base"):
        merge_adapter(folder, tmp_path / "merged", base=str(tmp_path / "quantized"))
    assert not (tmp_path / "merged").exists()


def test_another_base_no_adapter_and_a_folder_with_files_are_refused(base, policy, tmp_path):
    _, folder = policy
    make_model(hidden_size=16).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="does not fit"):
        merge_adapter(folder, tmp_path / "merged", base=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="adapter="):
        merge_adapter(base, tmp_path / "merged")
    with pytest.raises(ValueError, match="directory="):
        merge_adapter(folder, folder)


def test_an_adapter_that_rounding_loses_is_warned_of(base, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 1e-6)
    model.save_pretrained(tmp_path / "small")
    with pytest.warns(UserWarning, match="bfloat16"):
        assert merge_adapter(tmp_path / "small", tmp_path / "merged").error > 0.5
    assert merge_adapter(tmp_path / "small", tmp_path / "exact", dtype="float32").error < 0.5  # control


def test_the_template_of_peft_does_not_get_into_a_merged_model(base, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora())
    model.save_pretrained(tmp_path / "by_peft")
    assert "More Information Needed" in (tmp_path / "by_peft" / "README.md").read_text()
    merge_adapter(tmp_path / "by_peft", tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "More Information Needed" not in card and str(base) not in card and "convert_hf_to_gguf.py merged" in card


def test_an_adapter_without_effect_and_without_tokenizer(base, tmp_path):
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "new"
    )
    assert math.isnan(merge_adapter(tmp_path / "new", tmp_path / "merged").error)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token_id == 2

"""GGUF files that transformers would load without a part of what is in them are refused before weights are loaded."""

from __future__ import annotations

import pytest
import torch
from conftest import SIZES, lora
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ppo_plus import RewardConfig
from ppo_plus.models.loading import load_policy
from ppo_plus.reward_trainer import check_named_model

gguf = pytest.importorskip("gguf")

PLAIN, LINEAR = {"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}
FILE = {"gguf_file": "model.gguf"}


def write(folder, scaling, frequencies=None):
    """A tiny Qwen2 as a converter writes it; its configuration holds what the file has."""
    rope = {"rope_theta": 10_000.0, **scaling}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, rope_parameters=rope, initializer_range=0.3)).eval()
    config, writer = model.config, gguf.GGUFWriter(folder / "model.gguf", "qwen2")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if scaling is LINEAR:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    if frequencies is not None:
        writer.add_tensor(frequencies, torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize(
    ("scaling", "frequencies", "named"),
    [(LINEAR, None, "linear"), (PLAIN, "rope_freqs.weight", "rope_freqs.weight"), (PLAIN, None, None)],
    ids=["factor", "frequencies", "none"],
)
def test_a_file_whose_scaling_would_be_lost_is_refused(tmp_path, monkeypatch, scaling, frequencies, named):
    model, ids = write(tmp_path, scaling, frequencies), torch.arange(1, 33)[None]
    reward = RewardConfig(str(tmp_path / "out"), model_init_kwargs=FILE, report_to="none", use_cpu=True)
    if named is None:  # negative control
        policy = load_policy(str(tmp_path), peft_config=lora(), model_init_kwargs=FILE)
        assert (policy(ids).logits - model(ids).logits).abs().max() < 1e-5
        check_named_model(str(tmp_path), reward, is_fully_trained=False)
        return
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # refused before
    with pytest.raises(ValueError, match=f"'model.gguf' of .*scaled rotary positions .{named}.*gguf_file"):
        load_policy(str(tmp_path), peft_config=lora(), model_init_kwargs=FILE)
    with pytest.raises(ValueError, match=f"scaled rotary positions .{named}"):
        check_named_model(str(tmp_path), reward, is_fully_trained=False)


def test_a_configuration_with_the_scaling_is_the_way_to_load_it(tmp_path):
    model, ids = write(tmp_path, LINEAR), torch.arange(1, 33)[None]
    policy = load_policy(str(tmp_path), peft_config=lora(), model_init_kwargs={**FILE, "config": model.config})
    assert (policy(ids).logits - model(ids).logits).abs().max() < 1e-5

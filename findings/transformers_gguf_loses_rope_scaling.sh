#!/usr/bin/env bash
# transformers 5.24.0 with gguf 0.19.0: a GGUF file whose rotary positions are scaled, loaded by `gguf_file=`.
#
# Guess: the scaling is in the loaded configuration, like the base of the rotation; or an error says that it is not read.
# Seen: `rope.scaling.type` and `rope.scaling.factor` are left out (gpt-oss is the exception), so the model has unscaled
# positions and other logits. The log tells of it at level INFO alone. A file without scaling gives the same logits to the
# last bit, with tied embeddings too.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 gguf==0.19.0
cd "$work"
env/bin/python - <<'PYTHON'
import os

import gguf
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


def write(model, path):
    config, writer = model.config, gguf.GGUFWriter(path, "qwen2")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if "factor" in config.rope_parameters:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
)
ids = torch.arange(1, 33)[None]
seen = {}
for tied in (False, True):
    for scaling in ({"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}):
        torch.manual_seed(0)
        rope = {"rope_theta": 10_000.0, **scaling}
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, rope_parameters=rope, tie_word_embeddings=tied)).eval()
        os.makedirs("model", exist_ok=True)
        write(model, "model/model.gguf")
        loaded = Qwen2ForCausalLM.from_pretrained("model", gguf_file="model.gguf", dtype=torch.float32).eval()
        with torch.no_grad():
            apart = (loaded(ids).logits - model(ids).logits).abs().max().item()
        found = loaded.config.rope_parameters["rope_type"]
        seen[tied, scaling["rope_type"]] = (found, loaded.config.tie_word_embeddings, apart)
        print(f"tied {tied}, written {scaling['rope_type']}, loaded {found}: logits are {apart:.2g} apart")
for (tied, written), (found, loaded_tied, apart) in seen.items():
    assert found == "default" and loaded_tied == tied
    assert apart > 1 if written == "linear" else apart == 0
PYTHON

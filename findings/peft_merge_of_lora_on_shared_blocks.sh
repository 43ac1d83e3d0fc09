#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: LoRA on Zamba2, whose attention block is stored once and used by several layers.
#
# Guess: the layers that share a weight share its adapter; or each has its own and merging is refused.
# Seen: each layer gets an adapter of its own over one shared weight, which trains and reloads well. `merge_and_unload()`
# adds all of them to the one weight, without a word: with three layers on one block the merged model is off by most of
# what the adapters had changed (the distance printed is a share of their effect; 0 would be a right merge).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$work"
env/bin/python - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import Zamba2Config, Zamba2ForCausalLM


def distance(blocks):
    torch.manual_seed(0)
    config = Zamba2Config(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, attention_head_dim=32, hybrid_layer_ids=[1, 3, 5], num_mem_blocks=blocks,
        layers_block_type=["mamba", "hybrid"] * 3, mamba_d_state=8, n_mamba_heads=8, mamba_headdim=16, mamba_ngroups=1,
    )
    base = Zamba2ForCausalLM(config).eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        plain = base(ids).logits
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        adapted = model(ids).logits
        merged = model.merge_and_unload()(ids).logits
    return ((merged - adapted).norm() / (adapted - plain).norm()).item()


shared, apart = distance(blocks=1), distance(blocks=3)
print(f"one block for three layers {shared:.3f}, a block for each {apart:.6f}")
assert shared > 0.3 and apart < 1e-3
PYTHON

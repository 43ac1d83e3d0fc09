#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.24.0: a model after `disable_dropout_in_model`, which TRL trainers call for
# `disable_dropout=True`.
#
# Guess: in training mode it gives the same logits every time.
# Seen: only `nn.Dropout` modules are set to 0. Rates that a model hands to a functional dropout (`attention_dropout` of
# Llama and its many relatives, `residual_dropout` of Seed-OSS) stay, so two passes over the same tokens differ.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 trl==1.16.0
cd "$work"
env/bin/python - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, SeedOssConfig, SeedOssForCausalLM
from trl.trainer.utils import disable_dropout_in_model

sizes = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
llama = LlamaForCausalLM(LlamaConfig(**sizes, attention_dropout=0.5))
seed = SeedOssForCausalLM(SeedOssConfig(**sizes, head_dim=8, residual_dropout=0.5, attention_dropout=0.0))
control = LlamaForCausalLM(LlamaConfig(**sizes, attention_dropout=0.0))
ids = torch.arange(1, 9)[None]
apart = []
for model in (llama, seed, control):
    disable_dropout_in_model(model.train())
    with torch.no_grad():
        apart.append((model(ids).logits - model(ids).logits).abs().max().item())
print(dict(zip(("attention_dropout", "residual_dropout", "no dropout"), apart)))
assert apart[0] > 1e-3 and apart[1] > 1e-3 and apart[2] == 0
PYTHON

#!/usr/bin/env bash
# transformers 5.24.0 with peft 0.21.2, the newest of both on 2026-11-29: adapters by transformers' own methods.
#
# Guess: `model.add_adapter(LoraConfig(...))` works with the newest PEFT, as `from_pretrained` of an adapter does.
# Seen: `from_pretrained` takes the folder; `add_adapter` raises, since it wants PEFT 0.22.0 or newer, which is not
# released. `peft.get_peft_model` is the way that works with both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$work"
env/bin/python - <<'PYTHON'
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
lora = LoraConfig(r=2, target_modules=["q_proj"])
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("base")
get_peft_model(LlamaForCausalLM.from_pretrained("base"), lora).save_pretrained("adapter")

print("from_pretrained of the adapter:", type(AutoModelForCausalLM.from_pretrained("adapter")).__name__)
try:
    LlamaForCausalLM.from_pretrained("base").add_adapter(lora)
except ValueError as error:
    print("add_adapter:", error)
    assert "0.22.0" in str(error)
else:
    raise SystemExit("add_adapter works now")
PYTHON

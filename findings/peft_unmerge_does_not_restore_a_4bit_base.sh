#!/usr/bin/env bash
# peft 0.21.2 with bitsandbytes 0.50.2: `merge_adapter()` and `unmerge_adapter()` on a 4-bit base.
#
# Guess: after both the base is as before, up to rounding, as in fp32, so that `disable_adapter()` gives the reference.
# Seen: both round the whole weight to 4 bits, and the second rounding does not undo the first: with the adapter off, the
# outputs have moved by half to all of what the adapter changes (2e-7 in fp32, 3 % in 8 bits). The warning tells of
# other generations with the merged adapter, and is not about the base, which later adapters are trained on.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 bitsandbytes==0.50.2
cd "$work"
env/bin/python - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("base")
ids = torch.arange(1, 9)[None]
four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@torch.no_grad()
def moved(**options):
    base = LlamaForCausalLM.from_pretrained("base", dtype=torch.float32, **options)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    adapted = model(ids).logits
    with model.disable_adapter():
        before = model(ids).logits
    model.merge_adapter()
    model.unmerge_adapter()
    with model.disable_adapter():
        after = model(ids).logits
    return ((after - before).norm() / (adapted - before).norm()).item()


fp32, nf4 = moved(), moved(quantization_config=four_bits)
print(f"the base has moved, as a share of the adapter's effect: fp32 {fp32:.1e}, NF4 {nf4:.2f}")
assert fp32 < 1e-5 and nf4 > 0.2
PYTHON

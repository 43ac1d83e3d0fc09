#!/usr/bin/env bash
# peft 0.21.2: a DoRA adapter that is added while another adapter is merged into the base.
#
# Guess: a new adapter begins as the identity, whatever is merged at that moment (LoRA does, DoRA on a clean base does).
# Seen: DoRA takes its magnitudes from the weights as they are then, with the other adapter in them. Once that one is
# unmerged, the untrained new adapter already changes the model. The warnings are about merging, none is about this.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$work"
env/bin/python - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def effect_of_a_new_adapter(merge_first, **kind):
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), LoraConfig(r=4, target_modules=["q_proj"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    if merge_first:
        model.merge_adapter()
    model.add_adapter("new", LoraConfig(r=4, target_modules=["q_proj"], **kind))
    if merge_first:
        model.unmerge_adapter()
    model.set_adapter("new")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        new = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
    return (new - base).abs().max().item()


seen = {
    "LoRA, other merged": effect_of_a_new_adapter(True),
    "DoRA, clean base": effect_of_a_new_adapter(False, use_dora=True),
    "DoRA, other merged": effect_of_a_new_adapter(True, use_dora=True),
}
print(seen)
lora, clean, merged = seen.values()
assert lora < 1e-5 and clean < 1e-5 and merged > 1e-3
PYTHON

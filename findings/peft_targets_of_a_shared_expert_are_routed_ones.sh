#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: LoRA on the shared expert of Qwen3-Next, named by its modules.
#
# Guess: `target_modules=["shared_expert.gate_proj", ...]` adapts the shared expert, and `["gate_proj", "up_proj",
# "down_proj"]` also the layers without experts; routed experts are one tensor, which needs `target_parameters`.
# Seen: for families in which experts were modules before transformers 5, PEFT takes every name that ends so for a routed
# expert. Both lists adapt the routed experts alone; the shared expert and the dense layer get no adapter, not even with
# "all-linear", without a word. Qwen2-MoE, whose experts changed in the same way, is left alone, and its lists do as they say.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$work"
env/bin/python - <<'PYTHON'
from peft import LoraConfig, get_peft_model
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

sizes = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, mlp_only_layers=[0],
)
names = ["gate_proj", "up_proj", "down_proj"]
shared = [f"shared_expert.{name}" for name in names]


def adapted(model, targets):
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    places = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    parts = ("shared_expert.", "mlp.experts", "layers.0.mlp")
    return [part for part in parts if any(part in f"{place}." for place in places)]


seen = {}
for targets in (shared, names, "all-linear"):
    next_model = Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, head_dim=8, layer_types=["full_attention"] * 2))
    seen[str(targets)] = [adapted(next_model, targets), adapted(Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes)), targets)]
    print(f"{targets}: Qwen3-Next {seen[str(targets)][0]}, Qwen2-MoE {seen[str(targets)][1]}")
assert [next_model for next_model, _ in seen.values()] == [["mlp.experts"]] * 3
assert [qwen2 for _, qwen2 in seen.values()] == [["shared_expert."], *[["shared_expert.", "layers.0.mlp"]] * 2]
PYTHON

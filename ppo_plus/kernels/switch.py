"""One switch for what replaces other libraries' forwards: `use_ppo_plus_kernels=False`, or `PPO_PLUS_KERNELS=0`.

Behind it are LoRA, RMSNorm, CPU attention, passes without padding and fp32 score heads. Each module's docstring has the
figure that earns its place, from `benchmarks/kernel_speed.py`. LoRA, RMSNorm and packing save bytes on every device;
what was measured on CPUs alone and only saves time, attention as plain products, stays on CPUs. With the switch off a
run computes the same up to rounding (a classifier in half precision rounds its scores to that precision). The
frozen-layer cache has a switch of its own, `cache_frozen_layers`, because it skips work and replaces no arithmetic, and
Liger's kernels have `use_liger_kernel`.
"""

from __future__ import annotations

from accelerate.utils import parse_flag_from_env
from torch import nn

from .lora import patch_lora_forward
from .rmsnorm import patch_rmsnorm

VARIABLE = "PPO_PLUS_KERNELS"


def kernels_enabled(requested: bool = True) -> bool:
    """Combine a configuration's `use_ppo_plus_kernels` with the environment; each can turn the kernels off."""
    return requested and parse_flag_from_env(VARIABLE, True)


def replace_forwards(model: nn.Module, enabled: bool) -> None:
    """Give LoRA layers and RMSNorms of a model the kernels' forwards, where the kernels are enabled."""
    keep_trainable_4bit_layout(model)
    if enabled:
        patch_lora_forward(model)
        patch_rmsnorm(model)


def keep_trainable_4bit_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first evaluation, on CPUs with AVX512-BF16.

    The kernel for repacked weights has no backward pass: every gradient after the evaluation would be wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False

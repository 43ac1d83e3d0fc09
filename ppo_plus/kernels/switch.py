"""One switch for all kernels: `use_ppo_plus_kernels=False`, or `PPO_PLUS_KERNELS=0`.

It controls LoRA, RMSNorm, CPU attention, packing and fp32 score heads. Each module's docstring has its measured gain
from `benchmarks/kernel_speed.py`. LoRA, RMSNorm and packing save bytes on every device; attention as plain products
only saves time and was measured on CPUs alone, so it stays on CPUs. With the switch off a run computes the same up to
rounding (a classifier in half precision rounds its scores to that precision). The frozen-layer cache skips work and
replaces no arithmetic, so it has its own switch, `cache_frozen_layers`; Liger's kernels have `use_liger_kernel`.
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
    """Patch LoRA layers and RMSNorms of a model with the kernels' forwards, if the kernels are enabled."""
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

"""Hold trained weights in fp32, also if the frozen ones are in half precision.

bf16 has 8 significant bits, so an update of less than 1/512 of a weight is rounded away, and at the learning rates of
fine-tuning most updates are smaller. fp16 has 11, and `torch.amp.GradScaler` refuses gradients in it.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

HALF = (torch.bfloat16, torch.float16)
MIN_SLOW_WEIGHTS = 20_000_000  # smaller models take no time in either precision


def trains_in_half(model: nn.Module) -> bool:
    """Return whether any trained weight is in half precision."""
    return any(parameter.requires_grad and parameter.dtype in HALF for parameter in model.parameters())


def hold_trained_in_fp32(model: nn.Module) -> None:
    """Cast trained weights to fp32 in place: those of adapters, or of a model without adapters all."""
    if not trains_in_half(model):
        return
    if not isinstance(model, PeftModel):
        model.float()
        return
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and trains_in_half(module):
            ends = module is embeddings[1] or name.rpartition(".")[2] in ("score", "classifier")
            for trained_copy in module.modules_to_save.values():
                _let_dtypes_differ(trained_copy.float(), None if ends else module.original_module)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in HALF:
            parameter.data = parameter.data.float()


def _let_dtypes_differ(trained_copy: nn.Module, original: nn.Module | None) -> None:
    """Cast the inputs of a module's fp32 copy to fp32, and its outputs to the original's dtype, if any."""

    def to_fp32(_: nn.Module, inputs: tuple) -> tuple:
        return tuple(each.float() if isinstance(each, Tensor) and each.dtype in HALF else each for each in inputs)

    trained_copy.register_forward_pre_hook(to_fp32)
    dtype = None if original is None else next((p.dtype for p in original.parameters() if p.dtype in HALF), None)
    if dtype is not None:
        trained_copy.register_forward_hook(lambda _, inputs, output: output.to(dtype))


def multiplies_bf16_in_software() -> bool:
    """Return whether this CPU is an x86 one without instructions for bf16."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return known.get("architecture") == "x86_64" and not (known.get("amx_bf16") or known.get("avx512_bf16"))


def warn_of_slow_half_precision(model: PreTrainedModel, autocast: bool) -> None:
    """Warn if a large model multiplies in half precision on a CPU without instructions for it.

    Measured (torch 2.13, AVX2, layers of SmolLM2-135M, one core): bf16 takes 4.7 to 12 times the time of fp32 from 8
    rows on, fp16 4 to 7 times.

    Args:
        model: policy or reward model.
        autocast: whether it runs under bf16 autocast.
    """
    if model.device.type != "cpu" or not multiplies_bf16_in_software():
        return
    layers = (m for m in model.modules() if hasattr(m, "compute_dtype") and hasattr(m.weight, "quant_state"))
    quantized = sum(math.prod(m.weight.quant_state.shape) for m in layers if autocast or m.compute_dtype in HALF)
    others = sum(p.numel() for p in model.parameters() if p.dtype in HALF or (autocast and p.dtype == torch.float32))
    if quantized + others < MIN_SLOW_WEIGHTS:
        return
    fix = "bnb_4bit_compute_dtype=torch.float32" if quantized else 'model_init_kwargs={"dtype": "float32"}'
    warnings.warn(
        f"{type(model).__name__} multiplies in half precision, for which this CPU has no instructions: that takes "
        f"several times the time of float32. Set {'bf16=False' if autocast else fix}.",
        stacklevel=3,
    )


def check_trained_dtype(dtype: Any, fp16: bool, learning_rate: float) -> None:
    """Refuse or warn of training a whole model in half precision.

    Args:
        dtype: dtype in `model_init_kwargs`, a `torch.dtype` or its name; None is fp32.
        fp16: whether gradients are scaled.
        learning_rate: learning rate of the trained weights.
    """
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype not in HALF:
        return
    name = str(dtype).removeprefix("torch.")
    fix = "Leave dtype out of model_init_kwargs, to train in float32, or train an adapter (peft_config)."
    if fp16 and dtype == torch.float16:
        raise ValueError(f"All weights are trained in {name}, whose gradients fp16=True cannot unscale. {fix}")
    warnings.warn(
        f"All weights are trained in {name}: at learning_rate={learning_rate:g} most updates are smaller than its "
        f"rounding, so most weights never change. {fix}",
        stacklevel=3,
    )

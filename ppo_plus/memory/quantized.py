"""Models of quantized linear layers, whose own kernels need a GPU."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..models.actor_critic import ActorCritic


class QuantizedLinear(nn.Module):
    """The bytes of a linear layer of bitsandbytes 0.50, and those that its forward and backward pass allocate.

    NF4 with double quantization (Dettmers et al. 2023, section 3) keeps half a byte per weight, one byte of scale
    per block of 64, and an fp32 scale per 256 of those; the kernels for more than a few tokens dequantize the whole
    weight first. LLM.int8 keeps a byte per weight and an fp32 scale per row, and the input for the backward pass.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: str) -> None:
        super().__init__()
        n, self.kind, self.shape, device = weight.numel(), kind, weight.shape, weight.device
        blocks = -(-n // 64)
        buffers = {
            "nf4": {"weight": (-(-n // 2), torch.uint8), "absmax": (blocks, torch.uint8),
                    "absmax2": (-(-blocks // 256), torch.float32), "codes": (16 + 256 + 1, torch.float32)},
            "int8": {"weight": (n, torch.int8), "absmax": (weight.shape[0], torch.float32)},
        }[kind]  # fmt: skip
        for name, (size, dtype) in buffers.items():
            self.register_buffer(name, torch.empty(size, dtype=dtype, device=device), persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Allocate as the layer does, `(..., in)` to `(..., out)`."""
        return cast(Tensor, _Dequantized.apply(x, self.weight, self.shape, self.bias, self.kind))


class _Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: torch.Size, bias: Tensor | None, kind: str) -> Tensor:
        ctx.shape = shape
        if kind == "int8":
            ctx.save_for_backward(x)
            _temporaries = x.to(torch.float16), x.new_empty(x.shape, dtype=torch.int8)
            return x.new_empty(*x.shape[:-1], shape[0])
        return nn.functional.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ grad.new_empty(ctx.shape), None, None, None, None


def quantize(actor: ActorCritic, kind: str) -> None:
    """Replace the base of every LoRA layer; bitsandbytes does not quantize the output head."""
    for layer in actor.modules():
        if isinstance(layer, LoraLayer):
            linear = layer.base_layer
            # GPT-2's layers have transposed weights, which bitsandbytes transposes back.
            weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
            layer.base_layer = QuantizedLinear(weight, linear.bias, kind)

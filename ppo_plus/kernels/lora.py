"""Plain LoRA in two thin matrix products, instead of PEFT's general forward pass.

PEFT computes `result + lora_B(lora_A(dropout(x))) * scaling` as four operations on whole activations, and keeps an
fp32 copy of `x` for the backward pass if the adapter is fp32. Here the update is added to the base layer's output by
one fused product, in place if the base is a frozen `nn.Linear`, and the backward pass keeps `x` in its own dtype.
Weights, names and files stay PEFT's; all other kinds (dropout, DoRA, a bias, merged, mixed batches) use PEFT's code.

Measured (benchmarks/kernel_speed.py, bf16, a CPU with AVX512): PEFT's forward takes 1.23 times the time to learn, 1.15
to score, 1.30 to decode, and 1.39 times the activations to learn. The tensors are the same on every device.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

try:  # only there where bitsandbytes is installed
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

    _KINDS: tuple[type, ...] = (LoraLinear, Linear4bit, Linear8bitLt)
except ImportError:
    _KINDS = (LoraLinear,)


# Up to this number of rows, fp32 products with A and B are faster on a CPU: oneDNN's bf16 setup cost dominates.
MAX_FP32_ROWS = 64


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Return the dtype of autocast on this kind of device; None if autocast is off."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Turn autocast off in the backward pass of an autograd function, which computes in the dtypes it has saved.

    Autocast casts `mm` but no in-place product, so their operands would have different dtypes.
    """

    @functools.wraps(backward)
    def explicit(ctx: Any, grad: Tensor) -> Any:
        kind = grad.device.type
        if autocast_dtype(kind) is None:
            return backward(ctx, grad)
        with torch.autocast(kind, enabled=False):
            return backward(ctx, grad)

    return explicit


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `x W^T + bias` of `(rows, K)`; not differentiable."""
    return x.mm(weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


class _LoRAAdd(torch.autograd.Function):
    """`base + scaling * (x A^T) B^T` (Hu et al. 2021, eq. 3).

    The two thin products are computed in autocast's dtype where autocast is on, as PEFT's are, else in the dtype of
    `base`; the sum has the dtype of `base`.
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        dtype = autocast_dtype(x.device.type) or base.dtype
        low_a, low_b = a.to(dtype), b.to(dtype)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        xa = flat.mm(low_a.t())
        # A new tensor, because Falcon adds to the result in place, which autograd does not allow for a view.
        result = torch.empty_like(base, memory_format=torch.contiguous_format)
        flat_base, flat_result = base.reshape(-1, base.shape[-1]), result.view(-1, base.shape[-1])
        if dtype == base.dtype:
            torch.addmm(flat_base, xa, low_b.t(), alpha=scaling, out=flat_result)
        else:  # autocast casts no operator with `out=`
            torch.add(flat_base, xa.mm(low_b.t()), alpha=scaling, out=flat_result)
        ctx.save_for_backward(flat, xa, low_a, low_b)
        ctx.scaling, ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = scaling, x.shape, x.dtype, a.dtype
        return result

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, a, b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1]).to(b.dtype)
        grad_xa = flat.mm(b) * ctx.scaling
        grad_x = grad_xa.mm(a).view(ctx.x_shape).to(ctx.x_dtype) if ctx.needs_input_grad[1] else None
        grad_a = grad_xa.t().mm(x).to(ctx.weight_dtype) if ctx.needs_input_grad[2] else None
        grad_b = (flat.t().mm(xa) * ctx.scaling).to(ctx.weight_dtype) if ctx.needs_input_grad[3] else None
        return grad, grad_x, grad_a, grad_b, None


class _LoRALinear(torch.autograd.Function):
    """`x W^T + bias + scaling * (x A^T) B^T` with frozen `W` and bias; sums and gradients in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        low_a, low_b = a.to(weight.dtype), b.to(weight.dtype)
        flat = x.reshape(-1, x.shape[-1])
        xa = flat.mm(low_a.t())
        result = _affine(flat, weight, bias).addmm_(xa, low_b.t(), alpha=scaling)
        ctx.save_for_backward(flat, xa, weight, low_a, low_b)
        ctx.scaling, ctx.x_shape, ctx.adapter_dtype = scaling, x.shape, a.dtype
        # Not `view`: Gemma 3n changes the result in place, which autograd does not allow for a function's view.
        return torch.ops.aten._unsafe_view(result, [*x.shape[:-1], result.shape[-1]])

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, weight, a, b = ctx.saved_tensors
        flat, dtype = grad.reshape(-1, grad.shape[-1]), ctx.adapter_dtype
        grad_xa = flat.mm(b).mul_(ctx.scaling)
        grad_x = flat.mm(weight).addmm_(grad_xa, a).view(ctx.x_shape) if ctx.needs_input_grad[0] else None
        grad_a = grad_xa.t().mm(x).to(dtype) if ctx.needs_input_grad[3] else None
        grad_b = flat.t().mm(xa).mul_(ctx.scaling).to(dtype) if ctx.needs_input_grad[4] else None
        return grad_x, None, None, grad_a, grad_b, None


def _is_frozen_linear(layer: Any, x: Tensor) -> bool:
    """Return whether a layer is a plain linear layer with frozen weights that computes in their dtype."""
    if type(layer) is not nn.Linear:
        return False
    weight, bias = layer.weight, layer.bias
    return (
        (autocast_dtype(x.device.type) or x.dtype) == weight.dtype
        and not weight.requires_grad
        and (bias is None or (bias.dtype == weight.dtype and not bias.requires_grad))
    )


@contextlib.contextmanager
def cached_lora_weights(model: nn.Module) -> Iterator[None]:
    """Context manager for decoding: cache each layer's LoRA matrices in the compute dtype, without gradients.

    Adapters must not change inside. Without the cache, each of hundreds of decode steps would cast them again.
    """
    layers: list[Any] = [module for module in model.modules() if "_cached_weights" in vars(module)]
    with torch.no_grad():
        try:
            for layer in layers:
                layer._cached_weights = {}
            yield
        finally:
            for layer in layers:
                layer._cached_weights = None


def _low_rank(layer: Any) -> list[tuple[Tensor, Tensor, float]] | None:
    """Return A, B and scaling of each active adapter; None if one of them is no plain LoRA."""
    if layer.merged:
        return None
    if layer.disable_adapters:
        return []
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not all(_is_vanilla_lora(layer, name) for name in names):
        return None
    return [(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in names]


def _is_vanilla_lora(layer: Any, name: str) -> bool:
    return (
        name not in layer.lora_variant
        and type(layer.lora_dropout[name]) is nn.Identity
        and getattr(layer.lora_B[name], "bias", None) is None
    )


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    if layer._cached_weights is not None:
        return _forward_cached(layer, x)
    added, base = _low_rank(layer), layer.base_layer
    if added is None:
        return type(layer).forward(layer, x)
    if len(added) == 1 and _is_frozen_linear(base, x):
        # CUDA's autocast computes layer norms in fp32, so `x` may be in fp32 and the weights in half precision.
        return _LoRALinear.apply(x.to(base.weight.dtype), base.weight, base.bias, *added[0])
    if not added and _is_frozen_linear(base, x) and not torch.is_grad_enabled():
        flat = x.reshape(-1, x.shape[-1]).to(base.weight.dtype)
        return _affine(flat, base.weight, base.bias).view(*x.shape[:-1], -1)
    result = base(x)
    for a, b, scaling in added:
        result = _LoRAAdd.apply(result, x, a, b, scaling)
    return result


def _forward_cached(layer: Any, x: Tensor) -> Tensor:
    names = None if layer.disable_adapters else tuple(layer.active_adapters)
    if names not in layer._cached_weights:
        layer._cached_weights[names] = _low_rank(layer)
    added = layer._cached_weights[names]
    if added is None:
        return type(layer).forward(layer, x)
    result = layer.base_layer(x)
    if not added:
        return result
    flat, rows = x.reshape(-1, x.shape[-1]), result.reshape(-1, result.shape[-1])
    autocast = autocast_dtype(x.device.type)
    few = autocast is None and len(rows) <= MAX_FP32_ROWS and x.device.type == "cpu" and result.dtype != torch.float32
    dtype = torch.float32 if few else autocast or result.dtype
    if (names, dtype) not in layer._cached_weights:
        cast = [(a.to(dtype).t(), b.to(dtype).t(), scaling) for a, b, scaling in added]
        layer._cached_weights[names, dtype] = [(a, b * scaling, 1.0) for a, b, scaling in cast] if few else cast
    for a, b, scaling in layer._cached_weights[names, dtype]:
        xa = flat.to(dtype).mm(a)
        if few:
            rows.add_(xa.mm(b).to(rows.dtype))
        elif dtype == rows.dtype:
            rows.addmm_(xa, b, alpha=scaling)
        else:
            rows.add_(xa.mm(b), alpha=scaling)
    return rows.view(result.shape)


def patch_lora_forward(model: nn.Module) -> None:
    """Give every LoRA linear layer of a PEFT model the forward pass of this module."""
    for module in model.modules():
        if type(module) in _KINDS:
            vars(module)["_cached_weights"] = None
            module.forward = types.MethodType(_forward, module)

"""Score heads in fp32: in half precision, different texts get the same reward.

bf16 has 8 bits, so between 2 and 4 its numbers are 1/64 apart. The product with the head averages out the rounding of
single hidden states, but not the rounding of its result. So heads are computed in fp32 with autocast off, over hidden
states in their own dtype.

Measured (benchmarks/kernel_speed.py): of 1,000 texts, 1,000 have a score of their own with an fp32 head and 677 with a
bf16 one.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn


def apply_head(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a linear score head in fp32: `(..., H)` to `(..., labels)` float32, reward units.

    Args:
        hidden: hidden states of any floating dtype.
        weight: `(labels, H)`.
        bias: `(labels,)`.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


def compute_heads_in_fp32(model: nn.Module) -> None:
    """Make the layers of a sequence classifier above its backbone compute in fp32.

    Parameters keep their dtype: they are cast in each forward pass, and gradients flow through the cast.
    """
    for layer in _head_layers(model):
        layer.forward = types.MethodType(_forward_in_fp32, layer)


def _forward_in_fp32(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    twin = copy.copy(layer)
    twin._parameters = {name: None if p is None else p.float() for name, p in layer._parameters.items()}
    with torch.autocast(x.device.type, enabled=False):
        return type(layer).forward(twin, x.float(), *args, **kwargs)


def _head_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the leaf layers with floating-point parameters outside the backbone."""
    classifier = cast(nn.Module, model.get_base_model()) if isinstance(model, PeftModel) else model
    backbone = getattr(classifier, "base_model", None)
    if backbone is None or backbone is classifier:
        return
    inside = set(backbone.modules())
    for module in classifier.modules():
        params = [p for p in module._parameters.values() if p is not None]
        is_leaf = bool(params) and not any(module.children())
        if is_leaf and module not in inside and all(p.is_floating_point() for p in params):
            yield module

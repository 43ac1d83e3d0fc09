"""Refuse models with offloaded, NaN or infinite weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

OFFLOADED = ("cpu", "disk")
INSTEAD = (
    "Sampling would copy them to the device again for every token. Load the model in 4 bits (quantization_config), in "
    "bf16, or over several GPUs, with a device_map without 'cpu' and 'disk'."
)


def check_init_kwargs(init_kwargs: Mapping[str, Any] | None) -> None:
    """Refuse arguments of `from_pretrained` that cannot work: offloading, a missing accelerator, removed ones.

    Raises:
        ValueError: `device_map` offloads parts of the model or names an accelerator that this machine lacks;
            `load_in_8bit` or `load_in_4bit`, which transformers 5 no longer takes here.
    """
    kwargs = init_kwargs or {}
    for name in ("load_in_8bit", "load_in_4bit"):
        if name in kwargs:
            raise ValueError(
                f"model_init_kwargs: {name} is no argument of from_pretrained in transformers 5. Pass "
                f"quantization_config=BitsAndBytesConfig({name}=True)."
            )
    device_map = kwargs.get("device_map")
    places = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    on_accelerator = [place for place in places if _is_accelerator(place)]
    if on_accelerator and not torch.accelerator.is_available():
        raise ValueError(
            f"model_init_kwargs: device_map has the device {on_accelerator[0]!r}, and PyTorch finds no accelerator on "
            "this machine. Remove device_map, or install a PyTorch for the accelerator."
        )
    parts = offloaded_parts(device_map) if isinstance(device_map, Mapping) else []
    if parts:
        raise ValueError(f"model_init_kwargs: device_map offloads {', '.join(parts[:3])}. {INSTEAD}")


def check_model_weights(model: nn.Module, name: str) -> None:
    """Refuse a loaded model with weights that are offloaded, NaN or infinite; errors name the user's argument."""
    base = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    device_map = getattr(base, "hf_device_map", None) or {}
    parts = offloaded_parts(device_map)
    if parts and any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ValueError(f"{name}: device_map offloads {', '.join(parts[:3])}. {INSTEAD}")
    if parameter := first_not_finite(model):
        raise ValueError(
            f"{name}: the weight {parameter} has NaN or infinite numbers. The file is damaged, or was cast to a "
            "precision that its numbers exceed (fp16): load another checkpoint."
        )


def _is_accelerator(place: Any) -> bool:
    name = str(place).partition(":")[0]
    return name.isdecimal() or name in ("cuda", "xpu", "npu", "mlu", "hpu", "mps")


@contextlib.contextmanager
def explain_offloading() -> Iterator[None]:
    """Context manager: replace the errors of PEFT and accelerate at offloaded weights, which they cannot read."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if "meta tensor" not in str(error) and "meta device" not in str(error):
            raise
        raise ValueError(f"model: its device_map offloads parts of it. {INSTEAD}") from error


def offloaded_parts(device_map: Mapping[str, Any]) -> list[str]:
    """Return the parts of a model that hooks would load for each pass, as `module to device`.

    Parts on the CPU are offloaded only if others are on an accelerator.
    """
    places = {str(place) for place in device_map.values()}
    away = {"disk"} if places <= {*OFFLOADED} else {*OFFLOADED}
    return [f"{module or 'the model'} to {place}" for module, place in device_map.items() if str(place) in away]


def is_packed(parameter: nn.Parameter) -> bool:
    """Return whether the elements of a parameter are bytes that encode others: 4 or 8 bits, or a tensor subclass.

    bitsandbytes stores 4-bit weights in any dtype (`bnb_4bit_quant_storage`).
    """
    kinds = ("quant_state", "__tensor_flatten__")
    return not parameter.is_floating_point() or any(getattr(parameter, kind, None) is not None for kind in kinds)


@torch.no_grad()
def first_not_finite(model: nn.Module) -> str | None:
    """Return the name of the first parameter with NaN or infinite numbers; packed weights are skipped."""
    for name, parameter in model.named_parameters():
        if is_packed(parameter) or parameter.device.type == "meta":
            continue
        # A sum needs no tensor of that size, and is infinite or NaN if a number is, or if it exceeds fp32.
        if not parameter.sum(dtype=torch.float32).isfinite() and not parameter.isfinite().all():
            return name.removeprefix("base_model.model.").replace(".base_layer.", ".")  # as the file has it
    return None

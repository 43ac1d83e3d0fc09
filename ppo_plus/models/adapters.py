"""Switch between PEFT adapters on a shared base model, and set which of them are trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kernels.frozen_layers import num_leading_frozen_layers

REFERENCE_ADAPTER, CRITIC_ADAPTER = "ref", "critic"


@contextlib.contextmanager
def use_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Context manager: activate one adapter, or none; the previous one is restored, also after an error.

    PEFT's own switches also change `requires_grad` of all adapters; here only the two fields that its layers read are
    changed.
    """
    if name is not None and name not in cast(Any, model).peft_config:
        raise ValueError(f"There is no adapter {name!r} here, only {list(cast(Any, model).peft_config)}.")
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = layer._active_adapter if name is None else [name]
            # A layer for trainable tokens has only the adapters that train some.
            layer._disable_adapters = name is None or name not in getattr(layer, "trainable_tokens_delta", [name])
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def active_adapters(model: nn.Module) -> list[str]:
    """List the active adapters."""
    layer = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
    return [] if layer.disable_adapters else list(layer.active_adapters)


def active_adapter(model: nn.Module) -> str | None:
    """Return the active adapter; None if all are off."""
    return next(iter(active_adapters(model)), None)


def lora_scalings(model: nn.Module, adapter: str = "default") -> list[float]:
    """List the scalings (LoRA's alpha over r) of an adapter's layers, each number once."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    scalings = (getattr(layer, "scaling", {}) for layer in layers)
    return sorted({float(by_name[adapter]) for by_name in scalings if adapter in by_name})


@contextlib.contextmanager
def preserve_requires_grad(model: nn.Module) -> Iterator[None]:
    """Context manager: restore `requires_grad` of all parameters, which adding an adapter changes."""
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def is_adapter_parameter(parameter: str, adapter: str) -> bool:
    """Return whether a parameter of that name belongs to the adapter."""
    return adapter in parameter.split(".")


def is_critic_parameter(parameter: str) -> bool:
    """Return whether a parameter of that name belongs to the critic's adapter."""
    return is_adapter_parameter(parameter, CRITIC_ADAPTER)


def frozen_layers_and_users(model: PreTrainedModel) -> tuple[int, set[str | None]]:
    """Count the lowest frozen layers (never all), and name the adapters that share them (None: no adapter)."""

    def is_actor_parameter(name: str, parameter: nn.Parameter) -> bool:
        adapted = any(is_adapter_parameter(name, adapter) for adapter in ("default", REFERENCE_ADAPTER))
        return adapted or (parameter.requires_grad and not is_critic_parameter(name))

    frozen = num_leading_frozen_layers(model, is_actor_parameter)
    count = min(frozen, model.config.get_text_config().num_hidden_layers - 1)
    below_critic = num_leading_frozen_layers(model, lambda name, _: is_critic_parameter(name))
    return count, {None, "default", REFERENCE_ADAPTER} | ({CRITIC_ADAPTER} if below_critic >= count else set())


def set_adapter_trainable(model: nn.Module, adapter: str, trained: bool) -> None:
    """Set whether the weights of one adapter are trained."""
    for name, parameter in model.named_parameters():
        if is_adapter_parameter(name, adapter):
            parameter.requires_grad_(trained)


def train_adapter(model: nn.Module) -> None:
    """Train the active adapters of a model whose adapters were loaded frozen, as `PeftModel.from_pretrained` does."""
    if isinstance(model, PeftModel) and not any(parameter.requires_grad for parameter in model.parameters()):
        for adapter in active_adapters(model):
            set_adapter_trainable(model, adapter, True)


def copy_adapter_state_dict(model: nn.Module, adapter: str, other: str) -> dict[str, Tensor]:
    """Copy one adapter's weights under the names of another adapter of the same shape."""
    return {
        ".".join(other if part == adapter else part for part in name.split(".")): tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if is_adapter_parameter(name, adapter)
    }


def keep_model_card(model: nn.Module | None) -> None:
    """Let PEFT's `save_pretrained` leave `README.md` unchanged.

    PEFT writes an empty template there, with the path of the base, or adds that path to a card. The trainers write the
    card themselves.
    """
    if isinstance(model, PeftModel):
        model.create_or_update_model_card = _leave_model_card


def _leave_model_card(output_dir: str) -> None:
    """Write nothing; a function of the module, so that models can be copied and pickled."""

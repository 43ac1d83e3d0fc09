"""Adapters on one base: which of them speaks, and their weights on disk. What PEFT's own switches change in passing
(`requires_grad`, the state after an error) is put back here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .rollout import readable


@contextlib.contextmanager
def use_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """Make one adapter the active one inside the block, and put back what was active, also after an error.

    PEFT's `set_adapter` turns `requires_grad` on for the adapter it activates and off for the others; here
    nothing is trained that was not trained before.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    active = [(layer, layer.active_adapters) for layer in layers]
    with same_requires_grad(model):
        try:
            for layer in layers:
                layer.set_adapter([name], inference_mode=True)
            yield
        finally:
            for layer, names in active:
                layer.set_adapter(list(names))


@contextlib.contextmanager
def same_requires_grad(model: nn.Module) -> Iterator[None]:
    """Put back after the block what was trained before it; PEFT's switches turn on whole adapters."""
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def adapter_weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter on disk; PEFT would look for a missing file on the Hub."""
    file = directory / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"{directory} has no {file.name}: it holds no adapter, or was not finished.")
    with readable(file):
        return load_peft_weights(str(directory), device="cpu")


@contextlib.contextmanager
def fitting(what: str, fix: str) -> Iterator[None]:
    """Say in one sentence that tensors have other names or shapes than the model's."""
    try:
        yield
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise ValueError(f"{what} does not fit this model ({first[:200]}). {fix}") from error

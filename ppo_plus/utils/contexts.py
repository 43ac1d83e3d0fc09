"""Context managers that change an object inside a block, and restore it after the block, also after an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def set_attributes(target: Any, **values: Any) -> Iterator[None]:
    """Context manager: set attributes of an object or a module; those that it lacked are deleted after the block."""
    before = {name: getattr(target, name) for name in values if hasattr(target, name)}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name in values:
            setattr(target, name, before[name]) if name in before else delattr(target, name)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager: switch a model to evaluation, without dropout."""
    training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(training)

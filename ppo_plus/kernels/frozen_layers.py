"""Layers below the lowest adapter run once per rollout: they are frozen, and all roles share them.

With LoRA on the top layers alone (PEFT's `layers_to_transform`), actor, reference and critic differ only from the
lowest adapted layer upward. The input of that layer is computed once for each token of a rollout, and all roles and all
PPO epochs start from it.

To run only one part of the layers, the others are temporarily replaced by identity functions inside the backbone's own
`forward`, which still computes embeddings, masks, positions and all that differs between layers. A self-test decides
whether an architecture can be split like this; there is no list.

Measured (benchmarks/results/top_layers.json): with LoRA on the top 10 of 30 layers, scoring and learning take 1.43
times the time without it. It replaces no arithmetic, so its switch is `cache_frozen_layers` and not the kernels'.

Notation: B rows, L tokens, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Forward = Callable[..., Tensor]
# Instance attributes that override a module's forward: accelerate's hooks set the first, torch.compile the second.
CALL_ATTRIBUTES = ("forward", "_compiled_call_impl")


def decoder_layers(backbone: nn.Module) -> list[nn.Module]:
    """Return the layers of a decoder in the order in which they run; empty if they cannot be identified."""
    count = getattr(cast(Any, backbone).config.get_text_config(), "num_hidden_layers", None)
    stacks = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return list(stacks[0]) if stacks else []


def num_leading_frozen_layers(model: PreTrainedModel, is_trained: Callable[[str, nn.Parameter], bool]) -> int:
    """Count the lowest layers without trained parameters.

    Args:
        model: a causal language model, with adapters injected.
        is_trained: returns for a name and a parameter whether it is trained. Parameters outside the layers count as
            below all of them, like embeddings; the output head is above.
    """
    layers = decoder_layers(model.base_model)
    depth = {id(p): len(layers) for p in cast(nn.Module, model.get_output_embeddings()).parameters()}
    depth |= {id(p): 0 for p in cast(nn.Module, model.get_input_embeddings()).parameters()}  # may be the head, too
    depth |= {id(p): i for i, layer in enumerate(layers) for p in layer.parameters()}
    return min((depth.get(id(p), 0) for name, p in model.named_parameters() if is_trained(name, p)), default=0)


class FrozenPrefix:
    """A backbone that can stop before one of its layers, and start from that layer's input.

    Args:
        backbone: a decoder without its head.
        count: number of layers before the split; at least 1, and not all.
        forward: a pass over the backbone, from ids and mask, each `(B, L)`, to the last hidden states `(B, L, H)`;
            further arguments of `compute` are passed to it.

    Raises:
        ValueError: the two parts together give other numbers than the whole pass.
    """

    def __init__(self, backbone: nn.Module, count: int, forward: Forward) -> None:
        self._layers, self.count, self._forward = decoder_layers(backbone), count, forward
        self._identity: list[Callable[..., Any]] = [identity_layer] * len(self._layers)
        self._self_test(cast(Any, backbone).device)

    def compute(self, input_ids: Tensor, attention_mask: Tensor, *args: Any) -> Tensor:
        """Compute the input of the first layer after the split, `(B, L, H)`, in its dtype there."""
        states: list[Tensor] = []

        def keep(*args: Any, **kwargs: Any) -> Any:
            states.append(layer_input(*args, **kwargs))
            return self._identity[self.count](*args, **kwargs)

        above = [keep, *self._identity[self.count + 1 :]]
        with torch.no_grad(), replaced_forwards(self._layers[self.count :], above):
            self._forward(input_ids, attention_mask, *args)
        return states[0]

    @contextlib.contextmanager
    def override(self, states: Tensor) -> Iterator[None]:
        """Context manager: passes over the backbone start after the split, from these states, `(B, L, H)`."""
        last = self._identity[self.count - 1]
        below = [*self._identity[: self.count - 1], lambda *args, **kwargs: last(states)]
        with replaced_forwards(self._layers[: self.count], below):
            yield

    @torch.no_grad()
    def _self_test(self, device: torch.device) -> None:
        ids = torch.tensor([[1, 1, 1, 2, 3, 1], [3, 2, 1, 3, 1, 2]], device=device)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], device=device)

        def remember(index: int) -> Callable[..., None]:
            def hook(layer: nn.Module, args: Any, output: Any) -> None:
                self._identity[index] = (
                    identity_layer if isinstance(output, Tensor) else identity_tuple(len(output) - 1)
                )

            return hook

        hooks = [layer.register_forward_hook(remember(i)) for i, layer in enumerate(self._layers)]
        try:
            expected = self._forward(ids, mask)
        finally:
            for hook in hooks:
                hook.remove()
        try:
            with self.override(self.compute(ids, mask)):
                states = self._forward(ids, mask)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
            raise ValueError(f"its layers pass each other more than hidden states ({error})") from error
        if difference := relative_error(states, expected, mask):
            raise ValueError(f"a pass that starts at the hidden states of a layer differs by {difference:.1e}")


def relative_error(states: Tensor, expected: Tensor, mask: Tensor, half_tolerance: float = 2e-2) -> float:
    """Return the largest error of hidden states `(B, L, H)`, relative to the largest state; 0 if it is rounding.

    Args:
        states: hidden states to check.
        expected: their expected values.
        mask: 1 for real tokens; only these are compared.
        half_tolerance: largest error that is rounding in half precision.
    """
    error = float((states - expected)[mask.bool()].abs().max() / expected[mask.bool()].abs().max())
    return 0.0 if error < (1e-5 if expected.dtype == torch.float32 else half_tolerance) else error


def layer_input(*args: Any, **kwargs: Any) -> Tensor:
    """Return the hidden states among the arguments of a layer."""
    return args[0] if args else kwargs["hidden_states"]


identity_layer = layer_input


def identity_tuple(num_others: int) -> Callable[..., tuple]:
    """Return the identity for layers that return further values after the hidden states; these become None."""
    return lambda *args, **kwargs: (layer_input(*args, **kwargs), *[None] * num_others)


@contextlib.contextmanager
def replaced_forwards(layers: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Context manager: replace the forward of each layer, uncompiled; its other attributes stay."""
    before = [{name: vars(layer)[name] for name in CALL_ATTRIBUTES if name in vars(layer)} for layer in layers]
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            vars(layer).update(zip(CALL_ATTRIBUTES, (forward, None), strict=True))
        yield
    finally:
        for layer, attributes in zip(layers, before, strict=True):
            for name in CALL_ATTRIBUTES:
                vars(layer).pop(name, None)
            vars(layer).update(attributes)

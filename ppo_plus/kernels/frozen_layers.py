"""The layers below the lowest adapter: nobody trains them and every role shares them, so they run once per rollout.

With LoRA on the top layers alone (PEFT's `layers_to_transform`), actor, reference and critic differ only from the
lowest adapted layer upward. What enters that layer is computed once for each token of a rollout, and all roles and all
PPO epochs go on from there.

A pass that stops at that layer, or begins at it, is the backbone's own `forward` in which the layers on the other side
hand on what they are given: embeddings, masks, positions and what differs from layer to layer stay the backbone's
affair. Whether an architecture can be cut like that is tried out, not listed.

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
# What a module runs when it is called: a hook of accelerate puts a forward of its own there, torch.compile the other.
CALL_ATTRIBUTES = ("forward", "_compiled_call_impl")


def decoder_layers(backbone: nn.Module) -> list[nn.Module]:
    """The layers of a decoder in the order in which they run; none where they cannot be told."""
    count = cast(Any, backbone).config.get_text_config().num_hidden_layers
    stacks = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return list(stacks[0]) if stacks else []


def num_leading_frozen_layers(model: PreTrainedModel, counts: Callable[[str, nn.Parameter], bool]) -> int:
    """How many of the lowest layers have none of the parameters that count.

    Args:
        model: a causal language model, with adapters injected.
        counts: says of a name and a parameter whether it counts. One that is in no layer is taken to be below all of
            them, as embeddings are; the output head is above.
    """
    layers = decoder_layers(model.base_model)
    depth = {id(p): len(layers) for p in cast(nn.Module, model.get_output_embeddings()).parameters()}
    depth |= {id(p): 0 for p in cast(nn.Module, model.get_input_embeddings()).parameters()}  # may be the head, too
    depth |= {id(p): i for i, layer in enumerate(layers) for p in layer.parameters()}
    found = [depth.get(id(p), 0) for name, p in model.named_parameters() if counts(name, p)]
    return min(found, default=0)


class FrozenPrefix:
    """A backbone that can stop before one of its layers, and go on from there.

    Args:
        backbone: a decoder without its head.
        count: how many layers are below the one to stop at; at least 1, and not all.
        forward: a pass over the backbone, from ids and mask, each `(B, L)`, to the last hidden states `(B, L, H)`; what
            else it takes, `states` hands on to it.

    Raises:
        ValueError: going on from there gives other numbers than the pass as a whole.
    """

    def __init__(self, backbone: nn.Module, count: int, forward: Forward) -> None:
        self._layers, self.count, self._forward = decoder_layers(backbone), count, forward
        self._identity: list[Callable[..., Any]] = [identity_layer] * len(self._layers)
        self._try_out(cast(Any, backbone).device)

    def states(self, input_ids: Tensor, attention_mask: Tensor, *args: Any) -> Tensor:
        """What enters the lowest layer above, `(B, L, H)` in the dtype in which it gets there."""
        found: list[Tensor] = []

        def keep(*args: Any, **kwargs: Any) -> Any:
            found.append(entering(*args, **kwargs))
            return self._identity[self.count](*args, **kwargs)

        above = [keep, *self._identity[self.count + 1 :]]
        with torch.no_grad(), replaced_forwards(self._layers[self.count :], above):
            self._forward(input_ids, attention_mask, *args)
        return found[0]

    @contextlib.contextmanager
    def given(self, states: Tensor) -> Iterator[None]:
        """Inside, a pass over the backbone begins at the lowest layer above, with these states, `(B, L, H)`."""
        last = self._identity[self.count - 1]
        below = [*self._identity[: self.count - 1], lambda *args, **kwargs: last(states)]
        with replaced_forwards(self._layers[: self.count], below):
            yield

    @torch.no_grad()
    def _try_out(self, device: torch.device) -> None:
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
            with self.given(self.states(ids, mask)):
                found = self._forward(ids, mask)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
            raise ValueError(f"its layers hand on more than hidden states ({error})") from error
        if off := relative_error(found, expected, mask):
            raise ValueError(f"going on from the hidden states of a layer gives other numbers, by {off:.1e}")


def relative_error(found: Tensor, expected: Tensor, mask: Tensor, half: float = 2e-2) -> float:
    """How far hidden states `(B, L, H)` of real tokens are off, over the largest; 0 within their dtype's rounding.

    Args:
        found: what is looked at.
        expected: what it should be.
        mask: 1 for real tokens.
        half: what counts as rounding in half precision.
    """
    off = float((found - expected)[mask.bool()].abs().max() / expected[mask.bool()].abs().max())
    return 0.0 if off < (1e-5 if expected.dtype == torch.float32 else half) else off


def entering(*args: Any, **kwargs: Any) -> Tensor:
    """The hidden states among the arguments of a layer."""
    return args[0] if args else kwargs["hidden_states"]


def identity_layer(*args: Any, **kwargs: Any) -> Tensor:
    """What a layer that does nothing computes."""
    return entering(*args, **kwargs)


def identity_tuple(others: int) -> Callable[..., tuple]:
    """The same for layers that return so many other things beside hidden states."""
    return lambda *args, **kwargs: (entering(*args, **kwargs), *[None] * others)


@contextlib.contextmanager
def replaced_forwards(layers: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Inside, each layer computes what is given for it, uncompiled; what it knows about itself stays."""
    before = [{name: vars(layer)[name] for name in CALL_ATTRIBUTES if name in vars(layer)} for layer in layers]
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            vars(layer).update(zip(CALL_ATTRIBUTES, (forward, None), strict=True))
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            for name in CALL_ATTRIBUTES:
                vars(layer).pop(name, None)
            vars(layer).update(own)

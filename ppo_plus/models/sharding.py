"""Shard the frozen base of an adapter over ranks by FSDP2; trained weights stay whole on every rank under DDP.

A base is never trained, so it needs no gradient, optimizer state or checkpoint: sharding it divides the largest part
of the memory, and everything that training does with trained weights is what it does on one rank.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..kernels.batch_backoff import fixed_batch_sizes
from ..kernels.frozen_layers import decoder_layers
from .actor_critic import ActorCritic

# Nothing changes the outputs in place, of which it warns.
warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPActorCritic\) returned a view tensor")

# Methods of `ActorCritic` besides `forward` that run its backbone.
FORWARD_METHODS = ("sample", "frozen_hidden_states", "prefix_rewards", "generate")


def shard_frozen_weights(
    model: nn.Module, backbone: nn.Module, device: torch.device, whole: Sequence[nn.Module] = ()
) -> list[FSDPModule]:
    """Replace the frozen weights of a model by this rank's share of them.

    Args:
        model: the model that is called, with all its adapters.
        backbone: its decoder or encoder. Each layer is a unit that is gathered for a pass and freed after it;
            embeddings, last norm and head are another.
        device: of this rank.
        whole: modules that stay whole on every rank, besides trained weights.

    Returns:
        the units: layers in their order, then the rest.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    kept = {p for p in model.parameters() if p.requires_grad} | {p for each in whole for p in each.parameters()}
    int8_layers = _take_int8_states(model)
    units = [
        cast(FSDPModule, fully_shard(module, mesh=mesh, ignored_params=kept, reshard_after_forward=True))
        for module in (*decoder_layers(backbone), model)
    ]
    # DDP neither broadcasts nor averages the sharded weights.
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)
    with _gathered(units):
        for layer in int8_layers:  # the gathered weight keeps its storage, which is filled again for each pass
            layer.weight.CB, layer.state.CB = None, layer.weight.data
    return units


class ShardedBase:
    """The frozen weights of an actor-critic's language model, each rank holding its share of every layer.

    A separate critic or reference stays whole on every rank.

    Args:
        model: the actor-critic, with all its adapters.
        device: of this rank.
        gather_all: whether `uneven_passes` gathers the base once, or layer by layer in every pass.
    """

    def __init__(self, model: ActorCritic, device: torch.device, gather_all: bool = True) -> None:
        whole = [] if model.value_model is None else [model.value_model]
        *self._layers, self._rest = shard_frozen_weights(model, model.language_model.base_model, device, whole)
        for name in FORWARD_METHODS:
            register_fsdp_forward_method(model, name)
        vars(model)["generate"] = self._generate_unevenly(model.generate)
        self._device, self._gather_all, self._inside = device, gather_all, False

    @contextlib.contextmanager
    def uneven_passes(self) -> Iterator[None]:
        """Context manager that all ranks enter together: inside, each rank may run another number of passes."""
        if self._inside:
            yield
            return
        self._inside = True
        try:
            with _gathered([*self._layers, self._rest]) if self._gather_all else self._in_step():
                yield
        finally:
            self._inside = False

    @contextlib.contextmanager
    def _in_step(self) -> Iterator[None]:
        """Context manager: each pass gathers layer by layer; a rank that has finished gathers along with the others.

        Every pass calls all layers in their order, also those that it skips, so one pass is like another.
        """
        first = cast(nn.Module, self._layers[0])
        announce = first.register_forward_pre_hook(lambda *_: self._any_rank_runs(True), prepend=True)
        try:
            with _gathered([self._rest]), fixed_batch_sizes():
                yield
                while self._any_rank_runs(False):
                    for layer in self._layers:
                        layer.unshard()
                        layer.reshard()
        finally:
            announce.remove()

    def _any_rank_runs(self, runs: bool) -> Any:
        running = torch.tensor(float(runs), device=self._device)
        torch.distributed.all_reduce(running)
        return None if runs else bool(running)  # a hook must return None

    def _generate_unevenly(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            # transformers would keep ranks in step, also with a rank that generates nothing.
            with self.uneven_passes():
                return method(*args, **{"synced_gpus": False, **kwargs})

        return call


@contextlib.contextmanager
def _gathered(units: Sequence[FSDPModule]) -> Iterator[None]:
    """Context manager: hold the whole weights of these units, so that passes do not communicate for them."""
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


def _take_int8_states(model: nn.Module) -> list[Any]:
    """Return the 8-bit layers of bitsandbytes, after their scales have moved from the weight, which is replaced."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "init_8bit_state")]
    for layer in layers:
        if layer.weight.CB is not None:
            layer.init_8bit_state()
    return layers


def wrap_in_ddp(model: nn.Module, accelerator: Any) -> nn.Module:
    """Wrap a model with sharded weights, as accelerate wraps one without: it refuses `DTensor`s on a GPU."""
    prepared = accelerator.prepare_model(model, evaluation_mode=True)  # autocast
    return DistributedDataParallel(prepared, **accelerator.ddp_handler.to_kwargs())

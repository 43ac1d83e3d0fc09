"""An accelerator that needs no hardware, to find out where a tensor is left on the wrong device.

A tensor on the device `fake_device` is a shell around a CPU tensor that has its numbers. Operators are computed on
those, so the numbers are the CPU's. But the two kinds do not mix: an operator that is given both refuses, as on a GPU.
Allowed is what a GPU allows: copies from one to the other, a CPU tensor without dimensions as a scalar, and indices on
the CPU into a tensor that is not. Reading numbers as Python's works as on a GPU; `.numpy()` does not, nor do operators
for which CUDA has no deterministic algorithm, where that is asked for.

A backend cannot be taken back, so `set_up` is for separate processes (test_fake_device.py starts them). What a GPU does
otherwise is not emulated: kernels and their rounding, generators (random numbers are the CPU's), streams, memory.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "fake_device"
FLOAT64 = True  # whether the device has it; Apple's GPUs do not
COPIES = ("aten::copy_", "aten::_to_copy")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
JOINING = ("aten::cat", "aten::stack")  # take no scalars
# What CUDA has no deterministic algorithm for, by the documentation of `use_deterministic_algorithms`.
REFUSED = ("aten::nll_loss_forward", "aten::put_", "aten::histc", "aten::bincount", "aten::median")


class FakeDeviceTensor(Tensor):
    """A tensor on the device: the shell; `cpu_tensor` has its numbers."""

    cpu_tensor: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, cpu_tensor: Tensor) -> FakeDeviceTensor:
        if cpu_tensor.dtype == torch.float64 and not FLOAT64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        shell = torch.Tensor._make_wrapper_subclass(
            cls, cpu_tensor.shape, strides=cpu_tensor.stride(), storage_offset=cpu_tensor.storage_offset(),
            dtype=cpu_tensor.dtype, device=torch.device(NAME, 0),
        )  # fmt: skip
        shell.cpu_tensor = cpu_tensor
        return shell

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(function, args, kwargs or {})

    def __deepcopy__(self, memo: dict) -> Tensor:
        copied: Tensor = FakeDeviceTensor(copy.deepcopy(self.cpu_tensor.detach(), memo))
        is_parameter = isinstance(self, torch.nn.Parameter)
        return torch.nn.Parameter(copied, self.requires_grad) if is_parameter else copied

    def __repr__(self) -> str:
        return f"{NAME}: {self.cpu_tensor!r}"

    # What is asked of a tensor beside operators: numbers for Python, and which tensors are one in memory.

    def tolist(self) -> list:
        return self.detach().cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.cpu_tensor.untyped_storage()

    def data_ptr(self) -> int:
        return self.cpu_tensor.data_ptr()


def computed(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an operator makes of its arguments, on the device if they, or `device`, are there."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    remote = [tensor for tensor in tensors if isinstance(tensor, FakeDeviceTensor)]
    asked = kwargs.get("device")
    if not remote and not is_fake_device(asked):
        return function(*args, **kwargs)
    name = function._schema.name
    if left := left_behind(name, args, tensors):
        raise RuntimeError(
            f"{name} was given tensors of two devices: of shapes {[tuple(t.shape) for t in left]} on the "
            f"CPU, the others {NAME}"
        )
    fractions = name == "aten::cumsum" and (kwargs.get("dtype") or tensors[0].dtype).is_floating_point
    if torch.are_deterministic_algorithms_enabled() and (fractions or name in REFUSED):
        raise RuntimeError(f"{name} has no deterministic algorithm")

    def bare(leaf: Any) -> Any:
        if isinstance(leaf, FakeDeviceTensor):
            return leaf.cpu_tensor
        return torch.device("cpu") if is_fake_device(leaf) else leaf

    shells = {id(shell.cpu_tensor): shell for shell in remote}
    on_fake = (
        is_fake_device(asked) if asked is not None else name != "aten::copy_" or isinstance(args[0], FakeDeviceTensor)
    )

    def in_shell(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        # What was changed in place is the tensor that it was.
        return shells.get(id(leaf)) if id(leaf) in shells else FakeDeviceTensor(leaf) if on_fake else leaf

    found = function(*tree_map(bare, args), **tree_map(bare, kwargs))
    if any(shell.shape != shell.cpu_tensor.shape for shell in remote):
        raise NotImplementedError(f"{name} gave a tensor another size in place")
    return tree_map(in_shell, found)


def is_fake_device(device: Any) -> bool:
    """Whether this is the device, or its name."""
    return isinstance(device, torch.device | str) and str(device).split(":")[0] == NAME


def left_behind(name: str, args: tuple, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors on the CPU that an operator would refuse beside those on the fake device."""
    here = [tensor for tensor in tensors if not isinstance(tensor, FakeDeviceTensor)]
    if len(here) == len(tensors) or name in COPIES:
        return []
    if name in INDEXING and isinstance(args[0], FakeDeviceTensor):
        return [value for value in args[2:3] if any(value is t for t in here) and value.dim() > 0]
    return [tensor for tensor in here if tensor.dim() > 0 or name in JOINING or name in INDEXING]


class Operators(TorchDispatchMode):
    """For operators that make a tensor out of nothing."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(function, args, kwargs or {})


class Literals(TorchFunctionMode):
    """For tensors out of Python's numbers, which torch puts on a device without asking its dispatcher."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and is_fake_device(given.get("device")):
            device = given.pop("device")
            return function(*args, **given).to(device)
        return function(*args, **given)


class Module(backend_registration._DummyBackendModule):
    """`torch.fake_device`: what libraries ask of an accelerator."""

    generator = torch.Generator()

    def get_rng_state(self, device: Any = None) -> Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        self.generator.set_state(state)

    def manual_seed_all(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def set_device(self, device: Any) -> None:
        assert is_fake_device(device) or device == 0

    def synchronize(self, device: Any = None) -> None:
        """Everything is done at once."""

    def empty_cache(self) -> None:
        """There is none."""


def set_up() -> None:
    """Give this process the device, for good."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    torch.serialization.add_safe_globals([FakeDeviceTensor])


@contextlib.contextmanager
def fake_device() -> Iterator[torch.device]:
    """Inside, tensors can be made on the device."""
    with Operators(), Literals():
        yield torch.device(NAME, 0)

"""CUDA's autocast rules for tensors that are not on CUDA.

Autocast is a layer of torch's dispatcher, and each device type has its own lists of operators there: layer norm and
softmax are computed in fp32 on CUDA, and in the dtype of their input on a CPU. `set_up` gives another device type the
lists that the installed torch has for CUDA. The lists are read from torch's header
`ATen/autocast_mode.h`, so they are those of the torch that is tested.

The change lasts as long as the process, so a test that needs it starts a process of its own.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
LOWER, FP32, FP32_DTYPE, PROMOTE = "LOWER_PRECISION_FP", "FP32", "FP32_SET_OPT_DTYPE", "PROMOTE"
KEYS = {"cpu": "AutocastCPU", "privateuseone": "AutocastPrivateUse1"}
_libraries: list[torch.library.Library] = []


def lists() -> dict[str, list[str]]:
    """Read the operators of each of CUDA's autocast lists, as `name` or `name.overload`."""
    text = HEADER.read_text()
    found = {}
    for kind in (LOWER, FP32, FP32_DTYPE, PROMOTE):
        body = re.search(rf"#define AT_FORALL_{kind}\(_\)((?:.*\\\n)+.*\n)", text)
        entries = re.findall(r"_\((\w+)(?:, (\w+))?\)", body.group(1))
        found[kind] = [".".join(filter(None, entry)) for entry in entries]
    return found


def set_up(device_type: str) -> None:
    """Give a device type CUDA's autocast lists in place of its own, for good."""
    key, is_enabled = KEYS[device_type], torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda kind=None: is_enabled(kind or _public(device_type))  # without a kind: CUDA's
    library = torch.library.Library("aten", "IMPL", key)
    _libraries.append(library)  # its entries last as long as it does
    wanted = {f"aten::{name}": kind for kind, names in lists().items() for name in names}
    # `norm` has a signature of its own in the header; with fp32 inputs the result is the one that CUDA gives.
    wanted |= {"aten::norm.Scalar": FP32, "aten::norm.ScalarOpt_dim": FP32}
    own = [
        name
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    ]
    kernels = {name: torch.library.fallthrough_kernel for name in own if name not in wanted}
    for name, kind in wanted.items():
        overload = _overload(name)
        if overload is not None and not (kind == LOWER and name in own):  # there, torch has a cache of cast weights
            kernels[name] = _kernel(overload, kind, device_type, key)
    _look_into_no_other_library(key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an entry is overridden: on purpose
        for name, kernel in {**kernels, "aten::binary_cross_entropy": _refuse}.items():
            library.impl(name, kernel, allow_override=True)


def _look_into_no_other_library(key: str) -> None:
    """Hide autocast from the operators of bitsandbytes: on CUDA they are kernels, for CPUs some are made of torch's."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bitsandbytes::")]
    library = torch.library.Library("bitsandbytes", "FRAGMENT")
    _libraries.append(library)
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    for name in names:
        packet, _, overload = name.removeprefix("bitsandbytes::").partition(".")
        operator = getattr(getattr(torch.ops.bitsandbytes, packet), overload or "default")

        def kernel(*args: Any, operator: Any = operator, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(excluded), torch._C._DisableAutocast():
                return operator(*args, **kwargs)

        library.impl(name, kernel, key)


def _overload(name: str) -> Any:
    packet, _, overload = name.removeprefix("aten::").partition(".")
    found = getattr(torch.ops.aten, packet, None)  # the header also names operators of other builds
    overloads = () if found is None else found.overloads()
    return getattr(found, overload or "default") if (overload or "default") in overloads else None


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast.")


def _kernel(overload: Any, kind: str, device_type: str, key: str) -> Callable[..., Any]:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    takes_dtype = any(argument.name == "dtype" for argument in overload._schema.arguments)

    def is_eligible(leaf: Any) -> bool:
        own = isinstance(leaf, Tensor) and leaf.device.type in (device_type, torch._C._get_privateuse1_backend_name())
        return own and leaf.is_floating_point() and leaf.dtype != torch.float64

    def cast(leaf: Any, dtype: torch.dtype) -> Any:
        return leaf.to(dtype) if is_eligible(leaf) else leaf

    def dtype_of(leaves: list) -> torch.dtype:
        lower = torch.get_autocast_dtype(_public(device_type))
        if kind == LOWER:
            return lower
        wide = any(is_eligible(leaf) and leaf.dtype != lower for leaf in leaves)
        return torch.float32 if kind == FP32 or wide else lower

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            leaves = tree_leaves((args, kwargs))
            if kind != FP32_DTYPE:
                dtype = dtype_of(leaves)
                args, kwargs = tree_map(lambda leaf: cast(leaf, dtype), (args, kwargs))
            elif takes_dtype and is_eligible(args[0]) and not any(isinstance(leaf, torch.dtype) for leaf in leaves):
                kwargs = {**kwargs, "dtype": torch.float32}
            return overload(*args, **kwargs)

    return kernel


def _public(device_type: str) -> str:
    return torch._C._get_privateuse1_backend_name() if device_type == "privateuseone" else device_type

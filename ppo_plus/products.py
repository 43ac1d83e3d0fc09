"""Matrix products with frozen weights, on all the cores there are.

Of two cores with AMX, oneDNN (in torch 2.13) gives a product in bf16 only one where it has between one and two times
as many rows as columns: as many tokens as a micro-batch of PPO, and as many columns as a small model. Half the columns
are out of that range, and their products are the same bits. benchmarks/products.py shows where it begins and ends.
Without AMX both cores work, and halves would take longer.
"""

from __future__ import annotations

import torch
from torch import Tensor

AMX = bool(torch.cpu.get_capabilities().get("amx_bf16")) if hasattr(torch.cpu, "get_capabilities") else False
THREADS = 2
COLUMNS = 1024  # with as many, it depends on more than rows and columns
LEAST_SUMMED = 512  # of the numbers that a dot product sums up; with fewer, both cores work


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight + bias`; not differentiable.

    Args:
        x: `(rows, K)`.
        weight: `(K, columns)`, such as the transposed weight of a linear layer.
        bias: `(columns,)`.
    """
    columns = weight.shape[1]
    if not in_halves(x, columns):
        return x.mm(weight) if bias is None else torch.addmm(bias, x, weight)
    result = x.new_empty(len(x), columns)
    for half in (slice(columns // 2), slice(columns // 2, None)):
        if bias is None:
            torch.mm(x, weight[:, half], out=result[:, half])
        else:
            torch.addmm(bias[half], x, weight[:, half], out=result[:, half])
    return result


def in_halves(x: Tensor, columns: int) -> bool:
    """Whether half the columns at a time are faster than all at once."""
    if torch.compiler.is_compiling():  # asked first: a compiler would make a graph for each answer to the rest
        return False
    rows, summed = x.shape
    return (
        columns <= rows < 2 * columns
        and columns < COLUMNS
        and summed >= LEAST_SUMMED
        and x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and AMX
        and torch.get_num_threads() == THREADS
    )

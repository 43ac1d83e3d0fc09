"""The value head: hidden states to state values."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

VALUE_HEAD_FILE = "value_head.safetensors"


class ValueHead(nn.Module):
    """A scalar per hidden state, computed in fp32.

    The output layer starts at zero, so initial values are 0 and not noise. It has no activation, because values may be
    any real number.
    """

    def __init__(
        self, hidden_size: int, kind: Literal["linear", "mlp"] = "linear", activation: Literal["silu", "gelu"] = "silu"
    ) -> None:
        super().__init__()
        output = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)
        if kind == "linear":
            self.layers = nn.Sequential(output)
        else:
            between = {"silu": nn.SiLU, "gelu": nn.GELU}[activation]()
            self.layers = nn.Sequential(nn.Linear(hidden_size, hidden_size, dtype=torch.float32), between, output)

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute values `(...)` float32, reward units, of hidden states `(..., H)`."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.layers(hidden.float()).squeeze(-1)

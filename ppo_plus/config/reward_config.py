"""Configuration of `RewardTrainer`."""

from __future__ import annotations

from dataclasses import dataclass

from trl import RewardConfig as TRLRewardConfig

from .checks import _field, check_fields
from .shared import (
    _check_length,
    _RedactSecrets,
    _resolve_direction,
    _resolve_precision,
    check_no_sharding,
)


@dataclass(repr=False)
class RewardConfig(_RedactSecrets, TRLRewardConfig):
    """Configuration of `RewardTrainer`: TRL's `RewardConfig`, with fp16 or full precision where bf16 is not native."""

    # TRL enables activation_checkpointing under its deprecated name; None leaves it off.
    gradient_checkpointing: bool | None = _field(None, "Deprecated name of activation_checkpointing.")

    # Kernels
    use_ppo_plus_kernels: bool = _field(
        True, "Replace forwards of LoRA, norms and score head by faster or more exact ones."
    )

    def __post_init__(self) -> None:
        check_no_sharding(self)
        _resolve_precision(self)
        check_fields(self, RewardConfig)
        _check_length(self)
        super().__post_init__()
        _resolve_direction(self)

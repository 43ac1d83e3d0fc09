"""Configuration of `RewardTrainer`."""

from __future__ import annotations

from dataclasses import dataclass

from trl import RewardConfig as TRLRewardConfig

from .ppo_config import _field
from .shared import _check_length, _Discreet, _settle_direction, _settle_precision, refuse_sharding


@dataclass(repr=False)
class RewardConfig(_Discreet, TRLRewardConfig):
    """Configuration of `RewardTrainer`: TRL's `RewardConfig`, with fp16 or full precision where bf16 is not native."""

    # TRL turns on what transformers now calls activation_checkpointing, by its deprecated name.
    gradient_checkpointing: bool | None = _field(None, "Deprecated name of activation_checkpointing.")

    def __post_init__(self) -> None:
        refuse_sharding(self)
        _settle_precision(self)
        _check_length(self)
        super().__post_init__()
        _settle_direction(self)

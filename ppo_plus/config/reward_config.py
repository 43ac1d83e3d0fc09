"""Configuration of `RewardTrainer`."""

from __future__ import annotations

from dataclasses import dataclass

from trl import RewardConfig as TRLRewardConfig

from .checks import _field, check_fields, refuse_unless
from .sharding import _ShardsFrozenWeights, check_no_sharding, resolve_fsdp
from .shared import (
    _check_length,
    _RedactSecrets,
    _refuse_options,
    _resolve_direction,
    _resolve_precision,
    _start_cpu_process_group,
    is_number,
)


@dataclass(repr=False)
class RewardConfig(_ShardsFrozenWeights, _RedactSecrets, TRLRewardConfig):
    """Configuration of `RewardTrainer`: TRL's `RewardConfig`, with fp16 or full precision where bf16 is not native."""

    # TRL enables activation_checkpointing under its deprecated name; None leaves it off.
    gradient_checkpointing: bool | None = _field(None, "Deprecated name of activation_checkpointing.")

    # Kernels
    use_ppo_plus_kernels: bool = _field(
        True, "Replace forwards of LoRA, norms and score head by faster or more exact ones."
    )

    def __post_init__(self) -> None:
        check_no_sharding(self)
        resolve_fsdp(self)
        _resolve_precision(self)
        check_fields(self, RewardConfig)
        _check_length(self)
        self._check_options()
        _start_cpu_process_group(self)
        super().__post_init__()
        _resolve_direction(self)

    def _check_options(self) -> None:
        """Refuse values that would fail after the models are loaded, or that the pairwise loss does not use."""
        for name in ("learning_rate", "center_rewards_coefficient"):
            value = getattr(self, name)
            expected = "a number, at least 0 (YAML reads 3e-5 as text: write 3.0e-5)"
            refuse_unless(value is None or (is_number(value) and value >= 0), self, name, expected)
        refused = {"label_smoothing_factor": "the pairwise loss has no labels"}
        if self.train_sampling_strategy not in ("random", "sequential"):
            refused["train_sampling_strategy"] = "a pair has two lengths"
        _refuse_options(self, refused)

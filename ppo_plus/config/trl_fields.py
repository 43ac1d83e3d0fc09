"""Fields of TRL 1.12's `PPOConfig` that existing scripts set."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any, TypeVar

from .checks import _field, at_least

Config = TypeVar("Config", bound=type)


# Sizes that TRL 1.12 computed; it overwrote values passed for them.
DERIVED_SIZE_FIELDS = (
    "world_size", "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size", "local_mini_batch_size",
    "mini_batch_size",
)  # fmt: skip


@dataclass(repr=False)
class TRLFields:
    """Fields of TRL 1.12's `PPOConfig`, kept so that its scripts run unchanged."""

    sft_model_path: str | None = _field(
        "EleutherAI/pythia-160m", "Path of the policy and the reference; read by scripts, not by the trainer."
    )
    reward_model_path: str | None = _field(
        "EleutherAI/pythia-160m", "Path of the reward model; read by scripts, not by the trainer."
    )
    dataset_num_proc: int | None = _field(
        None, "Number of processes for tokenization; read by scripts, not by the trainer.", at_least(1)
    )
    exp_name: str | None = _field(None, "Name of the run in reports; run_name takes precedence.")
    model_adapter_name: str | None = _field(None, "Name of the PeftModel adapter to train; None means 'default'.")
    ref_adapter_name: str | None = _field(
        None, "Name of the PeftModel adapter used as reference; None means a frozen copy."
    )
    ds3_gather_for_generation: bool = _field(
        True, "With fsdp: gather the whole base once per rollout; False gathers each layer for each token."
    )

    @property
    def local_batch_size(self) -> int:
        """Responses per process and rollout."""
        return self.rollout_batch_size  # type: ignore[attr-defined]

    @property
    def batch_size(self) -> int:
        """Responses per rollout, over all processes."""
        return self.local_batch_size * self.world_size  # type: ignore[attr-defined]

    @property
    def local_mini_batch_size(self) -> int:
        """Responses per process and optimizer step."""
        return self.local_batch_size // self.num_mini_batches  # type: ignore[attr-defined]

    @property
    def mini_batch_size(self) -> int:
        """Responses per optimizer step, over all processes."""
        return self.batch_size // self.num_mini_batches  # type: ignore[attr-defined]

    @property
    def micro_batch_size(self) -> int:
        """Responses per micro-batch, over all processes."""
        return self.per_device_train_batch_size * self.world_size  # type: ignore[attr-defined]

    @property
    def num_total_batches(self) -> int | None:
        """Rollouts in the whole run; None where `total_episodes` is None."""
        episodes: int | None = self.total_episodes  # type: ignore[attr-defined]
        return None if episodes is None else -(-episodes // self.batch_size)

    def _apply_trl_fields(self) -> None:
        if self.exp_name is not None and getattr(self, "run_name", None) is None:
            self.run_name = self.exp_name
        if not self.ds3_gather_for_generation and not self.fsdp:  # type: ignore[attr-defined]
            warnings.warn(
                "PPOConfig: ds3_gather_for_generation=False has no effect without fsdp=True: weights are not sharded, "
                "so none are gathered. Remove it.",
                stacklevel=4,
            )


def ignore_derived_fields(config: Config) -> Config:
    """Make a config class accept and ignore the sizes that TRL derived, with a warning for each."""
    original: Any = config.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in DERIVED_SIZE_FIELDS:
            if kwargs.pop(name, None) is not None:
                warnings.warn(
                    f"PPOConfig: {name} is derived from per_device_train_batch_size, gradient_accumulation_steps, "
                    "num_mini_batches, total_episodes and the number of processes; the value passed is ignored (TRL "
                    "overwrote it). Remove it.",
                    stacklevel=2,
                )
        original(self, *args, **kwargs)

    config.__init__ = init  # type: ignore[misc]
    return config

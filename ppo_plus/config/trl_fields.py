"""Fields of TRL 1.12's `PPOConfig` that scripts still set."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from typing import Any, TypeVar

Config = TypeVar("Config", bound=type)


# Sizes that TRL 1.12 computed, and overwrote where they were given.
DERIVED = (
    "world_size", "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size", "local_mini_batch_size",
    "mini_batch_size",
)  # fmt: skip


@dataclass(repr=False)
class TRLFields:
    """Fields of TRL 1.12's `PPOConfig` that `PPOConfig` would not have otherwise."""

    sft_model_path: str = field(
        default="EleutherAI/pythia-160m", metadata={"help": "For scripts: where they load policy and reference from."}
    )
    reward_model_path: str = field(
        default="EleutherAI/pythia-160m", metadata={"help": "For scripts: where they load the reward model from."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "For scripts: processes that they tokenize with."}
    )
    exp_name: str | None = field(default=None, metadata={"help": "Name of the run in reports; run_name goes before."})
    model_adapter_name: str | None = field(
        default=None, metadata={"help": "Which adapter of a PeftModel is trained; None means 'default'."}
    )
    ref_adapter_name: str | None = field(
        default=None, metadata={"help": "Which adapter of a PeftModel is the reference; None means a frozen copy."}
    )
    ds3_gather_for_generation: bool = field(
        default=True, metadata={"help": "Nothing is sharded, so nothing is gathered; False gives a warning."}
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
        """Responses per forward pass of learning, over all processes."""
        return self.per_device_train_batch_size * self.world_size  # type: ignore[attr-defined]

    @property
    def num_total_batches(self) -> int | None:
        """Rollouts of the whole training; None where `total_episodes` does not say it."""
        episodes: int | None = self.total_episodes  # type: ignore[attr-defined]
        return None if episodes is None else -(-episodes // self.batch_size)

    def _apply_trl_fields(self) -> None:
        if self.exp_name is not None and getattr(self, "run_name", None) is None:
            self.run_name = self.exp_name
        if not self.ds3_gather_for_generation:
            warnings.warn(
                "PPOConfig: ds3_gather_for_generation=False has no effect: ppo_plus does not shard weights "
                "(DeepSpeed ZeRO-3), so none are gathered. Remove it.",
                stacklevel=4,
            )


def ignore_derived_fields(config: Config) -> Config:
    """Let a configuration be made with the sizes that TRL computed itself, saying why they do nothing."""
    original: Any = config.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in DERIVED:
            if kwargs.pop(name, None) is not None:
                warnings.warn(
                    f"PPOConfig: {name} is derived from per_device_train_batch_size, gradient_accumulation_steps, "
                    "num_mini_batches, total_episodes and the number of processes; what is given is not used (TRL "
                    "overwrote it). Remove it.",
                    stacklevel=2,
                )
        original(self, *args, **kwargs)

    config.__init__ = init  # type: ignore[misc]
    return config

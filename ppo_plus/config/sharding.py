"""Sharding of weights over processes: FSDP2 of a frozen base, as transformers and accelerate request it; no other."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from accelerate.utils import parse_flag_from_env

from ..utils.files import read_json_object

if TYPE_CHECKING:
    from .ppo_config import PPOConfig
    from .reward_config import RewardConfig

FSDP_VARIABLE = "ACCELERATE_USE_FSDP"
LAUNCHED_WITH_FSDP = "PPO_PLUS_FSDP"  # set in place of accelerate's variable, which would shard trained weights too
# Values of the settings in `fsdp_config` and in accelerate's environment variables that the sharding of a base has.
FSDP_SETTINGS = {
    "version": ("FSDP_VERSION", ("2",)),
    "reshard_after_forward": ("FSDP_RESHARD_AFTER_FORWARD", ("true", "full_shard")),
    "cpu_offload": ("FSDP_OFFLOAD_PARAMS", ("false",)),
    "activation_checkpointing": ("FSDP_ACTIVATION_CHECKPOINTING", ("false",)),
}


class _ShardsFrozenWeights:
    """Lets `fsdp` of a configuration shard the frozen base alone."""

    def _process_fsdp_args(self) -> None:
        # Without a plugin, accelerate uses DDP for the trained weights; `models/sharding.py` shards the frozen ones.
        return None


def check_no_sharding(config: Any) -> None:
    """Refuse sharding of trained weights over processes, requested by the configuration or by `accelerate launch`.

    Called when a configuration is created and again by the trainers: scripts may create an `Accelerator` in between,
    which changes the environment.

    Raises:
        ValueError: DeepSpeed, Megatron-LM, or tensor or context parallelism is requested.
    """
    kinds = (
        ("deepspeed", "ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("parallelism_config", "ACCELERATE_USE_PARALLELISM_CONFIG", "tensor or context parallelism"),
        (None, "ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    )
    for name, variable, kind in kinds:
        in_config = name is not None and getattr(config, name, None)
        if in_config or parse_flag_from_env(variable):
            where = f"{type(config).__name__}({name}=...)" if in_config else f"{variable} in the environment"
            raise ValueError(
                f"{where} requests {kind}, which is not supported: it shards the weights, and rollouts, the reference "
                "and checkpoints need unsharded weights. Remove it, and shard the frozen base of an adapter by FSDP2 "
                "(`--accelerate_config fsdp2`, or fsdp=True), or use DDP (`accelerate launch --multi_gpu`)."
            )


def resolve_fsdp(config: PPOConfig | RewardConfig) -> None:
    """Set `fsdp` if `accelerate launch` requested FSDP, and refuse settings that the sharding of a base does not have.

    accelerate's own request is removed from the environment: it would shard trained weights, clip the norms of actor
    and critic together, and save the whole base in each checkpoint.

    Raises:
        ValueError: FSDP1, or another setting that has no effect here.
    """
    kind = type(config).__name__
    if parse_flag_from_env(FSDP_VARIABLE):
        for name, (variable, _) in FSDP_SETTINGS.items():
            if variable in os.environ:
                _check_setting(name, os.environ[variable], f"{variable} in the environment", kind)
        os.environ |= {FSDP_VARIABLE: "false", LAUNCHED_WITH_FSDP: "true"}
    if parse_flag_from_env(LAUNCHED_WITH_FSDP):
        config.fsdp = cast(Any, True)
    words = config.fsdp if isinstance(config.fsdp, list) else str(config.fsdp or "").lower().split()
    if unknown := set(words) - {"true", "full_shard", "auto_wrap"}:
        raise ValueError(
            f"{kind}: fsdp={config.fsdp!r} requests {', '.join(sorted(unknown))}, and a frozen base is sharded in "
            "full over all processes. Set fsdp=True."
        )
    settings = config.fsdp_config or {}
    if isinstance(settings, str):  # JSON, or a file of it, as Trainer reads
        settings = json.loads(settings) if settings.lstrip().startswith("{") else read_json_object(Path(settings))
    for name, value in settings.items():
        _check_setting(name.removeprefix("fsdp_"), value, f"{kind}: {name} in fsdp_config", kind)
    for name, reason in (
        ("torch_compile", "compiled layers cannot gather their weights for each pass"),
        ("activation_offloading", "it would also copy the gathered weights of each pass to the host"),
    ):
        if words and getattr(config, name, False):
            raise ValueError(f"{kind}: {name} does not work with fsdp: {reason}. Remove one of them.")
    config.fsdp, config.fsdp_config = cast(Any, bool(words)), {}


def _check_setting(name: str, value: Any, where: str, kind: str) -> None:
    _, allowed = FSDP_SETTINGS.get(name, ("", ()))
    if str(value).lower() not in allowed:
        fixes = {
            "version": "Set it to 2, as `--accelerate_config fsdp2` does",
            "activation_checkpointing": f"Remove it, and set activation_checkpointing=True in {kind}",
        }
        raise ValueError(
            f"{where} is {value!r}, and ppo_plus shards a frozen base by FSDP2, one unit per decoder layer, which is "
            f"gathered for each pass. {fixes.get(name, 'Remove it')}."
        )

"""Checks and defaults shared by both configurations: secrets, precision, length of training."""

from __future__ import annotations

import copy
import os
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import parse_flag_from_env
from torch import distributed
from transformers import TrainingArguments

from .checks import as_int, is_int, is_number

if TYPE_CHECKING:
    from .ppo_config import PPOConfig
    from .reward_config import RewardConfig

MIN_FP16_CAPABILITY = (7, 0)  # first compute capability with fp16 tensor cores: V100, then T4
MIN_TRITON_CAPABILITY = (7, 0)  # of the GPUs that Triton, which torch.compile uses, has code for


class _RedactSecrets:
    """Redact Hub tokens from `to_dict`, `repr` and pickles of a configuration."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values, with `<NAME>` in place of each Hub token."""
        fields = super().to_dict()  # type: ignore[misc]
        if "stop_token" in fields:  # transformers redacts every name that ends in `_token`
            fields["stop_token"] = self.stop_token  # type: ignore[attr-defined]
        if isinstance(fields.get("model_init_kwargs"), dict):
            fields["model_init_kwargs"] = _redact_token_kwargs(fields["model_init_kwargs"])
        return fields

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.to_dict().items())})"

    __str__ = __repr__

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles its arguments next to a model that it pushes to the Hub.
        state = {k: None if k in ("hub_token", "push_to_hub_token") else v for k, v in vars(self).items()}
        if isinstance(kwargs := state.get("model_init_kwargs"), dict):
            state["model_init_kwargs"] = _redact_token_kwargs(kwargs)
        return state


def _redact_token_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: f"<{k.upper()}>" if k in ("token", "use_auth_token") else v for k, v in kwargs.items()}


def copy_arguments(args: Any) -> Any:
    """Copy a configuration for a trainer, which changes some fields, so that the user's object is not modified.

    `copy.copy` would omit the Hub token, as pickling does.
    """
    copied = object.__new__(type(args))
    vars(copied).update({name: copy.copy(v) if isinstance(v, dict | list) else v for name, v in vars(args).items()})
    copied.accelerator_config = copy.deepcopy(args.accelerator_config)
    return copied


def _refuse_options(config: TrainingArguments, refused: dict[str, str]) -> None:
    """Refuse options that are set although training ignores or contradicts them, by name with the reason."""
    in_training = "evaluation uses the precision of training"
    for name, reason in (refused | {"fp16_full_eval": in_training, "bf16_full_eval": in_training}).items():
        if getattr(config, name, None):
            kind, value = type(config).__name__, getattr(config, name)
            raise ValueError(f"{kind}: {name}={value!r} is not supported: {reason}. Remove it.")


def _check_length(config: Any) -> None:
    """Refuse `max_steps` and `num_train_epochs` that train nothing or that Trainer would misread."""
    config.max_steps = as_int(config.max_steps)
    name, steps, epochs = type(config).__name__, config.max_steps, config.num_train_epochs
    if not is_int(steps) or steps == 0:
        raise ValueError(f"{name}: max_steps must be 1 or more, or -1 (num_train_epochs decides); got {steps!r}.")
    decides = steps < 0 and getattr(config, "total_episodes", None) is None
    if not is_number(epochs) or (decides and epochs <= 0):
        raise ValueError(
            f"{name}: num_train_epochs must be a number above 0; got {epochs!r}. To train nothing, do not call train()."
        )


def _check_capability(config: PPOConfig | RewardConfig) -> None:
    """Refuse options that a CUDA GPU is too old for, which would fail in the first pass."""
    if not torch.cuda.is_available() or config.use_cpu:
        return
    has_flash_attention = "flash_attention_2" in str(config.model_init_kwargs)  # a dict, or JSON
    needs = {
        "torch_compile=True": MIN_TRITON_CAPABILITY if config.torch_compile else (0, 0),
        "attn_implementation='flash_attention_2'": (8, 0) if has_flash_attention else (0, 0),
    }
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    for option, minimum in needs.items():
        if capability < minimum:
            raise ValueError(
                f"{type(config).__name__}: {option} requires compute capability {minimum[0]}.{minimum[1]}, and {name} "
                f"has {capability[0]}.{capability[1]}. Remove it."
            )


def _resolve_precision(config: PPOConfig | RewardConfig) -> None:
    """Choose the autocast dtype by GPU: bf16 from Ampere on, fp16 on older GPUs with tensor cores.

    Raises:
        ValueError: bf16 is requested on a CUDA GPU that only emulates it, or another option that it is too old for.
    """
    _check_capability(config)
    on_cuda = torch.cuda.is_available() and not config.use_cpu
    native = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.bf16 is None:
        config.bf16 = native and not config.fp16
        config.fp16 = config.fp16 or (
            on_cuda and not native and torch.cuda.get_device_capability() >= MIN_FP16_CAPABILITY
        )
    elif config.bf16 and on_cuda and not native:
        name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        raise ValueError(
            f"{type(config).__name__}(bf16=True): {name} (compute capability {major}.{minor}) emulates bf16, which is "
            "many times slower than fp16; native bf16 requires compute capability 8.0 (Ampere). Remove bf16: fp16 is "
            "then used if the GPU has fp16 tensor cores."
        )
    if config.fp16 and (config.use_cpu or not torch.accelerator.is_available()):
        warnings.warn(
            "fp16=True has no effect on a CPU: weights are used in the dtype they were loaded in. Remove it; for half "
            "precision on a CPU use bf16=True.",
            stacklevel=4,
        )
    if config.bf16 and not torch.accelerator.is_available():
        config.use_cpu = True  # Trainer accepts bf16 on a CPU only with use_cpu


def _start_cpu_process_group(config: TrainingArguments) -> None:
    """Start the process group of a launcher on CPUs with `ddp_timeout`, which transformers sets for GPUs alone."""
    launched = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if launched and not distributed.is_initialized() and (config.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")):
        distributed.init_process_group(config.ddp_backend or "gloo", timeout=timedelta(seconds=config.ddp_timeout))


def _schedule_follows_metric(config: TrainingArguments) -> bool:
    return config.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")


def _resolve_direction(config: TrainingArguments) -> None:
    # By default these schedules minimize every metric.
    if _schedule_follows_metric(config):
        mode = "max" if config.greater_is_better else "min"
        config.lr_scheduler_kwargs = {"mode": mode, **cast(dict, config.lr_scheduler_kwargs or {})}

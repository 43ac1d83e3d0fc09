"""What the configurations of both trainers check and resolve: secrets, sharding, precision, length of training."""

from __future__ import annotations

import copy
import math
import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

if TYPE_CHECKING:
    from .ppo_config import PPOConfig
    from .reward_config import RewardConfig

TENSOR_CORES = (7, 0)  # the first compute capability with tensor cores for fp16: V100, then T4


class _RedactSecrets:
    """A configuration whose tokens are in no log, file or pickle of it; they can be used and not read back."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON takes them, with `<NAME>` in the place of a token."""
        shown = super().to_dict()  # type: ignore[misc]
        if "stop_token" in shown:
            shown["stop_token"] = self.stop_token  # type: ignore[attr-defined]  # by its name alone it was hidden
        if isinstance(shown.get("model_init_kwargs"), dict):
            shown["model_init_kwargs"] = _without_tokens(shown["model_init_kwargs"])
        return shown

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.to_dict().items())})"

    __str__ = __repr__

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles its arguments beside a model that it pushes to the Hub.
        state = {k: None if k in ("hub_token", "push_to_hub_token") else v for k, v in vars(self).items()}
        if isinstance(kwargs := state.get("model_init_kwargs"), dict):
            state["model_init_kwargs"] = _without_tokens(kwargs)
        return state


def _without_tokens(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: f"<{k.upper()}>" if k in ("token", "use_auth_token") else v for k, v in kwargs.items()}


def copy_arguments(args: Any) -> Any:
    """Copy a configuration for a trainer, which settles some fields of it; the user's own stays as it is.

    `copy.copy` would leave out the Hub's token, as pickling does.
    """
    copied = object.__new__(type(args))
    vars(copied).update({name: copy.copy(v) if isinstance(v, dict | list) else v for name, v in vars(args).items()})
    copied.accelerator_config = copy.deepcopy(args.accelerator_config)
    return copied


def check_no_sharding(config: Any) -> None:
    """Refuse what would split the model over processes, by a field of the configuration or by `accelerate launch`.

    Asked for when a configuration is made and again by the trainers: scripts load weights in between, and an
    `Accelerator` that was made in between changes the environment too.

    Raises:
        ValueError: FSDP, DeepSpeed, Megatron-LM, or tensor or context parallelism is asked for.
    """
    kinds = (
        ("fsdp", "ACCELERATE_USE_FSDP", "FSDP"),
        ("deepspeed", "ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("parallelism_config", "ACCELERATE_USE_PARALLELISM_CONFIG", "tensor or context parallelism"),
        (None, "ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    )
    for name, variable, kind in kinds:
        in_config = name is not None and getattr(config, name, None)
        if in_config or parse_flag_from_env(variable):
            where = f"{type(config).__name__}({name}=...)" if in_config else f"{variable} in the environment"
            raise ValueError(
                f"{where} asks for {kind}, which is not supported: it splits the weights, and rollouts, the reference "
                "and what is saved here read them whole. Use plain DDP: remove it, and start with `accelerate launch "
                "--multi_gpu`. Where one GPU is too small for the model, load it in 4 bits with a LoRA adapter."
            )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and neither text nor a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_length(config: Any) -> None:
    """Refuse a length of training that is none, or that Trainer would take for another one."""
    name, steps, epochs = type(config).__name__, config.max_steps, config.num_train_epochs
    if not _is_int(steps) or steps == 0:
        raise ValueError(f"{name}: max_steps must be 1 or more, or -1 (num_train_epochs decides); got {steps!r}.")
    decides = steps < 0 and getattr(config, "total_episodes", None) is None
    if not is_number(epochs) or (decides and epochs <= 0):
        raise ValueError(
            f"{name}: num_train_epochs must be a number above 0; got {epochs!r}. To train nothing, do not call train()."
        )


def _resolve_precision(config: PPOConfig | RewardConfig) -> None:
    """Choose autocast's dtype by the GPU: bf16 from Ampere on, fp16 on the cards with tensor cores before it.

    Raises:
        ValueError: bf16 is asked for on a CUDA card that has it in software only.
    """
    on_cuda = torch.cuda.is_available() and not config.use_cpu
    native = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.bf16 is None:
        config.bf16 = native and not config.fp16
        config.fp16 = config.fp16 or (on_cuda and not native and torch.cuda.get_device_capability() >= TENSOR_CORES)
    elif config.bf16 and on_cuda and not native:
        name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        raise ValueError(
            f"{type(config).__name__}(bf16=True): {name} (compute capability {major}.{minor}) multiplies bf16 in "
            "software, many times slower than fp16; native bf16 begins with 8.0 (Ampere). Leave bf16 out, and fp16 is "
            "used where the card has tensor cores for it."
        )
    if config.fp16 and (config.use_cpu or not torch.accelerator.is_available()):
        warnings.warn(
            "fp16=True does nothing on a CPU: weights are used in their own precision. Remove it; bf16=True is the "
            "half precision that CPUs multiply in.",
            stacklevel=4,
        )
    if config.bf16 and not torch.accelerator.is_available():
        config.use_cpu = True  # CPUs run bf16 too; Trainer wants to be told


def _schedule_follows_metric(config: TrainingArguments) -> bool:
    return config.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")


def _resolve_direction(config: TrainingArguments) -> None:
    # Left to themselves, these schedules take every metric for one that should fall.
    if _schedule_follows_metric(config):
        mode = "max" if config.greater_is_better else "min"
        config.lr_scheduler_kwargs = {"mode": mode, **cast(dict, config.lr_scheduler_kwargs or {})}

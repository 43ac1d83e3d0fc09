"""Resolve and build the critic: its spec, its adapter or model, and the initial weights of its value head."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..config import PPOConfig
from ..config.critic_fields import Critic
from ..data.seeding import derive_seed, isolated_rng
from .adapter_files import resolve_adapter_path
from .adapter_loading import load_reward_adapter
from .adapters import CRITIC_ADAPTER, preserve_requires_grad, set_adapter_trainable, train_adapter
from .backbone import unwrap_peft
from .classifier import load_classifier
from .precision import hold_trained_in_fp32
from .value_head import ValueHead


@dataclass
class CriticSpec:
    """Sources of a critic's weights.

    Attributes:
        kind: see `ActorCritic`.
        adapter: a reward adapter on the same base, from which the critic's adapter starts; its score head times
            `scale` initializes a linear value head.
        scale: weight of that reward.
        model: a separate critic; its `score`, if any, initializes a linear value head.
        peft_fields: fields in which the critic's new adapter differs from the actor's. SAO (2607.07508) trains no
            attention in the critic, whose instability it finds there: target_modules of the MLP alone.
        head: shape and activation of the value head.
        seed: seed of random initial weights.
    """

    kind: Critic = "shared"
    adapter: Path | None = None
    scale: float = 1.0
    model: PreTrainedModel | PeftModel | None = None
    head: tuple[Literal["linear", "mlp"], Literal["silu", "gelu"]] = ("linear", "silu")
    seed: int = 0
    peft_fields: dict[str, Any] = field(default_factory=dict)


def resolve_critic(args: PPOConfig, value_model: Any, reward_funcs: Any) -> CriticSpec:
    """Resolve `critic`, `value_model` and reward adapters to the critic's sources; a `value_model` selects itself."""
    head, seed = (args.value_head, args.value_head_activation), derive_seed(args.seed, "value head")
    adapter = resolve_adapter_path(value_model)
    if adapter is not None and args.critic != "adapter":
        raise ValueError(f"value_model={str(value_model)!r} is an adapter: set critic='adapter' to start from it.")
    if value_model is None or adapter is not None:
        if args.critic == "separate":
            raise ValueError("critic='separate' needs a separate critic: pass value_model.")
        scale = 1.0
        fields = cast(dict, args.critic_peft_config or {})
        if args.critic == "adapter" and adapter is None and not fields:
            adapter, scale = _first_reward_adapter(args, reward_funcs)
        return CriticSpec(args.critic, adapter, scale, None, head, seed, fields)
    if args.critic not in ("shared", "separate"):
        raise ValueError(f"critic={args.critic!r} and value_model exclude each other: leave one of them out.")
    args.critic = "separate"
    if isinstance(value_model, str | Path):
        value_model, missing = load_classifier(str(value_model), torch.float32)
        if "score.weight" in missing:  # a language model, whose random head would add noise to every value
            nn.init.zeros_(value_model.score.weight)
    train_adapter(value_model)
    if not any(parameter.requires_grad for parameter in value_model.base_model.parameters()):
        warnings.warn(
            "value_model: the weights below its head are frozen (by requires_grad_(False), or because it was a reward "
            "model of another trainer), so only the value head is trained. Call value_model.requires_grad_(True) to "
            "train all of it.",
            stacklevel=2,
        )
    hold_trained_in_fp32(value_model)
    return CriticSpec(args.critic, None, 1.0, value_model, head, seed)


def _first_reward_adapter(args: PPOConfig, reward_funcs: Any) -> tuple[Path | None, float]:
    funcs = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    for func, weight in zip(funcs, args.reward_weights or [1.0] * len(funcs), strict=True):
        if (folder := resolve_adapter_path(func)) is not None:
            return folder, weight
    return None, 1.0


def build_value_head(policy: PreTrainedModel | PeftModel, critic: CriticSpec) -> ValueHead:
    """Add the critic's adapter, if any, and build the value head; a linear one starts from an existing score head."""
    with isolated_rng(critic.seed):
        start = _critic_adapter(policy, critic) if critic.kind == "adapter" else score_head(critic.model)
        backbone = policy if critic.model is None else critic.model
        value_head = ValueHead(backbone.config.get_text_config().hidden_size, *critic.head)
    if isinstance(policy, PeftModel):  # including the critic's adapter
        hold_trained_in_fp32(policy)
    if start is not None and critic.head[0] == "linear":
        linear = cast(nn.Linear, value_head.layers[0])
        linear.weight.data.copy_(start.weight * critic.scale)
        if start.bias is not None:
            linear.bias.data.copy_(start.bias * critic.scale)
    return value_head


def _critic_adapter(policy: PreTrainedModel | PeftModel, critic: CriticSpec) -> nn.Linear | None:
    if not isinstance(policy, PeftModel):
        raise ValueError("critic='adapter' needs a policy with an adapter: pass peft_config, or choose another critic.")
    if critic.adapter is not None:
        return load_reward_adapter(policy, CRITIC_ADAPTER, critic.adapter, trained=True)
    with preserve_requires_grad(policy):
        policy.add_adapter(CRITIC_ADAPTER, critic_peft_config(policy.peft_config["default"], critic.peft_fields))
    set_adapter_trainable(policy, CRITIC_ADAPTER, True)
    return None


def critic_peft_config(actors: PeftConfig, fields: dict[str, Any]) -> PeftConfig:
    """Return the actor's configuration with some fields replaced.

    Raises:
        ValueError: the actor's kind of adapter has no such field, or refuses its value.
    """
    known = {each.name for each in dataclasses.fields(actors) if each.init}
    if unknown := sorted(fields.keys() - known):
        kind = type(actors).__name__
        raise ValueError(f"critic_peft_config has {unknown[0]!r}, which is no field of {kind}. Remove it.")
    try:
        return dataclasses.replace(copy.deepcopy(actors), **fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"critic_peft_config={fields}, with the other fields of peft_config: {error}") from error


def score_head(model: PreTrainedModel | PeftModel | None) -> nn.Linear | None:
    """Freeze and return the linear head, H to 1, of a sequence classifier; None if there is none."""
    head = None if model is None else getattr(unwrap_peft(model), "score", None)
    if head is None or getattr(head, "weight", None) is None:
        return None
    return cast(nn.Linear, head.requires_grad_(False))

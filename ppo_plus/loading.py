"""From a name or a model to an actor-critic: base, adapter, reference, value head."""

from __future__ import annotations

import copy
from typing import Any, Literal, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .modeling import REFERENCE_ADAPTER, ActorCritic, ValueHead, check_architecture


def load_policy(
    model: str | PreTrainedModel | PeftModel,
    *,
    peft_config: PeftConfig | None,
    quantization_config: Any = None,
    model_init_kwargs: dict[str, Any] | None = None,
) -> PreTrainedModel | PeftModel:
    """The policy from a name or a model: loaded, adapted, and with a frozen `ref` copy of an adapter it came with.

    Training that continues an adapter takes that adapter as its reference; the bare base would be the wrong one.
    """
    if peft_config is not None and peft_config.is_prompt_learning:
        raise ValueError(
            f"{type(peft_config).__name__} is prompt learning; ppo_plus trains adapters inside the model: pass a "
            "LoraConfig."
        )
    if isinstance(model, str):
        kwargs = {"dtype": "auto" if peft_config is not None else torch.float32, **(model_init_kwargs or {})}
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        model = AutoModelForCausalLM.from_pretrained(model, **kwargs)
    elif quantization_config is not None or model_init_kwargs:
        raise ValueError(
            "quantization_config and model_init_kwargs apply to a model that is loaded by name; this model is "
            "loaded already. Pass its name, or load it with these arguments yourself."
        )
    if isinstance(model, PeftModel):
        return _with_reference_adapter(model, peft_config)
    check_architecture(model)
    if peft_config is None:
        if getattr(model, "is_quantized", False):
            raise ValueError("A quantized model cannot be trained in full: pass peft_config=LoraConfig(...).")
        return model
    return get_peft_model(model, peft_config)


def _with_reference_adapter(model: PeftModel, peft_config: PeftConfig | None) -> PeftModel:
    if peft_config is not None:
        raise ValueError("This model has an adapter already: pass it without peft_config to go on training it.")
    if "default" not in model.peft_config:
        raise ValueError(f"The adapter to train must be named 'default'; this model has {list(model.peft_config)}.")
    if REFERENCE_ADAPTER not in model.peft_config:
        model.add_adapter(REFERENCE_ADAPTER, copy.deepcopy(model.peft_config["default"]))
        state = {k: v for k, v in model.state_dict().items() if ".default." in k}
        renamed = {k.replace(".default.", f".{REFERENCE_ADAPTER}."): v.clone() for k, v in state.items()}
        model.load_state_dict(renamed, strict=False)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.requires_grad_(True)
        elif f".{REFERENCE_ADAPTER}." in name:
            parameter.requires_grad_(False)
    return model


def build_actor_critic(
    policy: PreTrainedModel | PeftModel,
    *,
    head: tuple[Literal["linear", "mlp"], Literal["silu", "gelu"]],
    detach_values: bool,
    ref_model: PreTrainedModel | None,
    disable_dropout: bool,
    seed: int,
) -> ActorCritic:
    """A policy with its value head, and a frozen copy as reference where there is no adapter to switch off.

    Args:
        policy: from `load_policy`.
        head: kind and activation of the value head.
        detach_values: stop the critic's gradient at the head.
        ref_model: a reference of the user's own.
        disable_dropout: zero the base model's dropout.
        seed: of the value head's hidden layer.
    """
    if disable_dropout:
        disable_base_dropout(policy)
    if ref_model is None and not isinstance(policy, PeftModel):
        ref_model = frozen_copy(policy)
    if isinstance(ref_model, PeftModel):
        ref_model = cast(PreTrainedModel, ref_model.get_base_model())
    if ref_model is not None and not {*map(id, policy.parameters())}.isdisjoint(map(id, ref_model.parameters())):
        raise ValueError(
            "model and ref_model share their weights, so the reference would move with the policy: leave ref_model "
            "out (the model without its adapter, or a frozen copy, is the reference), or load it a second time."
        )
    if ref_model is not None:
        ref_model.to(policy.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        value_head = ValueHead(policy.config.get_text_config().hidden_size, *head)
    return ActorCritic(policy, value_head, detach_values=detach_values, ref_model=ref_model)


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that stays as it is: the reference of full fine-tuning."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def disable_base_dropout(model: nn.Module) -> None:
    """Zero the dropout of the base model. `lora_dropout` is the user's choice and stays."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
        # Some models keep rates for functional dropout, under several names (`attention_dropout`, `hidden_dropout`).
        for attribute in [key for key, value in vars(module).items() if "drop" in key and isinstance(value, float)]:
            setattr(module, attribute, 0.0)

"""Build an actor-critic from a name or a model: base, adapter, reference, critic."""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.utils import CONFIG_NAME, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .actor_critic import ActorCritic
from .adapter_checks import check_base_is_frozen, check_preserves_base, warn_of_skipped_layers
from .adapter_files import HEADS, resolve_adapter_path
from .adapter_loading import (
    adapter_key_mapping,
    check_keys_match,
    copy_lora_weights,
    explain_state_dict_mismatch,
    load_adapter_state_dict,
)
from .adapters import (
    REFERENCE_ADAPTER,
    active_adapters,
    copy_adapter_state_dict,
    set_adapter_trainable,
)
from .backbone import check_architecture, unwrap_peft
from .critic import CriticSpec, build_value_head
from .gguf_files import check_rope_scaling
from .precision import hold_trained_in_fp32
from .weight_checks import check_model_weights

MAPPED_FILES_ARE_LOCKED = os.name == "nt"
# Those arguments of a model's `from_pretrained` that its configuration is loaded with, too.
HUB_KWARGS = ("revision", "trust_remote_code", "token", "subfolder", "cache_dir", "local_files_only", "gguf_file")


def model_name(model: Any) -> str:
    """Return the name or folder that a model was loaded from."""
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    if not name:
        raise ValueError("This model has no name, so its tokenizer is unknown: pass it as processing_class.")
    return name


def base_name(model: str) -> str:
    """Return the name of an adapter's base, or the name of any other model itself."""
    folder = resolve_adapter_path(model)
    if folder is None:
        return model
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise ValueError(
            f"model={model!r} is an adapter without the name of its base: set base_model_name_or_path in its "
            f"{CONFIG_NAME}, or pass PeftModel.from_pretrained(base, name, is_trainable=True)."
        )
    return cast(str, base)


def load_tokenizer(model: Any, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a model was saved with; for an adapter without one, its base's."""
    name = model_name(model)
    has_tokenizer = get_tokenizer_config(name, trust_remote_code=trust_remote_code)
    source = name if has_tokenizer else base_name(name)
    return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


def load_config(name: str, init_kwargs: Mapping[str, Any]) -> PreTrainedConfig:
    """Load the configuration of a model that `from_pretrained(name, **init_kwargs)` would load."""
    kwargs = {key: value for key, value in init_kwargs.items() if key in HUB_KWARGS}
    return init_kwargs.get("config") or AutoConfig.from_pretrained(name, **kwargs)


def count_embeddings(model: Any, init_kwargs: Mapping[str, Any]) -> int | None:
    """Return the number of token embeddings of a model, or of the configuration of a name.

    None for an adapter's name, whose files may have their own embeddings, and for a configuration without a size.
    """
    if not isinstance(model, str):
        return len(model.get_input_embeddings().weight)
    if resolve_adapter_path(model) is not None:
        return None
    return getattr(load_config(model, init_kwargs).get_text_config(), "vocab_size", None)


def language_model_class(config: PreTrainedConfig) -> Any:
    """Return the auto class of a language model; some multimodal families (Ministral 3, SmolVLM) have another one."""
    kind = type(config)
    multimodal = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM


def check_adapter_kind(peft_config: PeftConfig | None) -> None:
    """Refuse prompt learning, which adds virtual tokens before the prompt and changes nothing in the model."""
    if getattr(peft_config, "is_prompt_learning", False):  # check_preserves_base refuses other types
        raise ValueError(
            f"{type(peft_config).__name__} is prompt learning; ppo_plus trains adapters inside the model: pass a "
            "LoraConfig."
        )


class _OncePerMessage(logging.Filter):
    """Lets each message of a logger pass once."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the message is new."""
        known = record.getMessage() in self._known
        self._known.add(record.getMessage())
        return not known


_ONCE = _OncePerMessage()


def log_int8_casts_once() -> None:
    """Let bitsandbytes log once that int8 layers cast inputs to fp16; it logs for each product, thousands per step."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_ONCE)  # the same filter is added once


def load_policy(
    model: str | PreTrainedModel | PeftModel,
    *,
    peft_config: PeftConfig | None,
    quantization_config: Any = None,
    model_init_kwargs: dict[str, Any] | None = None,
    frozen_dtype: torch.dtype | str = "auto",
) -> PreTrainedModel | PeftModel:
    """Load the policy, and add a new adapter or a frozen `ref` copy of its existing one.

    An adapter's name loads its base and the adapter. A base under an adapter has `frozen_dtype`, unless
    `model_init_kwargs` has a dtype. If training continues an adapter, the reference is that adapter and not the base.

    The trained weights of a model that is loaded already are cast to fp32 in place.
    """
    check_adapter_kind(peft_config)
    log_int8_casts_once()
    by_name = isinstance(model, str)
    if isinstance(model, str):
        model = _load_by_name(model, peft_config, quantization_config, model_init_kwargs or {}, frozen_dtype)
    elif quantization_config is not None or model_init_kwargs:
        raise ValueError(
            "quantization_config and model_init_kwargs apply to a model that is loaded by name; this model is "
            "loaded already. Pass its name, or load it with these arguments yourself."
        )
    if isinstance(model, PeftModel):
        return _disable_merge(_add_reference_adapter(model, peft_config))
    check_architecture(model)
    if peft_config is not None:
        policy = get_peft_model(model, config_to_train(peft_config, TaskType.CAUSAL_LM))
        warn_of_skipped_layers(policy, peft_config)
        return _disable_merge(policy)
    if getattr(model, "is_quantized", False):
        raise ValueError("A quantized model cannot be trained in full: pass peft_config=LoraConfig(...).")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "All weights of the model are frozen: pass peft_config=LoraConfig(...) to train an adapter, or call "
            "model.requires_grad_(True) to train all weights."
        )
    if not by_name:
        hold_trained_in_fp32(model)  # of a name, `check_precision` has checked the dtype
    return model


def _load_by_name(
    name: str,
    peft_config: PeftConfig | None,
    quantization_config: Any,
    model_init_kwargs: dict[str, Any],
    frozen_dtype: torch.dtype | str,
) -> PreTrainedModel | PeftModel:
    folder = resolve_adapter_path(name)
    dtype = torch.float32 if peft_config is None and folder is None else frozen_dtype
    kwargs = {"trust_remote_code": False, "dtype": dtype, **model_init_kwargs}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    config = load_config(base_name(name), kwargs)
    check_rope_scaling(base_name(name), config, kwargs)
    auto = language_model_class(config)
    model, info = auto.from_pretrained(base_name(name), **kwargs, output_loading_info=True)
    if missing := sorted({*info["missing_keys"]} & {key for key, _ in model.named_parameters()}):
        raise ValueError(
            f"The files of {base_name(name)!r} lack {', '.join(missing[:3])}, which would be random in the policy. "
            "Pass a causal language model; a sequence classifier belongs in reward_funcs or value_model."
        )
    clone_mmapped_tensors(model)
    if isinstance(quantization_config, BitsAndBytesConfig):
        warn_of_unquantized(model)
    return model if folder is None else load_adapter_onto(model, folder)


def config_to_train(peft_config: PeftConfig, task_type: TaskType) -> PeftConfig:
    """Copy an adapter's configuration for a new adapter that is trained for a task.

    A saved adapter has `inference_mode=True`, with which PEFT trains nothing. PEFT changes its configuration, so it
    gets a copy.
    """
    config = copy.deepcopy(peft_config)
    config.inference_mode, config.task_type = False, task_type
    heads = HEADS if task_type == TaskType.CAUSAL_LM and peft_config.task_type != task_type else ()
    modules = [name for name in getattr(config, "modules_to_save", None) or [] if name not in heads]
    if hasattr(config, "modules_to_save"):
        config.modules_to_save = modules or None
    return config


def runs_in_fp16(args: TrainingArguments) -> bool:
    """Return whether products run in fp16; on a CPU `fp16=True` does not change them."""
    return bool(args.fp16) and args.device.type != "cpu"


def quantization_in_fp16(quantization_config: Any) -> Any:
    """Return a copy of a quantization with 4-bit products in fp16 instead of bf16."""
    if getattr(quantization_config, "bnb_4bit_compute_dtype", None) != torch.bfloat16:
        return quantization_config
    warnings.warn(
        "bnb_4bit_compute_dtype=bfloat16 is replaced by float16, because this run is in fp16: 4-bit layers would "
        "multiply in bf16 (in software, on a card before Ampere), and all others in fp16. Set it to torch.float16.",
        stacklevel=3,
    )
    quantization_config = copy.deepcopy(quantization_config)
    quantization_config.bnb_4bit_compute_dtype = torch.float16
    return quantization_config


def warn_of_bf16(model: nn.Module) -> None:
    """Warn if a base is loaded in bf16 for a run in fp16, where each product casts its weights."""
    base = unwrap_peft(cast(PreTrainedModel, model))
    frozen = (p for p in base.parameters() if not p.requires_grad)
    if any(p.dtype == torch.bfloat16 for p in frozen):
        warnings.warn(
            f"The base {getattr(base.config, '_name_or_path', '')!r} is loaded in bf16 and this run is in fp16, so its "
            "weights are cast in each pass. Pass it by name without a dtype, or load it with dtype=torch.float16.",
            stacklevel=3,
        )


def quantized_share(model: PreTrainedModel) -> float:
    """Return the share of a model's matrix weights that bitsandbytes has quantized, from 0 to 1.

    Embeddings, output head and adapters, which are never quantized, do not count.
    """
    ends = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m for p in m.parameters()}
    quantized = others = 0
    for name, parameter in model.named_parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            quantized += math.prod(state.shape)
        elif type(parameter).__name__ == "Int8Params":
            quantized += parameter.numel()
        elif parameter.ndim > 1 and id(parameter) not in ends and ".lora_" not in name:
            others += parameter.numel()
    return quantized / max(1, quantized + others)


def warn_of_unquantized(model: PreTrainedModel) -> None:
    """Warn if a quantization does not apply to most weights, so that it saves little memory."""
    share = quantized_share(model)
    if share < 0.5:
        warnings.warn(
            f"quantization_config applies to only {share:.0%} of the weights of {type(model).__name__}: bitsandbytes "
            "quantizes torch.nn.Linear and none of its subclasses, and no experts in one tensor. Expect the memory of "
            "a model without quantization.",
            stacklevel=3,
        )


@torch.no_grad()
def clone_mmapped_tensors(model: nn.Module) -> None:
    """Clone tensors that are views of the memory-mapped file, where the file must be released.

    Quantization leaves some, which keep the whole file. On Windows a mapped file cannot be replaced, so a model could
    not be saved into the folder that it was loaded from.
    """
    if getattr(model, "is_quantized", False) or MAPPED_FILES_ARE_LOCKED:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu" and tensor.is_floating_point():
                tensor.data = tensor.data.clone()


def load_adapter_onto(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Load the adapter in a folder onto its base, to continue its training."""
    names, weights = adapter_key_mapping(base, folder), load_adapter_state_dict(base, folder)
    embeddings = base.get_input_embeddings()
    name = next(name for name, module in base.named_modules() if module is embeddings)
    saved = [tensor.shape for key, tensor in weights.items() if f".{name}." in f".{key}"]
    # PEFT saves resized embeddings with the adapter, so the base is resized like in its training.
    rows = max((shape[0] for shape in saved if shape[1:] == embeddings.weight.shape[1:]), default=0)
    if rows > len(cast(Tensor, embeddings.weight)):
        base.resize_token_embeddings(rows, mean_resizing=False)
    fix = "Load it with the base that it was trained on."
    with explain_state_dict_mismatch(f"The adapter in {folder}", fix), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # those that are missing below are refused
        policy = PeftModel.from_pretrained(base, str(folder), is_trainable=True, key_mapping=names)
    copy_lora_weights(policy, "default", weights)
    lost = {key for key in weights if ".lora_" in key} - get_peft_model_state_dict(policy).keys()
    check_keys_match(policy, "default", weights, lost, folder, fix)
    return policy


def _disable_merge(policy: PeftModel) -> PeftModel:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "An adapter on a quantized base cannot be merged: rounding the sum to a few bits again would change the "
            "policy, and with it the base that is its reference. Save the adapter, load the base in bf16, load the "
            "adapter onto it with PeftModel.from_pretrained, and merge there."
        )

    if getattr(policy.get_base_model(), "is_quantized", False):
        policy.merge_and_unload = policy.merge_adapter = refuse
    return policy


def _add_reference_adapter(model: PeftModel, peft_config: PeftConfig | None) -> PeftModel:
    if peft_config is not None:
        raise ValueError("This model has an adapter already: pass it without peft_config to continue its training.")
    if "default" not in model.peft_config:
        raise ValueError(f"The adapter to train must be named 'default'; this model has {list(model.peft_config)}.")
    if active_adapters(model) != ["default"]:
        raise ValueError(
            f"'default' is the adapter that is trained and saved, but the active adapters of this model are "
            f"{active_adapters(model)}: call model.set_adapter('default') first (and "
            "model.base_model.enable_adapter_layers(), if they are off). To train another adapter, load it under the "
            "name 'default'."
        )
    check_preserves_base(model.peft_config["default"], "The adapter of model")
    if REFERENCE_ADAPTER not in model.peft_config:
        model.add_adapter(REFERENCE_ADAPTER, copy.deepcopy(model.peft_config["default"]))
        model.load_state_dict(copy_adapter_state_dict(model, "default", REFERENCE_ADAPTER), strict=False)
    set_adapter_trainable(model, "default", True)
    set_adapter_trainable(model, REFERENCE_ADAPTER, False)
    check_base_is_frozen(model)
    return model


def build_actor_critic(
    policy: PreTrainedModel | PeftModel,
    *,
    critic: CriticSpec,
    ref_model: PreTrainedModel | None = None,
    disable_dropout: bool = True,
    use_kernels: bool = True,
) -> ActorCritic:
    """Build an actor-critic; without adapter and `ref_model`, the reference is a frozen copy of the policy."""
    for name, model in (("model", policy), ("ref_model", ref_model), ("value_model", critic.model)):
        if model is not None:
            check_model_weights(model, name)
    if ref_model is None and not isinstance(policy, PeftModel):
        ref_model = copy.deepcopy(policy)  # which ActorCritic freezes
    if isinstance(ref_model, PeftModel):
        ref_model = cast(PreTrainedModel, ref_model.get_base_model())
    _check_models_apart(policy, ref_model, critic.model)
    for model in (policy, critic.model):
        if disable_dropout and model is not None:
            disable_base_dropout(model)
    value_head = build_value_head(policy, critic)
    return ActorCritic(
        policy, value_head, critic=critic.kind, value_model=critic.model, ref_model=ref_model, use_kernels=use_kernels
    )


def _check_models_apart(
    policy: nn.Module, ref_model: nn.Module | None, value_model: PreTrainedModel | PeftModel | None
) -> None:
    models = {"model": policy, "ref_model": ref_model, "value_model": value_model}
    weights = {name: {*map(id, model.parameters())} for name, model in models.items() if model is not None}
    reasons = {
        ("model", "ref_model"): "the reference would move with the policy: leave ref_model out (the model without its "
        "adapter, or a frozen copy, is the reference)",
        ("model", "value_model"): "actor and critic would overwrite each other: leave value_model out "
        "(critic='detached' reads the actor's hidden states)",
        ("value_model", "ref_model"): "the critic would be frozen with the reference: leave one of them out",
    }
    for (first, second), reason in reasons.items():
        if weights.get(first, set()) & weights.get(second, set()):
            raise ValueError(f"{first} and {second} share their weights, so {reason}, or load it a second time.")


def disable_base_dropout(model: nn.Module) -> None:
    """Zero the dropout of the base model; `lora_dropout` stays."""
    # TRL's `disable_dropout_in_model` leaves functional dropout on, see findings/.
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
        # Some models have rates for functional dropout, under several names (`attention_dropout`, `hidden_dropout`).
        for attribute in [key for key, value in vars(module).items() if "drop" in key and isinstance(value, float)]:
            setattr(module, attribute, 0.0)

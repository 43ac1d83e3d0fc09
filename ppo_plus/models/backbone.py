"""How a decoder without its head is called: which keyword takes its cache, and whether it takes positions.

transformers 5.24 renamed the cache of every model, and forwards swallow unknown keywords, so a cache under the wrong
name is lost without an error: each token would be computed without its context. Signatures do not show which names are
taken. Therefore each model is tried once, on three tokens.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..kernels.frozen_layers import relative_error
from .logprobs import logits_function

# Newest first: the newest name gives no deprecation warning where it is known.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
# Largest error of a cached step, relative to the largest hidden state, that is rounding in fp32.
CACHED_STEP_TOLERANCE = 1e-3
UNSUPPORTED_HINT = "Choose another model; most decoders of transformers work."


@dataclass(frozen=True)
class BackboneInterface:
    """What keywords a backbone takes.

    Attributes:
        cache_name: under which it goes on from the cache that it returned; None where it does not.
        takes_positions: whether it takes `position_ids`.
        takes_mask: whether it takes `attention_mask`, and heeds it.
        cached_error: of the hidden state of a cached step, relative to the full pass; 0 within rounding.
    """

    cache_name: str | None
    takes_positions: bool
    takes_mask: bool
    cached_error: float = 0.0


# By model and for as long as it lives: a copy is another module, and is tried by itself.
_interfaces: WeakKeyDictionary[torch.nn.Module, BackboneInterface] = WeakKeyDictionary()


def backbone_interface(model: PreTrainedModel) -> BackboneInterface:
    """Return how the backbone of a model is called; the first call tries it."""
    if model not in _interfaces:
        training = model.training
        model.eval()
        try:
            _interfaces[model] = _probe(model)
        finally:
            model.train(training)
    return _interfaces[model]


def cache_of(outputs: Any) -> Cache | None:
    """Return the cache among the outputs of a model, whatever its name."""
    return next((value for value in outputs.values() if isinstance(value, Cache)), None)


def is_recurrent(cache: Cache) -> bool:
    """Return whether no layer of a cache holds keys: the state holds the past, and a mask covers new tokens only."""
    return all(linear or dummy for linear, dummy in zip(cache.is_linear, cache.is_dummy, strict=True))


def check_decoding(model: PreTrainedModel) -> None:
    """Refuse a model that cannot answer left-padded prompts side by side, token by token.

    Raises:
        ValueError: it heeds no attention mask, or does not go on from a cache, or rows cannot leave its cache.
    """
    name, interface = type(model).__name__, backbone_interface(model)
    if not interface.takes_mask:
        raise ValueError(
            f"{name} has no attention mask, so prompts of unequal length could not be answered side by side. "
            f"{UNSUPPORTED_HINT}"
        )
    if interface.cache_name is None:
        raise ValueError(
            f"{name} gives no cache back that it goes on from, so every token would be answered from the start again. "
            + UNSUPPORTED_HINT
        )
    if interface.cached_error > CACHED_STEP_TOLERANCE:
        warnings.warn(
            f"{name} computes other hidden states with its cache than without (relative error "
            f"{interface.cached_error:.1e}), so responses are sampled from another distribution than is scored.",
            stacklevel=2,
        )


@torch.no_grad()
def _probe(model: PreTrainedModel) -> BackboneInterface:
    backbone, device = model.base_model, model.device
    ids = torch.tensor([[1, 2, 3, 1], [3, 1, 2, 2]], device=device)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    takes_positions = _accepts(backbone, ids, position_ids=positions)
    if not _accepts(backbone, ids, attention_mask=mask):
        return BackboneInterface(None, takes_positions, takes_mask=False)

    def run(start: int, end: int, mask: Tensor, **kwargs: Any) -> Any:
        kwargs |= {"position_ids": positions[:, start:end]} if takes_positions else {}
        return backbone(input_ids=ids[:, start:end], attention_mask=mask, **kwargs)

    expected = run(0, 4, mask, use_cache=False).last_hidden_state
    takes_mask = "attention_mask" in inspect.signature(backbone.forward).parameters
    if not takes_mask and device.type != "meta":  # swallowed, or handed on
        takes_mask = not torch.equal(expected, run(0, 4, torch.ones_like(mask), use_cache=False).last_hidden_state)
    for name in CACHE_NAMES:
        cache = cache_of(run(0, 3, mask[:, :3], use_cache=True))
        if cache is None:
            break
        try:
            step = run(3, 4, mask[:, 3:] if is_recurrent(cache) else mask, use_cache=True, **{name: cache})
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError):  # an unknown keyword, or a mask that is longer than the keys
            continue
        if cache_of(step) is cache:  # where the name was swallowed, the step began a cache of its own
            error = (
                0.0
                if device.type == "meta"
                else relative_error(step.last_hidden_state, expected[:, 3:], mask[:, 3:], 0.2)
            )
            return BackboneInterface(name, takes_positions, takes_mask, error)
    return BackboneInterface(None, takes_positions, takes_mask)


def _accepts(backbone: torch.nn.Module, ids: Tensor, **kwargs: Any) -> bool:
    try:
        backbone(input_ids=ids, use_cache=False, **kwargs)
    except TypeError:
        return False
    return True


def unwrap_peft(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model without PEFT's wrapper; its adapters stay in it."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def move_if_movable(model: nn.Module, device: torch.device) -> None:
    """Move a model to a device, unless it is quantized or spread over several: then it stays where it was loaded."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    spread = len({*(getattr(base, "hf_device_map", None) or {}).values()}) > 1
    if not spread and not getattr(base, "is_quantized", False):
        model.to(device)


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse what is no causal language model."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; ppo_plus trains causal (decoder-only) language models.")
    if model.get_output_embeddings() is None or model.base_model is model:
        raise ValueError(f"{name} has no language-model head; pass a model for causal language modelling.")


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Refuse an architecture whose logits are not its head applied to the backbone's last hidden states."""
    check_architecture(model)
    check_decoding(model)
    name, training = type(model).__name__, model.training
    model.eval()
    ids = torch.arange(1, 4, device=model.device)[None]
    expected = model(input_ids=ids, use_cache=False).logits.float()
    outputs = model.base_model(input_ids=ids, use_cache=True)
    found = logits_function(model)(outputs.last_hidden_state).float()
    model.train(training)
    if not expected.isfinite().all():
        raise ValueError(
            f"The logits of {name} are NaN or infinite in {model.dtype}, although its weights are finite: load it in "
            "bf16 or fp32 (model_init_kwargs={'dtype': 'float32'})."
        )
    if type(cache_of(outputs)).batch_select_indices is not Cache.batch_select_indices:  # type: ignore[union-attr]
        raise ValueError(
            f"{name} keeps states beside the layers of its cache, where rows cannot leave them. {UNSUPPORTED_HINT}"
        )
    scale = expected.abs().max().clamp(min=1e-6)
    if found.shape != expected.shape or not bool(((found - expected).abs().max() / scale) < 2e-2):
        raise ValueError(
            f"{name} computes its logits in a way that ppo_plus does not know (the head applied to the last hidden "
            "states gives other numbers). Please open an issue with the name of the model."
        )

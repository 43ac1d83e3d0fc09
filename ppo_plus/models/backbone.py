"""Probe how a decoder without its head is called: the keyword of its cache, and whether it takes positions.

transformers 5.24 renamed the cache of every model, and forwards swallow unknown keywords, so a cache under the wrong
name is lost without an error: each token would be computed without its context. Signatures do not show which names are
used. So each model is probed once per device and dtype, with left-padded rows of unequal length: in one pass, in steps
with a cache, and each row by itself.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from ..kernels.lora import autocast_dtype
from ..utils.contexts import evaluation_mode, set_attributes
from .logprobs import logits_function

# Newest first, because older names may give a deprecation warning.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
# Real tokens of the probed rows, number of last tokens computed with a cache, and largest width of sliding windows.
TRIAL_LENGTHS, TRIAL_STEPS, TRIAL_WINDOW = (5, 12, 9), 4, 4
# (rounding, gross error) of hidden states relative to the largest one. Measured: SmolLM2-135M 1.4e-5 in fp32 and 3e-3
# in bf16; tiny models 6e-6 and 9e-3; models that compute something else 4e-2 to 1.
ERRORS, ERRORS_OF_TF32, ERRORS_IN_HALF = (2e-5, 1e-2), (2e-3, 5e-2), (5e-2, 1e-1)
# Largest ratio of the rounding error of a cached step to that of padding.
ROUNDING_OF_CACHED_STEPS = 30
UNSUPPORTED_HINT = "Choose another model; most decoders of transformers work."


class FailedPassError(ValueError):
    """A model raised an error in a pass over a few tokens, which is the cause of this one."""


@dataclass(frozen=True)
class BackboneInterface:
    """Keywords that a backbone takes, and its errors with them.

    Errors are of hidden states, relative to the largest one.

    Attributes:
        cache_name: keyword of the cache that an earlier pass returned; None if there is none.
        takes_positions: whether it takes `position_ids`.
        takes_mask: whether it takes `attention_mask`, and follows it.
        padding_error: of a left-padded row, relative to the same row by itself.
        cached_error: of steps with a cache, relative to the full pass.
        rounding: largest error that may be rounding, in the precision of the probe.
        gross_error: smallest error that is certainly no rounding.
        device: device of the probe, because kernels differ between devices.
        dtype: dtype of the products in the probe, because kernels differ between dtypes, too.
    """

    cache_name: str | None
    takes_positions: bool
    takes_mask: bool
    padding_error: float = 0.0
    cached_error: float = 0.0
    rounding: float = ERRORS[0]
    gross_error: float = ERRORS[1]
    device: torch.device | None = None
    dtype: torch.dtype | None = None


# By module and for its lifetime; a copy is another module and is probed again.
_interfaces: WeakKeyDictionary[torch.nn.Module, BackboneInterface] = WeakKeyDictionary()


def backbone_interface(model: PreTrainedModel) -> BackboneInterface:
    """Return how the backbone of a model is called; the first call probes it.

    Raises:
        FailedPassError: a pass over a few tokens fails.
    """
    if model not in _interfaces:
        try:
            with evaluation_mode(model), narrow_windows(model):
                _interfaces[model] = replace(_probe(model), device=model.device, dtype=compute_dtype(model))
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise FailedPassError(
                f"{type(model).__name__} fails on a few tokens of text ({type(error).__name__}: {error}). If an "
                "adapter on one of its layers is the cause, leave that out with LoraConfig(exclude_modules=[...]); if "
                f"quantization is, load it without. {UNSUPPORTED_HINT}"
            ) from error
    return _interfaces[model]


def drop_outdated_probe(model: PreTrainedModel) -> bool:
    """Drop the probe of a model on another device or in another dtype; return whether there was one."""
    interface = _interfaces.get(model)
    if interface is None or (interface.device, interface.dtype) == (model.device, compute_dtype(model)):
        return False
    del _interfaces[model]
    return True


@contextlib.contextmanager
def probed_again(model: PreTrainedModel) -> Iterator[None]:
    """Context manager: inside, a model is probed again; the probe of before is restored after the block."""
    interface = _interfaces.pop(model)
    try:
        yield
    finally:
        _interfaces[model] = interface


@contextlib.contextmanager
def narrow_windows(model: PreTrainedModel, width: int = TRIAL_WINDOW) -> Iterator[None]:
    """Context manager: narrow sliding windows, so that a few tokens exceed them.

    Masks and caches read the window from the configuration, some kernels from the attention module.
    """
    configs = [m.config for m in model.modules() if isinstance(getattr(m, "config", None), PreTrainedConfig)]
    with contextlib.ExitStack() as stack:
        for holder in {id(h): h for h in (model.config.get_text_config(), *configs, *model.modules())}.values():
            window = getattr(holder, "sliding_window", None)
            if isinstance(window, int) and not isinstance(window, bool) and window > width:
                stack.enter_context(set_attributes(holder, sliding_window=width))
        yield


def cache_of(outputs: Any) -> Cache | None:
    """Return the cache among the outputs of a model, whatever its name."""
    return next((value for value in outputs.values() if isinstance(value, Cache)), None)


def is_recurrent(cache: Cache) -> bool:
    """Return whether no layer of a cache holds keys, so that masks cover new tokens only."""
    return all(linear or dummy for linear, dummy in zip(cache.is_linear, cache.is_dummy, strict=True))


def check_decoding(model: PreTrainedModel) -> None:
    """Refuse a model that cannot generate for a batch of left-padded prompts with a cache.

    Raises:
        ValueError: it ignores the attention mask, returns no cache that it can use, or computes other hidden states
            with padding or with a cache.
    """
    name, interface = type(model).__name__, backbone_interface(model)
    if not interface.takes_mask:
        raise ValueError(
            f"{name} has no attention mask, so prompts of unequal length cannot be in one batch. {UNSUPPORTED_HINT}"
        )
    if interface.cache_name is None:
        raise ValueError(
            f"{name} returns no cache that it can continue from, so each step would compute all tokens again. "
            f"{UNSUPPORTED_HINT}"
        )
    check_padding(model)
    error = (
        f"{name} computes other hidden states with its cache than without (relative error "
        f"{interface.cached_error:.1e}), so the sampled distribution differs from the scored one."
    )
    if not interface.cached_error <= interface.gross_error:  # or NaN
        raise ValueError(f"{error} {UNSUPPORTED_HINT}")
    if interface.cached_error > interface.rounding:
        warnings.warn(error, stacklevel=2)


def check_padding(model: PreTrainedModel) -> None:
    """Refuse a model whose hidden states depend on left padding."""
    interface = backbone_interface(model)
    if not interface.padding_error <= interface.gross_error:  # or NaN
        raise ValueError(
            f"{type(model).__name__} computes other hidden states for a left-padded row than for the row by itself "
            f"(relative error {interface.padding_error:.1e}), so log-probabilities would depend on the other rows of a "
            f"batch. {UNSUPPORTED_HINT}"
        )


@torch.no_grad()
def _probe(model: PreTrainedModel) -> BackboneInterface:
    backbone, device, length = model.base_model, model.device, max(TRIAL_LENGTHS)
    # No token twice in a row, because a top-k over equal scores (sparse attention, experts) would choose at random.
    tokens = min(length, max(1, model.get_input_embeddings().weight.shape[0] - 1))
    ids = torch.stack([1 + (torch.arange(length) + row) % tokens for row in range(len(TRIAL_LENGTHS))]).to(device)
    mask = torch.tensor([[0] * (length - n) + [1] * n for n in TRIAL_LENGTHS], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    takes_positions = _accepts(backbone, ids, position_ids=positions)
    if not _accepts(backbone, ids, attention_mask=mask):
        return BackboneInterface(None, takes_positions, takes_mask=False)

    def run(ids: Tensor, mask: Tensor, positions: Tensor, **kwargs: Any) -> Any:
        kwargs |= {"position_ids": positions} if takes_positions else {}
        return backbone(input_ids=ids, attention_mask=mask, **kwargs)

    expected = run(ids, mask, positions, use_cache=False).last_hidden_state
    takes_mask, in_half = "attention_mask" in inspect.signature(backbone.forward).parameters, has_few_bits(model)
    padding_error = 0.0
    if device.type != "meta":
        if not takes_mask:  # `**kwargs` may ignore the mask, or pass it to the layers
            unmasked = run(ids, torch.ones_like(mask), positions, use_cache=False).last_hidden_state
            takes_mask = not torch.equal(expected, unmasked)
        for row, n in enumerate(TRIAL_LENGTHS):
            unpadded = ids[row : row + 1, -n:], mask[row : row + 1, -n:], positions[row : row + 1, -n:]
            states = run(*unpadded, use_cache=False).last_hidden_state
            padding_error = max(padding_error, hidden_state_error(expected[row, -n:], states[0], in_half))
    rounding, gross = ERRORS_IN_HALF if in_half else ERRORS if device.type == "cpu" else ERRORS_OF_TF32
    limits = max(rounding, ROUNDING_OF_CACHED_STEPS * padding_error), gross
    name, steps = _run_cached_steps(run, ids, mask, positions)
    cached_error = 0.0
    if steps is not None and device.type != "meta":
        cached_error = hidden_state_error(steps, expected[:, -TRIAL_STEPS:], in_half)
    return BackboneInterface(name, takes_positions, takes_mask, padding_error, cached_error, *limits)


def _run_cached_steps(
    run: Callable[..., Any], ids: Tensor, mask: Tensor, positions: Tensor
) -> tuple[str | None, Tensor | None]:
    """Compute the last `TRIAL_STEPS` tokens one by one with a cache.

    Returns:
        the first name of `CACHE_NAMES` under which the returned cache is used, and the hidden states `(B,
        TRIAL_STEPS, H)`; else `(None, None)`.
    """
    length = ids.shape[1]
    for name in CACHE_NAMES:
        cache = cache_of(run(*(x[:, :-TRIAL_STEPS] for x in (ids, mask, positions)), use_cache=True))
        if cache is None:
            break
        states: list[Tensor] = []
        for end in range(length - TRIAL_STEPS + 1, length + 1):
            new = slice(end - 1, end)
            seen = mask[:, new] if is_recurrent(cache) else mask[:, :end]
            try:
                step = run(ids[:, new], seen, positions[:, new], use_cache=True, **{name: cache})
            except torch.OutOfMemoryError:
                raise
            except (TypeError, ValueError, RuntimeError):  # an unknown keyword, or a mask that is longer than the keys
                break
            if cache_of(step) is not cache:  # the name was ignored, so the step began a new cache
                break
            states.append(step.last_hidden_state)
        if len(states) == TRIAL_STEPS:
            return name, torch.cat(states, 1)
    return None, None


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype in which a model computes: that of autocast if it is on, else that of its weights."""
    return autocast_dtype(model.device.type) or model.dtype


def has_few_bits(model: PreTrainedModel) -> bool:
    """Return whether a model computes in half precision, or has 4-bit or 8-bit layers."""
    is_quantized = bool(getattr(model, "is_quantized", False))
    return compute_dtype(model) in (torch.float16, torch.bfloat16) or is_quantized


def hidden_state_error(states: Tensor, expected: Tensor, in_half: bool) -> float:
    """Return the error of hidden states `(..., H)` at the worst token, relative to the largest state.

    In half precision it is that of the median token, because rounding routes single tokens to other experts.
    """
    errors = (states - expected).float().abs().amax(-1).flatten()
    return float((errors.median() if in_half else errors.max()) / expected.float().abs().max())


def _accepts(backbone: torch.nn.Module, ids: Tensor, **kwargs: Any) -> bool:
    try:
        backbone(input_ids=ids, use_cache=False, **kwargs)
    except TypeError:
        return False
    return True


def unwrap_peft(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the model inside PEFT's wrapper, with its adapters."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def move_if_movable(model: nn.Module, device: torch.device) -> None:
    """Move a model to a device, unless it is quantized or spread over several devices."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    spread = len({*(getattr(base, "hf_device_map", None) or {}).values()}) > 1
    if not spread and not getattr(base, "is_quantized", False):
        model.to(device)


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse models other than causal language models."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; ppo_plus trains causal (decoder-only) language models.")
    if model.get_output_embeddings() is None or model.base_model is model:
        raise ValueError(f"{name} has no language-model head; pass a model for causal language modeling.")


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Refuse an architecture whose logits are not its head applied to the backbone's last hidden states."""
    check_architecture(model)
    check_decoding(model)
    if model.device.type == "meta":  # nothing to compare
        return
    name, ids = type(model).__name__, torch.arange(1, 4, device=model.device)[None]
    with evaluation_mode(model):
        expected = model(input_ids=ids, use_cache=False).logits.float()
        outputs = model.base_model(input_ids=ids, use_cache=True)
        logits = logits_function(model)(outputs.last_hidden_state).float()
    if not expected.isfinite().all():
        raise ValueError(
            f"The logits of {name} are NaN or infinite in {compute_dtype(model)}, although its weights are finite: "
            "load it in bf16 or fp32 (model_init_kwargs={'dtype': 'float32'}), and do not train in fp16 (fp16=False)."
        )
    if type(cache_of(outputs)).batch_select_indices is not Cache.batch_select_indices:  # type: ignore[union-attr]
        raise ValueError(
            f"{name} keeps states outside the layers of its cache, from which finished rows cannot be removed. "
            f"{UNSUPPORTED_HINT}"
        )
    scale = expected.abs().max().clamp(min=1e-6)
    if logits.shape != expected.shape or not bool(((logits - expected).abs().max() / scale) < 2e-2):
        raise ValueError(
            f"{name} computes its logits in an unsupported way (the head applied to the last hidden states gives other "
            "numbers). Please open an issue with the name of the model."
        )

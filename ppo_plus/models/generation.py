"""Decoding: sample responses from the distribution that `ActorCritic.forward` scores."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..algo.logprobs import token_logprobs
from ..kernels.lora import autocast_dtype, cached_lora_weights
from ..utils.devices import float64_device
from .backbone import backbone_interface, cache_of
from .logprobs import logits_function, sample
from .turn_cache import TurnCache, join_rows, keep_row

if TYPE_CHECKING:
    from .actor_critic import ActorCritic


@dataclass
class GenerateOutput:
    """Sampled responses: `tokens` `(B, R)` int64, padded after the stop token, and their `logprobs` `(B, R)`, nats."""

    tokens: Tensor
    logprobs: Tensor


def sample_responses(
    model: ActorCritic, input_ids: Tensor, attention_mask: Tensor, uniforms: Tensor,
    prompt_of_row: Tensor | None = None, *,
    stop_ids: Sequence[int], pad_token_id: int, temperature: float = 1.0,
    logits_processor: Callable[[Tensor], Tensor] | None = None, on_step: Callable[[int], None] | None = None,
    turn_caches: list[TurnCache | None] | None = None, on_row_end: Callable[[int, Tensor], None] | None = None,
) -> GenerateOutput:  # fmt: skip
    """Sample responses from the distribution that `forward` scores.

    No `GenerationConfig` is used: it would fill unset fields from the model's own (`top_k=50`, a repetition
    penalty), and the sampled policy would differ from the scored one. Finished rows leave the batch, so time is
    proportional to the generated tokens.

    Args:
        model: samples in its current role.
        input_ids: prompts, `(B, P)` int64, left-padded; `(U, P)` with `prompt_of_row`.
        attention_mask: 1 for real tokens, in the same shape.
        uniforms: uniform numbers that determine each token, `(B, R)` float64; R is the longest response. NaN
            from the position on where a row has to end earlier.
        prompt_of_row: index of each response's prompt among U prompts, `(B,)` int64. Each prompt runs once, and its
            cache is copied for its responses. None means that prompt i is that of response i.
        stop_ids: ids that end a response.
        pad_token_id: fills the positions after the stop token.
        temperature: divides the logits.
        logits_processor: maps logits at the temperature, `(B, V)`, to the logits sampled from (top-k and the like).
        on_step: called at each decode step with the number of unfinished rows.
        turn_caches: cache of each row; if no entry is None, `input_ids` are the tokens after them. On return, the
            caches of all tokens but the last; None for models that cannot keep them.
        on_row_end: called with the index and the tokens of a response when it ends, while others continue.
    """

    def choose(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits if temperature == 1 else logits / temperature
        token = sample(logits if logits_processor is None else logits_processor(logits), uniforms)
        return token, token_logprobs(logits, token)

    # Importing dynamo takes seconds, so its stance is set only if layers are compiled.
    eager = torch.compiler.set_stance("force_eager") if model.runner.compiled else contextlib.nullcontext()
    with cached_lora_weights(model.policy), eager, _disable_redundant_autocast(model.active_model):
        prompts = input_ids, attention_mask, prompt_of_row
        return _decode(model, prompts, uniforms, stop_ids, pad_token_id, choose, on_step, turn_caches, on_row_end)


def _disable_redundant_autocast(model: PreTrainedModel) -> AbstractContextManager:
    # Autocast to the model's own dtype only takes time, and casts tensors that are in fp32 on purpose.
    kind = model.device.type
    redundant = autocast_dtype(kind) == model.dtype
    return torch.autocast(kind, enabled=False) if redundant else contextlib.nullcontext()


def _decode(
    model: ActorCritic, prompts: tuple[Tensor, Tensor, Tensor | None], uniforms: Tensor, stop_ids: Sequence[int],
    pad_token_id: int, choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    on_step: Callable[[int], None] | None, turn_caches: list[TurnCache | None] | None,
    on_row_end: Callable[[int, Tensor], None] | None,
) -> GenerateOutput:  # fmt: skip
    step_ids, mask, prompt_of_row = prompts
    (rows, length), device, cache = uniforms.shape, step_ids.device, None
    tokens, logprobs = torch.full((rows, length), pad_token_id, device=device), torch.zeros(rows, length, device=device)
    stop, active_rows = torch.tensor(list(stop_ids), device=device), torch.arange(rows, device=device)
    may_continue = torch.nn.functional.pad(~uniforms[:, 1:].isnan(), (0, 1), value=True).to(device)
    head, uniforms = logits_function(model.active_model), uniforms.to(float64_device(device))
    takes_positions = backbone_interface(model.active_model).takes_positions
    kept = [row for row in turn_caches or () if row is not None]
    if kept and len(kept) == rows:
        cache, kept_mask = join_rows(kept)
        mask = torch.cat([kept_mask, mask], 1)
    for t in range(length):
        if on_step is not None:
            on_step(len(active_rows))
        outputs = model.runner.run(model.active_model, step_ids, mask, use_cache=True, cache=cache)
        cache = cache_of(outputs)
        logits = head(outputs.last_hidden_state[:, -1]).float()
        if t == 0 and prompt_of_row is not None:
            model.runner.expand_cache(model.active_model, cache, prompt_of_row, may_share=turn_caches is None)
            logits, mask = logits[prompt_of_row], mask[prompt_of_row]
        token, tokens_logprobs = choose(logits, uniforms[active_rows.to(uniforms.device), t])
        tokens[active_rows, t], logprobs[active_rows, t] = token, tokens_logprobs
        unfinished = ~torch.isin(token, stop) & may_continue[active_rows, t]
        num_unfinished = int(unfinished.sum())  # a host sync, so once per step
        if num_unfinished < len(active_rows) and (turn_caches is not None or on_row_end is not None):
            for row, index in enumerate(active_rows.tolist()):
                if not unfinished[row] and turn_caches is not None and takes_positions:
                    turn_caches[index] = keep_row(cache, row, mask[row])
                if not unfinished[row] and on_row_end is not None:
                    on_row_end(index, tokens[index, : t + 1])
        if num_unfinished == 0:
            break
        if num_unfinished < len(active_rows):
            keep = unfinished.nonzero().squeeze(-1)
            select_rows(cache, keep)
            active_rows, token, mask = active_rows[keep], token[keep], mask[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        step_ids = token[:, None]
    return GenerateOutput(tokens, logprobs)


def select_rows(cache: Any, rows: Tensor) -> None:
    """Replace the rows of a cache by these of them, in place: keys, values, and states of recurrent layers."""
    # Not `batch_select_indices`: layers with attention and recurrence inherit one that skips the recurrent states.
    cache.reorder_cache(rows)

"""Forward passes over backbones: attention kernel, positions, packing, cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..kernels.cpu_attention import EAGER, PACKED_EAGER, SDPA, prefer_eager, select_attention
from ..kernels.frozen_layers import FrozenPrefix, relative_error
from ..kernels.packing import (
    MAX_UNPACKED_PADDING,
    NO_PACKING,
    NoPacking,
    Packing,
    SeqLens,
    make_packing,
    packing_context,
)
from ..kernels.prompt_cache import share_prompts
from ..kernels.shared_prompts import MIN_SHARED_TOKENS, Prefixes, make_shared_packing
from ..utils.contexts import evaluation_mode
from .backbone import (
    backbone_interface,
    cache_of,
    check_head,
    check_padding,
    compute_dtype,
    drop_outdated_probe,
    has_few_bits,
    hidden_state_error,
    is_recurrent,
    narrow_windows,
    probed_again,
)


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens for a backbone.

    Attributes:
        input_ids: `(B, L)` int64.
        attention_mask: 1 for real tokens, `(B, L)`.
        lengths: real tokens of each row, as Python ints; None keeps the padding in the pass.
        frozen_hidden_states: input of the lowest layer that runs in every pass, `(B, L, H)`; None runs all layers.
        prefixes: (group, first tokens that all rows of the group share) per row; None shares none.
    """

    input_ids: Tensor
    attention_mask: Tensor
    lengths: Sequence[int] | None = None
    frozen_hidden_states: Tensor | None = None
    prefixes: Prefixes | None = None

    @classmethod
    def without_last(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor,
        seq_lens: SeqLens | None,
        frozen_hidden_states: Tensor | None = None,
        prefixes: Prefixes | None = None,
    ) -> TokenBatch:
        """Build a batch without the last token of each row, after which no token is scored."""
        lengths = None if seq_lens is None else [tokens - 1 for tokens, _ in seq_lens]
        return cls(input_ids[:, :-1], attention_mask[:, :-1], lengths, frozen_hidden_states, prefixes)


class BackboneRunner:
    """Runs the backbones of several models, each with the fastest supported attention and packing.

    Args:
        models: the policy's language model, then the others.
        use_kernels: if False, all run with their own attention and with padding.

    Raises:
        ValueError: padding or a cache changes the hidden states of a model.

    Attributes:
        compiled: whether layers are compiled. They keep their padding, because the compiler would make a graph for
            each number of rows and tokens.
        sdpa_models: models whose attention may be replaced, because they were loaded with `sdpa`.
        packable_models: those of them that compute the same without padding.
        sharing_models: those of them that compute the same if rows share a prompt; none before
            `enable_shared_prompts`.
        cache_sharing_models: those of them that compute the same if rows share a prompt's keys and values in decoding.
    """

    def __init__(self, models: Sequence[PreTrainedModel], use_kernels: bool) -> None:
        self.compiled, self._models = False, models
        self.sharing_models: list[PreTrainedModel] = []
        self.cache_sharing_models: list[PreTrainedModel] = []
        sdpa = (m for m in models if m.config.get_text_config()._attn_implementation == SDPA)
        eager = (m for m in models if m.config.get_text_config()._attn_implementation == EAGER)
        self._eager_models = list(eager) if use_kernels else []
        self.sdpa_models, self._use_kernels = list(sdpa) if use_kernels else [], use_kernels
        for model in models:
            drop_outdated_probe(model)
        self._probe()

    def probe_moved_models(self) -> None:
        """Probe the models again if one was moved to another device."""
        if any([drop_outdated_probe(model) for model in self._models]):
            self._probe()

    def check_in_autocast(self) -> None:
        """Probe the models once more under autocast, if it is on and has another dtype than their weights.

        Packing and sharing stay as the probe in the dtype of the weights, which is the more exact one, chose them.
        """
        for model in self._models:
            if compute_dtype(model) != model.dtype:
                with probed_again(model):
                    self._check(model)

    def _check(self, model: PreTrainedModel) -> None:
        check_head(model) if model is self._models[0] else check_padding(model)

    def _probe(self) -> None:
        for model in self._models:
            self._check(model)
        self.packable_models = [m for m in self.sdpa_models if self._is_packable(m)]

    def packing(self, model: PreTrainedModel, batch: TokenBatch) -> Packing | NoPacking:
        """Choose the packing of a pass."""
        if self.compiled:
            return NO_PACKING
        if model in self.sharing_models:
            shared = make_shared_packing(batch.attention_mask, batch.lengths, batch.prefixes, MIN_SHARED_TOKENS)
            if shared is not NO_PACKING:
                return shared
        if model not in self.packable_models:
            return NO_PACKING
        return make_packing(batch.attention_mask, batch.lengths, MAX_UNPACKED_PADDING)

    def last_hidden(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        packing: Packing | NoPacking = NO_PACKING,
    ) -> Tensor:
        """Compute last hidden states `(B, L, H)`, or those of the real tokens `(1, T, H)`, of ids `(B, L)`."""
        return cast(Tensor, self.run(model, input_ids, attention_mask, packing).last_hidden_state)

    def run(
        self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor,
        packing: Packing | NoPacking = NO_PACKING, *, use_cache: bool = False, cache: Cache | None = None,
    ) -> Any:  # fmt: skip
        """Run a backbone on ids `(B, L)`; its mask also covers the tokens in the cache."""
        backbone, interface = model.base_model, backbone_interface(model)
        if model in self.sdpa_models:
            select_attention(backbone, input_ids.shape[1], attention_mask.shape[1], packing is not NO_PACKING)
        elif model in self._eager_models:
            text_config = backbone.config.get_text_config()
            text_config._attn_implementation = EAGER if packing is NO_PACKING else PACKED_EAGER
        kwargs: dict[str, Any] = {"use_cache": use_cache}
        if interface.takes_positions:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            kwargs["position_ids"] = packing.pack(positions[:, -input_ids.shape[1] :])
        input_ids = packing.pack(input_ids)
        if packing is not NO_PACKING:
            attention_mask = torch.ones_like(input_ids)
        if cache is not None:
            kwargs[cast(str, interface.cache_name)] = cache
            if is_recurrent(cache):
                attention_mask = attention_mask[:, -input_ids.shape[1] :]
        with packing_context(packing):
            return backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def frozen_prefix(self, model: PreTrainedModel, count: int) -> FrozenPrefix | None:
        """Split a backbone above its lowest layers; None, with a warning, if that would change its hidden states."""
        try:
            with evaluation_mode(model):
                return FrozenPrefix(model.base_model, count, partial(self.last_hidden, model))
        except ValueError as error:
            warnings.warn(f"All layers of {type(model).__name__} run in every pass: {error}.", stacklevel=3)
            return None

    def enable_shared_prompts(self, num_generations: int) -> None:
        """Read a prompt once for all rows that have it, if a model computes the same then; warn if not."""
        if num_generations == 1:
            return
        self.sharing_models = [] if self.compiled else self.find_sharing_models()
        self.cache_sharing_models = [m for m in self.sdpa_models if self._can_share_cache(m)]
        if others := sorted({type(m).__name__ for m in self._models if m not in self.sharing_models}):
            reason = "its layers are compiled" if self.compiled else "its hidden states would differ"
            reason = reason if self._use_kernels else "kernels are turned off"
            warnings.warn(
                f"num_generations={num_generations}: {', '.join(others)} reads a prompt once per response in scoring "
                f"and learning, because {reason}. Results are the same; time and memory are those of repeated prompts.",
                stacklevel=4,
            )

    def expand_cache(self, model: PreTrainedModel, cache: Any, prompt_of_row: Tensor, may_share: bool) -> None:
        """Make rows of responses of a cache of prompts: with shared prompts if that is faster, else with copies."""
        # The fused kernel needs the keys of a row in one tensor.
        is_faster = may_share and model in self.cache_sharing_models and prefer_eager(model.device, model.dtype, 1, 1)
        if not (is_faster and share_prompts(cache, prompt_of_row)):
            cache.reorder_cache(prompt_of_row)

    def find_sharing_models(self) -> list[PreTrainedModel]:
        """Return the models for which a trial with shared prompts gives the hidden states of repeated ones."""
        return [m for m in (*self.packable_models, *self._eager_models) if self._can_share(m)]

    def _is_packable(self, model: PreTrainedModel) -> bool:
        """Return whether a packed pass over this model gives the hidden states of a padded one."""
        ids = torch.tensor([[1, 1, 1, 2, 3, 1], [3, 2, 1, 3, 1, 2], [2, 1, 3, 3, 1, 1]])
        mask = torch.tensor([[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
        packed, padded = self._run_both_ways(model, ids, mask, lambda mask: Packing(mask, [2, 6, 3]))
        # 4-bit kernels sum in another order for fewer rows; errors other than rounding are as large as the states.
        return packed is not None and not relative_error(packed, padded, mask.to(model.device), half_tolerance=0.2)

    def _can_share(self, model: PreTrainedModel) -> bool:
        """Return whether rows that share a prompt get the hidden states that they get with a prompt each.

        The trial has two responses to a prompt of 5 tokens, three to one of 3 and one to one of 4, and narrow windows.
        Hidden states of prompts are not compared, because they are correct even if responses attend to each other.
        """
        prompts, sizes = [[1, 2, 3, 1, 3], [2, 3, 1], [3, 3, 2, 1]], [(4, 2), (1, 5, 3), (2,)]
        prefixes = [(i, len(prompt)) for i, prompt in enumerate(prompts) for _ in sizes[i]]
        added = [n for responses in sizes for n in responses]
        rows = [prompts[i] + [1 + (i + n + t) % 3 for t in range(n)] for (i, _), n in zip(prefixes, added, strict=True)]
        lengths, width = [len(row) for row in rows], max(map(len, rows))
        ids = torch.tensor([[1] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
        with narrow_windows(model):
            shared, padded = self._run_both_ways(
                model, ids, mask, lambda mask: make_shared_packing(mask, lengths, prefixes)
            )
        compared = torch.arange(width) >= width - torch.tensor(added)[:, None]
        return shared is not None and (
            hidden_state_error(shared[compared], padded[compared], has_few_bits(model))
            <= backbone_interface(model).rounding
        )

    @torch.no_grad()
    def _can_share_cache(self, model: PreTrainedModel) -> bool:
        """Return whether two steps after shared keys and values give the hidden states of those after copied ones."""
        if not prefer_eager(model.device, model.dtype, 1, 1):
            return False
        ids, mask = torch.tensor([[1, 2, 3, 1], [1, 1, 3, 2]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
        rows, new, training = torch.tensor([1, 0, 0]), torch.tensor([[3, 1], [2, 3], [1, 2]]), model.training
        states: list[Tensor] = []
        model.eval()
        try:
            for shares in (True, False):
                cache = cast(Cache, cache_of(self.run(model, ids, mask, use_cache=True)))
                if not (share_prompts(cache, rows) if shares else cache.reorder_cache(rows) is None):
                    return False
                for end in (1, 2):
                    seen = torch.cat([mask[rows], torch.ones(3, end, dtype=torch.int64)], 1)
                    outputs = self.run(model, new[:, end - 1 : end], seen, use_cache=True, cache=cache)
                states.append(outputs.last_hidden_state)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError):
            return False
        finally:
            model.train(training)
        shared, copied = states
        return hidden_state_error(shared, copied, has_few_bits(model)) <= backbone_interface(model).rounding

    @torch.no_grad()
    def _run_both_ways(
        self, model: PreTrainedModel, ids: Tensor, mask: Tensor, pack: Callable[[Tensor], Any]
    ) -> tuple[Any, Any]:
        """Return last hidden states `(B, L, H)` of a packed and a padded pass, or None twice on failure."""
        if model.device.type == "meta":
            return None, None
        ids, mask = ids.to(model.device), mask.to(model.device)
        try:
            with evaluation_mode(model):
                packing = pack(mask)
                packed = packing.unpack(self.last_hidden(model, ids, mask, packing))
                return packed, self.last_hidden(model, ids, mask)  # padded last: it restores the model's attention
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError):
            return None, None

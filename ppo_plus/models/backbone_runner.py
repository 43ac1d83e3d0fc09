"""Forward passes over backbones: attention kernel, positions, packing, cache."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..kernels.cpu_attention import SDPA, select_attention
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
from .backbone import backbone_interface, check_head, check_padding, is_probed_on, is_recurrent


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens for a backbone.

    Attributes:
        input_ids: `(B, L)` int64.
        attention_mask: 1 for real tokens, `(B, L)`.
        lengths: real tokens of each row, as Python ints; None keeps the padding in the pass.
        frozen_hidden_states: input of the lowest layer that runs in every pass, `(B, L, H)`; None runs all layers.
    """

    input_ids: Tensor
    attention_mask: Tensor
    lengths: Sequence[int] | None = None
    frozen_hidden_states: Tensor | None = None

    @classmethod
    def without_last(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor,
        seq_lens: SeqLens | None,
        frozen_hidden_states: Tensor | None = None,
    ) -> TokenBatch:
        """Build a batch without the last token of each row, after which no token is scored."""
        lengths = None if seq_lens is None else [tokens - 1 for tokens, _ in seq_lens]
        return cls(input_ids[:, :-1], attention_mask[:, :-1], lengths, frozen_hidden_states)


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
    """

    def __init__(self, models: Sequence[PreTrainedModel], use_kernels: bool) -> None:
        self.compiled, self._models = False, models
        sdpa = (m for m in models if m.config.get_text_config()._attn_implementation == SDPA)
        self.sdpa_models = list(sdpa) if use_kernels else []
        self._probe()

    def probe_moved_models(self) -> None:
        """Probe the models again if one was moved to another device."""
        if not all([is_probed_on(model, model.device) for model in self._models]):
            self._probe()

    def _probe(self) -> None:
        check_head(self._models[0])
        for model in self._models[1:]:
            check_padding(model)
        self.packable_models = [m for m in self.sdpa_models if self._is_packable(m)]

    def packing(self, model: PreTrainedModel, batch: TokenBatch) -> Packing | NoPacking:
        """Choose the packing of a pass."""
        if self.compiled or model not in self.packable_models:
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
        training = model.training
        model.eval()
        try:
            return FrozenPrefix(model.base_model, count, partial(self.last_hidden, model))
        except ValueError as error:
            warnings.warn(f"All layers of {type(model).__name__} run in every pass: {error}.", stacklevel=3)
            return None
        finally:
            model.train(training)

    @torch.no_grad()
    def _is_packable(self, model: PreTrainedModel) -> bool:
        """Return whether a packed pass over this model gives the hidden states of a padded one."""
        if model.device.type == "meta":
            return False
        ids = torch.tensor([[1, 1, 1, 2, 3, 1], [3, 2, 1, 3, 1, 2], [2, 1, 3, 3, 1, 1]], device=model.device)
        mask = torch.tensor([[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], device=model.device)
        packing, training = Packing(mask, [2, 6, 3]), model.training
        model.eval()
        try:
            packed = packing.unpack(self.last_hidden(model, ids, mask, packing))
            padded = self.last_hidden(model, ids, mask)  # last, because it restores the model's attention
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError):
            return False
        finally:
            model.train(training)
        # 4-bit kernels sum in another order for fewer rows; errors other than rounding are as large as the states.
        return not relative_error(packed, padded, mask, half_tolerance=0.2)

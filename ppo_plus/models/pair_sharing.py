"""Reward models that read the prompt of a preference pair once, in one pass over `[prompt, chosen, rejected]`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..data.padding import unpad
from ..kernels.frozen_layers import replaced_forwards
from ..kernels.packing import NO_PACKING, NoPacking
from ..kernels.shared_prompts import MIN_SHARED_TOKENS, SharedPrompts, common_prefixes, make_shared_packing
from .backbone import unwrap_peft
from .backbone_runner import BackboneRunner
from .classifier import is_encoder


class _ClassifierRunner(BackboneRunner):
    """Runs the backbone of a sequence classifier, which has no output head to check."""

    def _probe(self) -> None:
        self.packable_models = [m for m in self.sdpa_models if self._is_packable(m)]


class PairSharing:
    """Lets the backbone of a classifier read once what rows of a batch share at their start.

    The hidden states are those of separate rows up to rounding, so score head, pooling and loss stay unchanged. Batches
    that share less than `MIN_SHARED_TOKENS` run unchanged.

    Args:
        model: a sequence classifier, with adapters or without.

    Attributes:
        supported: whether a trial of the architecture gave the hidden states of separate rows.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self._classifier = unwrap_peft(model)
        self.supported = False
        if not is_encoder(self._classifier.config):
            self._runner = _ClassifierRunner([self._classifier], use_kernels=True)
            self.supported = bool(self._runner.find_sharing_models())

    @contextlib.contextmanager
    def apply(self) -> Iterator[None]:
        """Share what rows have in common in the passes inside the block, if the architecture supports it."""
        backbone = self._classifier.base_model
        separate = backbone.forward

        def forward(input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
            others = [value for value in kwargs.values() if value is not None and not isinstance(value, bool)]
            packing: SharedPrompts | NoPacking = NO_PACKING
            if input_ids is not None and attention_mask is not None and not others:
                packing = _pack(input_ids, attention_mask)
            if packing is NO_PACKING or input_ids is None or attention_mask is None:
                return separate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            with replaced_forwards([backbone], [separate]):  # the runner calls the backbone
                outputs = self._runner.run(self._classifier, input_ids, attention_mask, packing)
            outputs.last_hidden_state = packing.unpack(outputs.last_hidden_state)
            return outputs

        with replaced_forwards([backbone], [forward]) if self.supported else contextlib.nullcontext():
            yield


def _pack(input_ids: Tensor, attention_mask: Tensor) -> SharedPrompts | NoPacking:
    mask = attention_mask.cpu()
    if not bool(mask[:, 0].all()):  # without position ids, the backbone would count left padding
        return NO_PACKING
    rows = unpad(input_ids.cpu(), mask)
    return make_shared_packing(attention_mask, [len(row) for row in rows], common_prefixes(rows), MIN_SHARED_TOKENS)

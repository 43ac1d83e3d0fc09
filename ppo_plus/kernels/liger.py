"""Liger's Triton kernels in the layers of language models: norms, rotary embeddings, gated MLPs.

Trainer patches the outermost model, which for PPO is an `ActorCritic` and not a language model, and it enables a fused
cross entropy, which also replaces the `forward` of a classifier. Here the inner models are patched, and losses stay
off: logits never leave the model, and a reward model has none.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.trainer_utils import TrainOutput
from transformers.utils import is_liger_kernel_available

from ..utils.contexts import evaluation_mode

DEVICES = ("cuda", "xpu", "npu")  # for which Liger has kernels; ROCm calls itself cuda
LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}
MAX_RELATIVE_ERROR = 0.05  # of the largest hidden state; bf16 rounds each operation to 2^-8


def check_liger(args: Any) -> None:
    """Refuse `use_liger_kernel=True` where Liger's kernels cannot run, or with a loss of Liger's."""
    if not args.use_liger_kernel:
        return
    name = type(args).__name__
    if args.device.type not in DEVICES:
        raise ValueError(
            f"{name}: use_liger_kernel=True needs a GPU for which Liger has Triton kernels (CUDA, ROCm, XPU), and "
            f"training is on {args.device.type!r}. Remove it."
        )
    if not is_liger_kernel_available():
        raise ValueError(f"{name}: use_liger_kernel=True needs the package liger-kernel: pip install liger-kernel.")
    losses = [loss for loss in LOSSES if (args.liger_kernel_config or {}).get(loss)]
    if losses:
        raise ValueError(
            f"{name}: liger_kernel_config sets {losses[0]}=True, but the loss here is no cross entropy. Remove it."
        )


def check_liger_model(config: PreTrainedConfig, args: Any) -> None:
    """Refuse a model family, or kernels in `liger_kernel_config`, that Liger does not have; it would ignore them."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"use_liger_kernel=True: this version of liger-kernel has no kernels for model_type={config.model_type!r}. "
            "Remove it."
        )
    kernels = inspect.signature(MODEL_TYPE_TO_APPLY_LIGER_FN[config.model_type]).parameters.keys() - {"model"}
    if unknown := sorted((args.liger_kernel_config or {}).keys() - kernels):
        raise ValueError(
            f"liger_kernel_config has {unknown[0]!r}, which is no kernel of Liger's for {config.model_type!r} and "
            f"would have no effect. Its kernels are {', '.join(sorted(kernels - LOSSES.keys()))}."
        )


def apply_liger(models: Iterable[nn.Module], args: Any) -> None:
    """Patch models on a GPU with Liger's kernels, and check that their hidden states stay the same.

    Args:
        models: language models or classifiers, with or without adapters.
        args: the trainer's arguments; `liger_kernel_config` chooses kernels.

    Raises:
        ValueError: Liger has no kernels for a model, or they give other hidden states.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    for model in models:
        base = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
        check_liger_model(base.config, args)
        expected = probe_states(base)
        _apply_liger_kernel_to_instance(model=base, **{**(args.liger_kernel_config or {}), **LOSSES})
        error = (probe_states(base) - expected).abs().max() / expected.abs().max()
        if not error < MAX_RELATIVE_ERROR:
            raise ValueError(
                f"use_liger_kernel=True: Liger's kernels change the hidden states of {type(base).__name__} by "
                f"{error:.0%}, so they do not fit this version of transformers. Remove it, or install another "
                "liger-kernel."
            )


@torch.no_grad()
def probe_states(model: PreTrainedModel) -> Tensor:
    """Return last hidden states of a few tokens, `(1, 6, H)` float32."""
    ids = torch.arange(1, 7, device=model.device)[None]
    with evaluation_mode(model):
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()


class LigerMixin:
    """Mixin that keeps `Trainer.train` from applying Liger's kernels to the outermost model."""

    args: Any

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train with `use_liger_kernel` off until `Trainer` has read it."""
        self._uses_liger, self.args.use_liger_kernel = self.args.use_liger_kernel, False
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)  # type: ignore[misc]
        finally:
            self.args.use_liger_kernel = self._uses_liger

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple:
        """Restore the user's `use_liger_kernel` for callbacks and saved arguments."""
        self.args.use_liger_kernel = self._uses_liger
        return super().set_initial_training_values(args, dataloader)  # type: ignore[misc]

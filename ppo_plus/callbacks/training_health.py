"""Warnings about runs that do not learn what they should."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from .base import PPOCallback
from .completions import messages_to_text

if TYPE_CHECKING:
    from ..rollout.buffer import Rollout
    from ..rollout.collector import Experience


class TrainingHealthCallback(PPOCallback):
    """Warns, once each and in words, of what usually means that a run is not doing what it seems to.

    Args:
        max_kl: KL per response beyond which text tends to break, nats.
    """

    def __init__(self, max_kl: float = 50.0) -> None:
        self.max_kl = max_kl
        self._warned: set[str] = set()
        self._without_gradient: set[str] | None = None
        self._actor_steps = 0

    def on_rollout_end(
        self, args: Any, state: Any, control: Any, rollout: Rollout, samples: Experience, metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Look at the figures of a rollout."""
        kl, entropy = metrics["kl"], metrics["entropy"]
        truncated = args.top_p < 1 or args.top_k or args.min_p
        # The mean of a log-ratio over few responses scatters around its expectation, which is never negative.
        spread = float(rollout.sequence_kl.std(unbiased=False)) / max(1, len(rollout)) ** 0.5
        self._warn_once(
            "negative KL",
            kl < -0.5 - 4 * spread,
            f"KL to the reference is {kl:.2f} nats per response, and a KL cannot be negative. "
            + (
                "top_p, top_k or min_p sample from another distribution than the one that is scored: turn them off."
                if truncated
                else "Look for a model or reference that changes outside of training, or dropout in one of them."
            ),
        )
        self._warn_once(
            "high KL",
            kl > self.max_kl,
            f"KL to the reference is {kl:.0f} nats per response; beyond {self.max_kl:.0f} text tends to break. Raise "
            "kl_coef, use AdaptiveKLCallback, or lower the learning rate.",
        )
        self._warn_once(
            "entropy",
            entropy < 0.02,
            f"Entropy is {entropy:.3f} nats per token: the policy hardly samples any more. Raise kl_coef or "
            "entropy_coef, or lower the learning rate.",
        )
        texts = {messages_to_text(text) for text in samples.completions.completions}
        self._warn_once(
            "one answer",
            len(texts) == 1 and len(rollout) > 1,
            f"All {len(rollout)} prompts of a rollout got the same answer: the policy has collapsed. Look at what the "
            "reward pays for, and raise kl_coef.",
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look for adapter weights that no step of the first rollout gives a gradient: they keep their values.

        A top-k of scores passes none on (indexers of sparse attention), nor does a layer whose weight is read past its
        forward (Jamba's `dt_proj`), nor a vision tower that sees no image.
        """
        if self._actor_steps >= args.steps_per_rollout or state.global_step < args.critic_warmup_steps:
            return
        trained = dict(getattr(model, "policy", nn.Module()).named_parameters())
        idle = {name for name, p in trained.items() if ".lora_" in name and p.requires_grad and p.grad is None}
        self._without_gradient = idle if self._without_gradient is None else self._without_gradient & idle
        self._actor_steps += 1
        modules = [name.partition(".lora_")[0].removeprefix("base_model.model.") for name in self._without_gradient]
        kinds = sorted({name.rpartition(".")[2] for name in modules})
        self._warn_once(
            "adapters without gradient",
            bool(modules) and self._actor_steps == args.steps_per_rollout,
            f"{len({*modules})} adapters get no gradient, so they never learn: those of {', '.join(kinds[:8])} "
            f"(the first is {min(modules, default='')}). Leave them out: LoraConfig(exclude_modules=[...]).",
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Look at the first ratio of a rollout, which only learning may move away from 1, and at the gradient."""
        logs = logs or {}
        error = logs.get("ppo/initial_ratio_error", 0.0)
        self._warn_once(
            "first ratio",
            error > 0.1,
            f"Before anything was learned from a rollout the ratio was off 1 by {error:.2f} on average: old and new "
            "log-probabilities do not come from the same computation. LoRA dropout does this, and very low precision.",
        )
        self._warn_once(
            "no gradient",
            logs.get("grad_norm") == 0 and state.global_step > args.critic_warmup_steps,
            "The gradient of the actor is exactly 0, so nothing is learned: all answers score alike (reward_std), none "
            "has a score, or the weights that are trained take no part in the forward pass (look at peft_config).",
        )

    def _warn_once(self, kind: str, holds: bool, text: str) -> None:
        if holds and kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, stacklevel=2)

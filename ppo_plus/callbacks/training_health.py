"""Warnings about common failures of PPO runs: high KL, collapsed entropy, no gradient, useless values."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from .base import PPOCallback
from .completions import messages_to_text

if TYPE_CHECKING:
    from ..rollout.buffer import Rollout
    from ..rollout.experience import Experience

MAX_USELESS_VALUES = 5  # rollouts
MAX_LOGP_DIFFERENCE = 0.1  # nats per token; two implementations of the same bf16 model differ by up to 0.05


class TrainingHealthCallback(PPOCallback):
    """Warn, once per problem, about metrics that usually indicate a failing run.

    Args:
        max_kl: KL per response above which generated text tends to degenerate, nats.
    """

    def __init__(self, max_kl: float = 50.0) -> None:
        self.max_kl = max_kl
        self._warned: set[str] = set()
        self._without_gradient: set[str] | None = None
        self._actor_steps = 0
        self._useless_values = 0  # consecutive rollouts whose values predict returns worse than the mean return

    def on_rollout_end(
        self, args: Any, state: Any, control: Any, rollout: Rollout, samples: Experience, metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Check KL, entropy and completions of a rollout."""
        kl, entropy = metrics["kl"], metrics.get("entropy", math.inf)
        truncated = args.top_p < 1 or args.top_k or args.min_p
        # The mean log-ratio over few responses varies around its expectation, which is never negative.
        standard_error = float(rollout.sequence_kl.std(unbiased=False)) / max(1, len(rollout)) ** 0.5
        self._warn_once(
            "negative KL",
            kl < -0.5 - 4 * standard_error,
            f"KL to the reference is {kl:.2f} nats per response, and a KL cannot be negative. "
            + (
                "top_p, top_k or min_p sample from a different distribution than the scored one: disable them."
                if truncated
                else "Check whether the model or the reference changes outside of training, or has dropout."
            ),
        )
        self._warn_once(
            "high KL",
            kl > self.max_kl,
            f"KL to the reference is {kl:.0f} nats per response; above {self.max_kl:.0f} generated text tends to "
            "degenerate. Raise kl_coef, use AdaptiveKLCallback, or lower the learning rate.",
        )
        self._warn_once(
            "entropy",
            entropy < 0.02,
            f"Entropy is {entropy:.3f} nats per token: sampling is almost deterministic. Raise kl_coef or "
            "entropy_coef, or lower the learning rate.",
        )
        self._check_critic(args, state, metrics.get("critic/explained_variance_mc", 0.0))
        self._check_sampling(args, metrics.get("sampling/logp_difference", 0.0))
        texts = {messages_to_text(text) for text in samples.completions.completions}
        self._warn_once(
            "one answer",
            len(texts) == 1 and len(rollout) > 1,
            f"All {len(rollout)} prompts of a rollout got the same answer: the policy has collapsed. Check the reward "
            "function, and raise kl_coef.",
        )

    def _check_sampling(self, args: Any, difference: float) -> None:
        advice = "Set objective='masked', whose ratios are to the sampler, or load the model in another dtype."
        if args.use_vllm:
            advice = (
                "Start the server with the trainer's model and dtype and without quantization, or set "
                "objective='masked', whose ratios are to the sampler. top_p, top_k and min_p are part of the distance."
            )
        self._warn_once(
            "sampling",
            difference > MAX_LOGP_DIFFERENCE,
            f"Responses are sampled from another distribution than the one that is trained: their log-probabilities "
            f"differ by {difference:.2f} nats per token (sampling/logp_difference). Importance weights correct a part, "
            f"up to importance_sampling_cap={args.importance_sampling_cap}. {advice}",
        )

    def _check_critic(self, args: Any, state: Any, explained: float) -> None:
        useless = explained < 0 and state.global_step > args.critic_warmup_steps  # before, nothing depends on values
        self._useless_values = self._useless_values + 1 if useless else 0
        self._warn_once(
            "critic",
            self._useless_values >= MAX_USELESS_VALUES and not args.critic_gate,
            f"In {MAX_USELESS_VALUES} rollouts in a row the critic predicted returns worse than their mean (explained "
            f"variance {explained:.2f}), so its values raise the variance of advantages instead of lowering it (EVPO, "
            "arXiv 2604.19485). Set critic_gate=True, train the critic longer before the actor (critic_warmup_steps), "
            "or set lam=1, which uses values as a baseline only.",
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look for adapter weights that no step of the first rollout gives a gradient: they keep their values.

        A top-k of scores passes none on (indexers of sparse attention), nor does a layer whose weight is read past its
        forward (Jamba's `dt_proj`), nor a vision tower that sees no image.
        """
        if self._actor_steps >= args.steps_per_rollout or state.global_step < args.critic_warmup_steps:
            return
        trained = dict(getattr(model, "policy", nn.Module()).named_parameters())
        adapted = {name: p for name, p in trained.items() if ".lora_" in name and p.requires_grad}
        idle = {name for name, parameter in adapted.items() if parameter.grad is None}
        if len(idle) == len(adapted):  # a step that is skipped: fp16 begins with a few, whose loss scale is too high
            return
        self._without_gradient = idle if self._without_gradient is None else self._without_gradient & idle
        self._actor_steps += 1
        modules = [name.partition(".lora_")[0].removeprefix("base_model.model.") for name in self._without_gradient]
        kinds = sorted({name.rpartition(".")[2] for name in modules})
        others = f" and of {len(kinds) - 8} other kinds" if len(kinds) > 8 else ""
        self._warn_once(
            "adapters without gradient",
            bool(modules) and self._actor_steps == args.steps_per_rollout,
            f"{len({*modules})} adapters get no gradient, so they never learn: those of {', '.join(kinds[:8])}{others} "
            f"(the first is {min(modules, default='')}). Leave them out: LoraConfig(exclude_modules=[...]).",
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Check the initial ratio of a rollout, which must be 1, and the gradient norm."""
        logs = logs or {}
        error = logs.get("ppo/initial_ratio_error", 0.0)
        self._warn_once(
            "first ratio",
            error > 0.1,
            f"Before the first optimizer step on a rollout the ratio differed from 1 by {error:.2f} on average: old "
            "and new log-probabilities are computed differently. Common causes are lora_dropout above 0 and a model in "
            "very low precision.",
        )
        self._warn_once(
            "no gradient",
            logs.get("grad_norm") == 0 and state.global_step > args.critic_warmup_steps,
            "The gradient of the actor is exactly 0, so nothing is learned: all answers have the same score (see "
            "reward_std), no answer has a score, or the trainable weights are not used in the forward pass (check "
            "peft_config).",
        )

    def _warn_once(self, key: str, condition: bool, message: str) -> None:
        if condition and key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=2)

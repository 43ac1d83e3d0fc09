"""The planner's configuration, and the memory of its phases."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..models.actor_critic import Critic

PARTS = ("weights", "adapters", "gradients", "optimizer", "kv_cache", "activations", "logits")
Quantization = Literal["nf4", "int8", "bf16", "fp32"]
Parts = dict[str, int]


@dataclass(frozen=True)
class PlannerConfig:
    """Configuration of a run to plan.

    Attributes:
        prompt_length: tokens of the longest prompt.
        response_length: tokens of the longest response.
        rollout_batch_size: responses per rollout.
        num_mini_batches: optimizer steps per pass over a rollout.
        quantization: of the base's linear layers; "bf16" and "fp32" are none. Embeddings, norms and the output head
            are bf16, with "fp32" fp32; all except "fp32" run under bf16 autocast, as PPOConfig if it can.
        lora_r: rank of the LoRA adapter on all linear layers; adapters are fp32.
        critic: as in PPOConfig; "separate" is a second model, trained in full, in fp32.
        reward: "adapter" loads a reward adapter of the same rank onto the base, "none" has no weights.
        activation_checkpointing: recompute activations in the backward pass.
    """

    prompt_length: int = 256
    response_length: int = 512
    rollout_batch_size: int = 64
    num_mini_batches: int = 2
    quantization: Quantization = "nf4"
    lora_r: int = 16
    critic: Critic = "shared"
    reward: Literal["adapter", "none"] = "adapter"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt_length", "response_length", "rollout_batch_size", "num_mini_batches", "lora_r"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more; got {getattr(self, name)}.")
        if self.rollout_batch_size % self.num_mini_batches:
            raise ValueError(
                f"rollout_batch_size={self.rollout_batch_size} is not a multiple of num_mini_batches="
                f"{self.num_mini_batches}, so minibatches would differ in size."
            )
        choices = {"quantization": get_args(Quantization), "critic": get_args(Critic), "reward": ("adapter", "none")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the base's weights that are not quantized."""
        return torch.float32 if self.quantization == "fp32" else torch.bfloat16


@dataclass(frozen=True)
class Phase:
    """Peak memory of one phase with this many rows per batch: bytes by part."""

    name: str
    rows: int
    parts: Parts

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


class MemoryEstimator(abc.ABC):
    """Predicts the memory of the phases of a run.

    A pass has segments: before the first layer, in the layers, after the last, and so on, also backward. The peak of a
    segment is at the same operation for any number of layers, so it can be extrapolated.

    Attributes:
        parameters: see `Plan`.
    """

    parameters: Parts

    @abc.abstractmethod
    def segment_peaks(self, phase: str, rows: int) -> list[Parts]:
        """Predict bytes by part at the peak of each segment of "prefill", "decode", "score" or "learn"."""

    def generate(self, rows: int) -> Phase:
        """Predict decoding: the pass over the prompts, or the last token."""
        return self._phase("generate", rows, "prefill", "decode")

    def score(self, rows: int) -> Phase:
        """Predict scoring: log-probabilities, values and entropies; other models than the actor need less."""
        return self._phase("score", rows, "score")

    def learn(self, rows: int) -> Phase:
        """Predict a micro-batch forward and backward, with the gradients of the previous one."""
        return self._phase("learn", rows, "learn")

    def _phase(self, name: str, rows: int, *phases: str) -> Phase:
        peaks = [parts for phase in phases for parts in self.segment_peaks(phase, rows)]
        return Phase(name, rows, max(peaks, key=lambda parts: sum(parts.values())))

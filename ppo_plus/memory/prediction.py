"""What is planned for, and what a prediction says of its phases."""

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
    """What is planned for.

    Attributes:
        prompt_length: tokens of the longest prompt.
        response_length: tokens of the longest response.
        rollout_batch_size: responses per rollout.
        num_mini_batches: optimizer steps per pass over a rollout.
        quantization: of the base's linear layers; "bf16" and "fp32" are none. Embeddings, norms and the output head
            are bf16, with "fp32" fp32; all but "fp32" run under bf16 autocast, as PPOConfig does where it can.
        lora_r: rank of the LoRA adapter on all linear layers; adapters are fp32.
        critic: as in PPOConfig; "separate" is a model of its own, trained in full, in fp32.
        reward: "adapter" mounts a reward adapter of the same rank on the base, "none" has no weights.
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
                f"{self.num_mini_batches}: a minibatch would not be whole."
            )
        choices = {"quantization": get_args(Quantization), "critic": get_args(Critic), "reward": ("adapter", "none")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")

    @property
    def dtype(self) -> torch.dtype:
        """Of whatever of the base is not quantized."""
        return torch.float32 if self.quantization == "fp32" else torch.bfloat16


@dataclass(frozen=True)
class Phase:
    """Memory of one phase at its highest moment: bytes by part, with this many rows at a time."""

    name: str
    rows: int
    parts: Parts

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


class MemoryEstimator(abc.ABC):
    """What the phases of a run take; a subclass says how that is found.

    A pass is told in stretches: before the first layer, in the layers, after the last, and so on, backward too. Within
    a stretch the highest moment is the same one whatever the number of layers.

    Attributes:
        parameters: see `Plan`.
    """

    parameters: Parts

    @abc.abstractmethod
    def segment_peaks(self, work: str, rows: int) -> list[Parts]:
        """Bytes by part at the highest moment of each stretch of "prefill", "decode", "score" or "learn"."""

    def generate(self, rows: int) -> Phase:
        """Decoding: reading the prompts, or sampling the last token."""
        return self._phase("generate", rows, "prefill", "decode")

    def score(self, rows: int) -> Phase:
        """Log-probabilities, values and entropies without gradients; the reference and a reward adapter need less."""
        return self._phase("score", rows, "score")

    def learn(self, rows: int) -> Phase:
        """A micro-batch forward and backward, with the gradients of the one before."""
        return self._phase("learn", rows, "learn")

    def _phase(self, name: str, rows: int, *works: str) -> Phase:
        found = [parts for work in works for parts in self.segment_peaks(work, rows)]
        return Phase(name, rows, max(found, key=lambda parts: sum(parts.values())))

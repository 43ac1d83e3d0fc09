"""The planner's configuration, and the memory of its phases."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Literal

import torch

from ..config.checks import _field, at_least, check_fields
from ..config.critic_fields import Critic

PARTS = ("weights", "adapters", "gradients", "optimizer", "kv_cache", "activations", "logits")
Quantization = Literal["nf4", "int8", "bf16", "fp32"]
Parts = dict[str, int]


@dataclass(frozen=True)
class PlannerConfig:
    """Configuration of a run to plan; all except "fp32" run under bf16 autocast, as PPOConfig where it can."""

    prompt_length: int = _field(256, "Tokens of the longest prompt.", at_least(1))
    response_length: int = _field(512, "Tokens of the longest response.", at_least(1))
    rollout_batch_size: int = _field(64, "Responses per rollout.", at_least(1))
    num_mini_batches: int = _field(2, "Optimizer steps per pass over a rollout.", at_least(1))
    quantization: Quantization = _field(
        "nf4", "Of the base's linear layers; bf16 and fp32 are none. Other layers are bf16, with fp32 fp32."
    )
    lora_r: int = _field(16, "Rank of the LoRA adapter on all linear layers; adapters are fp32.", at_least(1))
    critic: Critic = _field("shared", "As in PPOConfig; separate is a second model, trained in full, in fp32.")
    reward: Literal["adapter", "none"] = _field(
        "adapter", "A reward adapter of the same rank on the base, or a reward without weights."
    )
    activation_checkpointing: bool = _field(False, "Recompute activations in the backward pass.")
    processes: int = _field(1, "Processes over which the base is sharded, as with fsdp=True.", at_least(1))
    gather_layers: bool = _field(
        False, "With several processes: gather layer by layer in rollouts too, as ds3_gather_for_generation=False."
    )

    def __post_init__(self) -> None:
        check_fields(self, PlannerConfig)
        if self.rollout_batch_size % self.num_mini_batches:
            raise ValueError(
                f"rollout_batch_size={self.rollout_batch_size} is not a multiple of num_mini_batches="
                f"{self.num_mini_batches}, so minibatches would differ in size."
            )
        if self.gather_layers and self.processes == 1:
            raise ValueError("gather_layers=True has no effect with processes=1, whose base is whole: remove it.")

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

"""From predictions to the largest batch sizes that fit a card, and a plan as text or JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from .layers import predict
from .prediction import PARTS, Parts, Phase, PlannerConfig

GIB = 2**30
# Assumed, not computed: what a process takes of a card before its first tensor (CUDA context, kernels, cuBLAS
# workspace), and the share of the rest that the caching allocator loses to rounding and fragments.
CUDA_CONTEXT = GIB // 2
ALLOCATOR_SHARE = 0.05


@dataclass(frozen=True)
class Plan:
    """A prediction: phases at the proposed sizes, and what there is.

    Attributes:
        parameters: of the base, counted by kind, and of a critic of its own.
        phases: generate, score, learn.
        budget: bytes that tensors may take; the card less context and allocator.
        setup: what was planned for.
        gradient_accumulation_steps: micro-batches of `learn`'s rows per minibatch.
    """

    parameters: Parts
    phases: tuple[Phase, Phase, Phase]
    budget: int
    setup: PlannerConfig
    gradient_accumulation_steps: int

    @property
    def fits(self) -> bool:
        """Whether every phase stays within the budget."""
        return all(phase.total <= self.budget for phase in self.phases)

    @property
    def sizes(self) -> dict[str, int]:
        """The proposed fields of PPOConfig."""
        generate, score, learn = self.phases
        return {
            "per_device_train_batch_size": learn.rows,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "num_mini_batches": self.setup.num_mini_batches,
            "local_rollout_forward_batch_size": score.rows,
            "generation_batch_size": generate.rows,
        }


def plan(
    config: PretrainedConfig, setup: PlannerConfig, vram: float, value_config: PretrainedConfig | None = None
) -> Plan:
    """Predict memory by phase and propose the largest batch sizes that fit.

    Args:
        config: of a causal language model; no weights are read.
        setup: what to plan for.
        vram: of the card, GiB.
        value_config: of the critic's own model, where `setup.critic` is "separate".

    Returns:
        a plan; where not even single rows fit, one of single rows whose `fits` is False.

    Raises:
        ValueError: sizes do not go together, or the model cannot run without its weights, as some with experts.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not math.isfinite(vram * GIB):
        raise ValueError(f"vram={vram} is no size of a card: give a number of GiB, as 24.")
    if vram * GIB <= CUDA_CONTEXT:
        raise ValueError(f"vram={vram} GiB is not more than a CUDA context takes ({CUDA_CONTEXT / GIB} GiB).")
    if context is not None and setup.prompt_length + setup.response_length > context:
        raise ValueError(
            f"prompt_length + response_length = {setup.prompt_length + setup.response_length} tokens are more than "
            f"this model's context of {context}: lower one of them."
        )
    if (setup.critic == "separate") != (value_config is not None):
        raise ValueError(
            "critic='separate' and a model for the critic go together (value_config, --value-model): give both or none."
        )
    budget = int((vram * GIB - CUDA_CONTEXT) * (1 - ALLOCATOR_SHARE))
    minibatch = setup.rollout_batch_size // setup.num_mini_batches
    try:
        run = predict(config, setup, value_config)
        generate = largest(run.generate, setup.rollout_batch_size, budget)
        score = largest(run.score, setup.rollout_batch_size, budget)
        learn = largest(run.learn, minibatch, budget)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"The memory of a {config.model_type} cannot be planned: it does not run without its weights "
            f"({str(error).strip().splitlines()[0]}). Measure it: torch.cuda.max_memory_reserved() after two steps."
        ) from error
    return Plan(run.parameters, (generate, score, learn), budget, setup, minibatch // learn.rows)


def largest(run: Callable[[int], Phase], most: int, budget: int) -> Phase:
    """The phase with the largest divisor of `most` rows that fits; with one row where none does."""
    one = run(1)
    if most == 1 or one.total > budget:
        return one
    per_row = max(run(2).total - one.total, 1)
    for rows in sorted((n for n in range(2, most + 1) if most % n == 0), reverse=True):
        # Memory is a straight line in rows but for rounding and logits that do not fill a chunk: the line saves the
        # runs that are far off, a run decides.
        if one.total + (rows - 1) * per_row <= 1.1 * budget and (phase := run(rows)).total <= budget:
            return phase
    return one


def table(found: Plan) -> str:
    """A plan as text."""
    counts = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in found.parameters.items())
    lines = [f"Parameters: {counts}.", "", f"{'GiB':<14}" + "".join(f"{p.name:>10}" for p in found.phases)]
    for part in PARTS:
        lines.append(f"{part:<14}" + "".join(f"{p.parts[part] / GIB:>10.2f}" for p in found.phases))
    lines.append(f"{'together':<14}" + "".join(f"{p.total / GIB:>10.2f}" for p in found.phases))
    lines.append(f"{'rows at a time':<14}" + "".join(f"{p.rows:>10}" for p in found.phases))
    lines += ["", f"There are {found.budget / GIB:.2f} GiB for tensors: the card less {CUDA_CONTEXT / GIB} GiB for CUDA"
              f" and {ALLOCATOR_SHARE:.0%} of the rest for the allocator (both assumed)."]  # fmt: skip
    if found.fits:
        return "\n".join([*lines, "", "PPOConfig(" + ", ".join(f"{k}={v}" for k, v in found.sizes.items()) + ")"])
    over = max(found.phases, key=lambda phase: phase.total)
    lines += [
        "",
        f"This does not fit: with one row, {over.name} needs {(over.total - found.budget) / GIB:.2f} GiB more.",
    ]
    remedies = {
        "critic='shared'": found.setup.critic == "separate",
        "quantization='nf4'": found.setup.quantization != "nf4",
        "activation_checkpointing=True": over.name == "learn" and not found.setup.activation_checkpointing,
        "a shorter prompt or response": True,
    }
    return "\n".join([*lines, "Try " + ", ".join(remedy for remedy, helps in remedies.items() if helps) + "."])


def as_dict(found: Plan) -> dict[str, Any]:
    """A plan for JSON; bytes."""
    phases = {p.name: {**p.parts, "together": p.total, "rows": p.rows} for p in found.phases}
    return {
        "parameters": found.parameters, "phases": phases, "budget": found.budget, "fits": found.fits,
        "sizes": found.sizes, "setup": dataclasses.asdict(found.setup),
    }  # fmt: skip

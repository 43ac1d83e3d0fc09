"""Plan the largest batch sizes that fit a card, as text or JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from ..models.backbone import FailedPassError
from .layers import predict
from .prediction import PARTS, Parts, Phase, PlannerConfig

GIB = 2**30
# Assumed, not computed: memory of a process before its first tensor (CUDA context, kernels, cuBLAS workspace), and the
# share of the rest that the caching allocator loses to rounding and fragmentation.
CUDA_CONTEXT = GIB // 2
ALLOCATOR_SHARE = 0.05


@dataclass(frozen=True)
class Plan:
    """Predicted memory of each phase at the proposed batch sizes.

    Attributes:
        parameters: counts of the base by kind, and of a separate critic.
        phases: generate, score, learn.
        budget: bytes for tensors: the card less CUDA context and allocator.
        setup: configuration that was planned for.
        gradient_accumulation_steps: micro-batches of `learn`'s rows per minibatch.
    """

    parameters: Parts
    phases: tuple[Phase, Phase, Phase]
    budget: int
    setup: PlannerConfig
    gradient_accumulation_steps: int

    @property
    def fits(self) -> bool:
        """Whether every phase is within the budget."""
        return all(phase.total <= self.budget for phase in self.phases)

    @property
    def batch_sizes(self) -> dict[str, int]:
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
        config: config of a causal language model; no weights are read.
        setup: configuration to plan for.
        vram: memory of the card, GiB.
        value_config: config of the critic's model, if `setup.critic` is "separate".

    Returns:
        a plan; if not even single rows fit, one of single rows whose `fits` is False.

    Raises:
        ValueError: sizes contradict each other, or the model cannot run on fake tensors, as some with experts.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not math.isfinite(vram * GIB):
        raise ValueError(f"vram={vram} is not the memory of a card: pass a number of GiB, such as 24.")
    if vram * GIB <= CUDA_CONTEXT:
        raise ValueError(f"vram={vram} GiB must be more than a CUDA context takes ({CUDA_CONTEXT / GIB} GiB).")
    if context is not None and setup.prompt_length + setup.response_length > context:
        raise ValueError(
            f"prompt_length + response_length = {setup.prompt_length + setup.response_length} tokens are more than "
            f"this model's context of {context}: lower one of them."
        )
    if (setup.critic == "separate") != (value_config is not None):
        raise ValueError(
            "critic='separate' needs a model for the critic (value_config, --value-model), and only it: pass both or "
            "none."
        )
    budget = int((vram * GIB - CUDA_CONTEXT) * (1 - ALLOCATOR_SHARE))
    minibatch = setup.rollout_batch_size // setup.num_mini_batches
    try:
        run = predict(config, setup, value_config)
        generate = max_batch_size(run.generate, setup.rollout_batch_size, budget)
        score = max_batch_size(run.score, setup.rollout_batch_size, budget)
        learn = max_batch_size(run.learn, minibatch, budget)
    except (RuntimeError, AttributeError, FailedPassError) as error:
        cause = error.__cause__ if isinstance(error, FailedPassError) else error
        raise ValueError(
            f"The memory of model_type={config.model_type!r} cannot be planned: it does not run on fake tensors "
            f"({str(cause).strip().splitlines()[0]}). Measure it: torch.cuda.max_memory_reserved() after two steps."
        ) from error
    return Plan(run.parameters, (generate, score, learn), budget, setup, minibatch // learn.rows)


def max_batch_size(run: Callable[[int], Phase], limit: int, budget: int) -> Phase:
    """Return the phase with the largest divisor of `limit` rows that fits, or with one row if none does."""
    one = run(1)
    if limit == 1 or one.total > budget:
        return one
    per_row = max(run(2).total - one.total, 1)
    for rows in sorted((n for n in range(2, limit + 1) if limit % n == 0), reverse=True):
        # Memory is linear in rows except for rounding and partly filled chunks of logits, so sizes far above the budget
        # need no run.
        if one.total + (rows - 1) * per_row <= 1.1 * budget and (phase := run(rows)).total <= budget:
            return phase
    return one


def table(plan: Plan) -> str:
    """Format a plan as text."""
    counts = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in plan.parameters.items())
    lines = [f"Parameters: {counts}.", "", f"{'GiB':<14}" + "".join(f"{p.name:>10}" for p in plan.phases)]
    for part in PARTS:
        lines.append(f"{part:<14}" + "".join(f"{p.parts[part] / GIB:>10.2f}" for p in plan.phases))
    lines.append(f"{'total':<14}" + "".join(f"{p.total / GIB:>10.2f}" for p in plan.phases))
    lines.append(f"{'batch size':<14}" + "".join(f"{p.rows:>10}" for p in plan.phases))
    lines += ["", f"Budget for tensors: {plan.budget / GIB:.2f} GiB, the card less {CUDA_CONTEXT / GIB} GiB for CUDA"
              f" and {ALLOCATOR_SHARE:.0%} of the rest for the allocator (both assumed)."]  # fmt: skip
    if plan.fits:
        return "\n".join([*lines, "", "PPOConfig(" + ", ".join(f"{k}={v}" for k, v in plan.batch_sizes.items()) + ")"])
    over = max(plan.phases, key=lambda phase: phase.total)
    excess = (over.total - plan.budget) / GIB
    lines += ["", f"This does not fit: with one row, {over.name} needs {excess:.2f} GiB more."]
    remedies = {
        "critic='shared'": plan.setup.critic == "separate",
        "quantization='nf4'": plan.setup.quantization != "nf4",
        f"processes={2 * plan.setup.processes}": over.name == "learn" or plan.setup.gather_layers,
        "gather_layers=True": plan.setup.processes > 1 and over.name != "learn" and not plan.setup.gather_layers,
        "activation_checkpointing=True": over.name == "learn" and not plan.setup.activation_checkpointing,
        "a shorter prompt or response": True,
    }
    return "\n".join([*lines, "Try " + ", ".join(remedy for remedy, helps in remedies.items() if helps) + "."])


def as_dict(plan: Plan) -> dict[str, Any]:
    """Convert a plan for JSON; bytes."""
    phases = {p.name: {**p.parts, "total": p.total, "rows": p.rows} for p in plan.phases}
    return {
        "parameters": plan.parameters, "phases": phases, "budget": plan.budget, "fits": plan.fits,
        "batch_sizes": plan.batch_sizes, "setup": dataclasses.asdict(plan.setup),
    }  # fmt: skip

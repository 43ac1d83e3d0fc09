"""Fields of `PPOConfig` about values: the critic, how it is trained, and the lambdas of advantages and targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .checks import PROBABILITY, _field, above, at_least, below

Critic = Literal["shared", "detached", "adapter", "separate"]


@dataclass(repr=False)
class CriticFields:
    """The critic of a run, and how much advantages and value targets rely on it."""

    # Critic
    critic: Critic = _field(
        "shared",
        "Backbone of the value head: the actor, the actor without gradient, a second adapter, or value_model.",
    )
    value_head: Literal["linear", "mlp"] = _field("linear", "Architecture of the value head.")
    value_head_activation: Literal["silu", "gelu"] = _field("silu", "Activation of value_head='mlp'.")
    prefix_reward_baseline: bool | None = _field(
        None, "Regress values on the reward adapter's prefix scores; None: for critic='shared' and 'detached'."
    )
    value_head_learning_rate: float = _field(1e-4, "Learning rate of the value head.", at_least(0))
    critic_backbone_learning_rate: float = _field(
        2e-5, "Learning rate of the critic's adapter (critic='adapter') or model (critic='separate').", at_least(0)
    )
    critic_warmup_steps: int = _field(0, "Number of initial optimizer steps that train only the critic.", at_least(0))
    critic_warmup_explained_variance: float | None = _field(
        None,
        "End the warm-up, with Monte Carlo targets, at the first rollout explained better than this.",
        at_least(0) & below(1),
    )
    critic_checkpoint: str | None = _field(
        None, "Folder of an earlier run or checkpoint whose critic this run starts with."
    )
    critic_peft_config: dict[str, Any] | str | None = _field(
        None, "Fields of peft_config that differ for critic='adapter', such as target_modules and r."
    )
    num_critic_updates: int = _field(
        1, "Updates of a critic with a backbone of its own per actor update, on the same minibatch.", at_least(1)
    )

    # Lambdas and gate
    lam_value: float | None = _field(
        None, "GAE lambda of the value targets, 1 for Monte Carlo; None means that of the advantages.", PROBABILITY
    )
    length_adaptive_alpha: float | None = _field(
        None, "Lambda of advantages is 1 - 1/(alpha * tokens of the response) instead of lam; None means lam.", above(0)
    )
    critic_gate: bool = _field(
        False, "Use the batch mean instead of values in rollouts whose explained variance is not above 0 (EVPO)."
    )
    advantage_baseline: Literal["none", "rloo"] = _field(
        "none", "'rloo': values are the mean return of the prompt's other responses, and the critic learns the rest."
    )

    @property
    def uses_prefix_reward_baseline(self) -> bool:
        """Whether a baseline from prefix scores is added to the values, with None resolved by `critic`."""
        if self.prefix_reward_baseline is None:
            return self.critic in ("shared", "detached") and self.advantage_baseline == "none"
        return self.prefix_reward_baseline

    def _check_critic(self) -> None:
        if self.critic_warmup_explained_variance is not None and self.critic_warmup_steps == 0:
            raise ValueError(
                "PPOConfig: critic_warmup_explained_variance ends a warm-up early, and critic_warmup_steps=0 makes "
                "none: set critic_warmup_steps to the most steps that it may take."
            )
        if self.critic_peft_config and self.critic != "adapter":
            raise ValueError(
                f"PPOConfig: critic_peft_config has no effect with critic={self.critic!r}, which has no adapter of its "
                "own: set critic='adapter', or remove it."
            )

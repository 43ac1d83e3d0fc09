"""`ppo-plus ppo`: train any causal language model with PPO, on any prompts and rewards.

The arguments are those of `PPOConfig`, of TRL's `ModelConfig` (base, LoRA, quantization) and of `PromptArguments`
below. The dataset needs a column `prompt`, text or messages; all other columns are passed to reward functions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig

from ..callbacks.kl import AdaptiveKLCallback
from ..config import PPOConfig
from ..config.checks import _field
from .data import DataArguments, create_and_train, finish, load_reward


@dataclass(kw_only=True)
class PromptArguments(DataArguments):
    """Prompts, rewards and the KL target."""

    reward_funcs: list[str] = field(
        metadata={"help": "Reward adapters or sequence classifiers (folder or name), or functions as module:function."}
    )
    tools: list[str] = field(
        default_factory=list, metadata={"help": "Functions that the model may call, as module:function."}
    )
    kl_target: float | None = _field(None, "Target KL to the reference, nats per response; None keeps kl_coef fixed.")
    kl_horizon: int | None = _field(
        None, "Episodes over which the KL coefficient adapts; None means a tenth of all episodes."
    )
    kl_gains: list[float] | None = _field(
        None, "Proportional and integral gain per rollout, such as 1.0 0.2, in place of kl_horizon."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.reward_funcs, str):  # a single value in a YAML file
            self.reward_funcs = [self.reward_funcs]
        if isinstance(self.tools, str):
            self.tools = [self.tools]
        for name in ("kl_horizon", "kl_gains"):
            if self.kl_target is None and getattr(self, name) is not None:
                raise ValueError(f"--{name} has no effect without --kl_target, which adapts kl_coef: set it too.")

    def trainer_arguments(self) -> dict[str, Any]:
        """Return rewards, tools and the controller of the KL coefficient."""
        controller = None
        if self.kl_target is not None:
            controller = AdaptiveKLCallback(self.kl_target, horizon=self.kl_horizon, gains=self.kl_gains)
        return {
            "reward_funcs": [load_reward(name) for name in self.reward_funcs],
            "tools": [load_reward(name) for name in self.tools] or None,
            "callbacks": [] if controller is None else [controller],
        }


ARGUMENTS = (PromptArguments, ModelConfig, PPOConfig)


def _summary(log_history: list[dict[str, float]]) -> str:
    rows = [row for row in log_history if "eval_reward" in row]
    if not rows:  # a reward function failed in each evaluation
        return "No held-out reward"
    rewards = " -> ".join(f"{row['eval_reward']:.2f}" for row in [rows[0], *rows[1:][-1:]])
    return f"Held-out reward {rewards}, KL {rows[-1]['eval_kl']:.1f} nats"


def train(prog: str, data: PromptArguments, model: ModelConfig, args: PPOConfig) -> None:
    """Train, save and evaluate; print the held-out reward of the first and the last evaluation."""
    from .. import PPOTrainer  # late: --help and refused arguments need no trainer

    trainer = create_and_train(PPOTrainer, prog, data, model, args)
    trainer.save_model()
    evaluates = trainer.eval_dataset is not None
    if evaluates and args.eval_strategy == "no":  # otherwise Trainer has run the last evaluation
        trainer.evaluate()
    trainer.save_state()
    if evaluates and trainer.is_world_process_zero():
        print(_summary(trainer.state.log_history))
    finish(trainer, data.dataset_name)

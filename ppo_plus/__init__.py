"""PPO for the Hugging Face ecosystem: train a reward model, then PPO on the same backbone, with `Trainer.train()`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .utils.versions import check_versions, exit_if_command, installed_versions

# Runs first: with older libraries, later imports fail with less helpful errors.
try:
    check_versions(installed_versions())
except ImportError as error:
    exit_if_command(str(error))
    raise

if TYPE_CHECKING:
    from .callbacks.base import PPOCallback, RolloutSettings
    from .callbacks.completions import CompletionsTableCallback
    from .callbacks.kl import AdaptiveKLCallback, EarlyStoppingOnKLCallback
    from .callbacks.progress import PPOProgressCallback
    from .callbacks.reward_normalization import RewardNormalizationCallback
    from .callbacks.training_health import TrainingHealthCallback
    from .config import PPOConfig
    from .config.reward_config import RewardConfig
    from .models.actor_critic import ActorCritic
    from .models.value_head import ValueHead
    from .reward_trainer import RewardTrainer
    from .rollout.buffer import Rollout
    from .trainer import PPOTrainer

# Imported on first use: the configuration and the planner need neither TRL nor bitsandbytes.
_MODULES = {
    "ActorCritic": "models.actor_critic",
    "AdaptiveKLCallback": "callbacks.kl",
    "CompletionsTableCallback": "callbacks.completions",
    "EarlyStoppingOnKLCallback": "callbacks.kl",
    "PPOCallback": "callbacks.base",
    "PPOConfig": "config",
    "PPOProgressCallback": "callbacks.progress",
    "PPOTrainer": "trainer",
    "RewardConfig": "config.reward_config",
    "RewardNormalizationCallback": "callbacks.reward_normalization",
    "RewardTrainer": "reward_trainer",
    "Rollout": "rollout.buffer",
    "RolloutSettings": "callbacks.base",
    "TrainingHealthCallback": "callbacks.training_health",
    "ValueHead": "models.value_head",
}

__all__ = [
    "ActorCritic",
    "AdaptiveKLCallback",
    "CompletionsTableCallback",
    "EarlyStoppingOnKLCallback",
    "PPOCallback",
    "PPOConfig",
    "PPOProgressCallback",
    "PPOTrainer",
    "RewardConfig",
    "RewardNormalizationCallback",
    "RewardTrainer",
    "Rollout",
    "RolloutSettings",
    "TrainingHealthCallback",
    "ValueHead",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

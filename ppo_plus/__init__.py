"""PPO for the Hugging Face ecosystem: reward model, then PPO, on one backbone, in `Trainer.train()`."""

from .versions import check_versions, installed_versions

check_versions(installed_versions())  # first: on older libraries, the imports below fail with less helpful errors

# ruff: noqa: E402
from .callbacks import (
    AdaptiveKLCallback,
    EarlyStoppingOnKLCallback,
    NumericsWatchCallback,
    PPOCallback,
    RewardNormalizationCallback,
    RolloutSettings,
    SamplesTableCallback,
)
from .config import PPOConfig, RewardConfig
from .modeling import ActorCritic, ValueHead
from .progress import PPOProgressCallback
from .reward_trainer import RewardTrainer
from .rollout import Rollout
from .trainer import PPOTrainer

__all__ = [
    "ActorCritic",
    "AdaptiveKLCallback",
    "EarlyStoppingOnKLCallback",
    "NumericsWatchCallback",
    "PPOCallback",
    "PPOConfig",
    "PPOProgressCallback",
    "PPOTrainer",
    "RewardConfig",
    "RewardNormalizationCallback",
    "RewardTrainer",
    "Rollout",
    "RolloutSettings",
    "SamplesTableCallback",
    "ValueHead",
]
__version__ = "0.1.0"

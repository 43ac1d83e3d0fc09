"""PPO for the Hugging Face ecosystem: reward model, then PPO, on one backbone, in `Trainer.train()`."""

from .utils.versions import check_versions, installed_versions

check_versions(installed_versions())  # first: on older libraries, the imports below fail with less helpful errors

# ruff: noqa: E402
from .callbacks.base import PPOCallback, RolloutSettings
from .callbacks.completions import CompletionsTableCallback
from .callbacks.kl import AdaptiveKLCallback, EarlyStoppingOnKLCallback
from .callbacks.progress import PPOProgressCallback
from .callbacks.reward_normalization import RewardNormalizationCallback
from .callbacks.training_health import TrainingHealthCallback
from .config import PPOConfig, RewardConfig
from .models.actor_critic import ActorCritic
from .models.value_head import ValueHead
from .reward_trainer import RewardTrainer
from .rollout.buffer import Rollout
from .trainer import PPOTrainer

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

"""Configurations of `PPOTrainer` and `RewardTrainer`."""

from .ppo_config import PPOConfig
from .reward_config import RewardConfig
from .shared import copy_arguments, is_number, refuse_sharding
from .trl_fields import TRLFields

__all__ = ["PPOConfig", "RewardConfig", "TRLFields", "copy_arguments", "is_number", "refuse_sharding"]

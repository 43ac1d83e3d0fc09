"""Configurations of `PPOTrainer` and `RewardTrainer`."""

from .ppo_config import PPOConfig
from .reward_config import RewardConfig
from .shared import check_no_sharding, copy_arguments, is_number
from .trl_fields import TRLFields

__all__ = ["PPOConfig", "RewardConfig", "TRLFields", "check_no_sharding", "copy_arguments", "is_number"]

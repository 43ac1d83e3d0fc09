"""Configuration of `PPOTrainer`; `reward_config`, which imports TRL, holds that of `RewardTrainer`."""

from .checks import is_number
from .ppo_config import PPOConfig
from .sharding import check_no_sharding
from .shared import copy_arguments
from .trl_fields import TRLFields

__all__ = ["PPOConfig", "TRLFields", "check_no_sharding", "copy_arguments", "is_number"]

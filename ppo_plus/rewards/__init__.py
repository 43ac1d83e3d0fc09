"""Rewards: Python functions, sequence classifiers, and reward adapters on the actor's backbone.

Reward functions have the signature of TRL's GRPO and RLOO trainers. In addition, a function may return for a response a
list of numbers, one per token, instead of one number; each number is the reward of its token.

If the generation prompt of a chat template contains the start of the answer (`<think>`), functions receive the
completion without it, as sampled; sequence classifiers and reward adapters score the whole answer.
"""

from .adapters import AdapterReward
from .build import build_rewards
from .cheap_answers import CheapAnswers
from .classifiers import ClassifierReward
from .completions import Completions, Reward, Score
from .functions import FunctionReward
from .reward_set import RewardSet, Scores, usable_scores

__all__ = [
    "AdapterReward",
    "CheapAnswers",
    "ClassifierReward",
    "Completions",
    "FunctionReward",
    "Reward",
    "RewardSet",
    "Score",
    "Scores",
    "build_rewards",
    "usable_scores",
]

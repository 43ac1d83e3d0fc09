"""A score per response: Python functions, sequence classifiers, and reward adapters on the actor's own backbone.

The contract of a reward function is that of TRL's GRPO and RLOO trainers, and one thing more: it may return a list
of numbers for a response, one per token, instead of one number. Those are paid at the tokens they belong to.

Where the generation prompt of a chat template begins the answer (`<think>`), functions get the completion without that
beginning, as the policy sampled it; sequence classifiers and reward adapters read the whole answer.
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

"""`ppo-plus reward`: train a reward model from preference pairs, on any base and dataset.

The arguments are those of `RewardConfig`, of TRL's `ModelConfig` (base, LoRA, quantization) and of `PairArguments`
below. The dataset needs columns `chosen` and `rejected`, and `prompt` if it is not part of both; text or messages. The
output is a LoRA adapter with its score head and `reward_model.json`: a value of `ppo-plus ppo --reward_funcs`.
"""

from __future__ import annotations

from dataclasses import dataclass

from trl import ModelConfig

from ..config.reward_config import RewardConfig
from .data import DataArguments, create_and_train, finish


@dataclass
class PairArguments(DataArguments):
    """Preference pairs."""


ARGUMENTS = (PairArguments, ModelConfig, RewardConfig)


def train(prog: str, data: PairArguments, model: ModelConfig, args: RewardConfig) -> None:
    """Train, print the accuracy on held-out pairs, and save."""
    from .. import RewardTrainer  # late: --help and refused arguments need no trainer

    trainer = create_and_train(RewardTrainer, prog, data, model, args)
    if trainer.eval_dataset is not None:
        calibration = trainer.calibrate()
        if trainer.is_world_process_zero():
            print(f"Accuracy on {calibration['pairs']} held-out pairs: {calibration['accuracy']:.3f}")
    trainer.save_model()
    finish(trainer, data.dataset_name)

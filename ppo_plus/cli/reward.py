"""`ppo-plus reward`: train a reward model from preference pairs, on any base and dataset.

The arguments are those of `RewardConfig`, of TRL's `ModelConfig` (base, LoRA, quantization) and of `PairArguments`
below. The dataset needs columns `chosen` and `rejected`, and `prompt` if it is not part of both; text or messages. The
output is a LoRA adapter with its score head and `reward_model.json`: a value of `ppo-plus ppo --reward_funcs`.
"""

from __future__ import annotations

from dataclasses import dataclass

from trl import ModelConfig

from ..config.reward_config import RewardConfig
from .arguments import errors_in_one_line
from .data import DataArguments, check_free_space, finish, init_kwargs


@dataclass
class PairArguments(DataArguments):
    """Preference pairs."""


ARGUMENTS = (PairArguments, ModelConfig, RewardConfig)


def train(prog: str, data: PairArguments, model: ModelConfig, args: RewardConfig) -> None:
    """Train, print the accuracy on held-out pairs, and save.

    Args:
        prog: the command, for its errors.
        data: preference pairs.
        model: base, LoRA and quantization.
        args: hyperparameters.
    """
    from trl import get_peft_config, get_quantization_config

    from .. import RewardTrainer  # late: --help and refused arguments need no trainer

    with errors_in_one_line(prog, args.output_dir):
        train_rows, held_out = data.load()
        args.model_init_kwargs = init_kwargs(model, args.model_init_kwargs)
        trainer = RewardTrainer(
            model.model_name_or_path,
            args,
            train_dataset=train_rows,
            eval_dataset=held_out,
            peft_config=get_peft_config(model),
            quantization_config=get_quantization_config(model),
        )
        check_free_space(trainer)
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "True" else resume)
    if held_out is not None:
        calibration = trainer.calibrate()
        if trainer.is_world_process_zero():
            print(f"Accuracy on {calibration['pairs']} held-out pairs: {calibration['accuracy']:.3f}")
    trainer.save_model()
    finish(trainer, data.dataset_name)

"""Train a reward model from preference pairs, on any base and dataset.

    python recipes/reward_model.py --config recipes/qwen_7b_qlora/reward.yaml
    accelerate launch recipes/reward_model.py --config recipes/qwen_7b_qlora/reward.yaml --output_dir out/rm

Flags override the YAML file. The arguments are those of `RewardConfig`, of TRL's `ModelConfig` (base, LoRA,
quantization) and of `PairArguments` below. The dataset needs columns `chosen` and `rejected`, and `prompt` if it is not
part of both; text or messages. The output is a LoRA adapter with its score head and `reward_model.json`; pass its
folder to `recipes/ppo.py` as `--reward_funcs`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from script_utils import init_kwargs, train_and_eval_rows
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from ppo_plus import RewardConfig, RewardTrainer


@dataclass
class PairArguments:
    """Arguments of the preference dataset."""

    dataset_name: str = field(metadata={"help": "A dataset on the Hub, or a json, jsonl, csv or parquet file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to measure accuracy on."})
    eval_rows: int = field(
        default=0,
        metadata={"help": "Number of held-out pairs, from the test split or else the last training pairs."},
    )


def main() -> None:
    data, args, model = TrlParser((PairArguments, RewardConfig, ModelConfig)).parse_args_and_config()
    train, held_out = train_and_eval_rows(
        data.dataset_name, data.dataset_config, data.dataset_train_split, data.dataset_test_split, data.eval_rows
    )
    args.model_init_kwargs = init_kwargs(model, args.model_init_kwargs)
    trainer = RewardTrainer(
        model.model_name_or_path,
        args,
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "True" else resume)
    if held_out is not None:
        calibration = trainer.calibrate()
        if trainer.is_world_process_zero():
            print(f"Accuracy on {calibration['pairs']} held-out pairs: {calibration['accuracy']:.3f}")
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)
    trainer.accelerator.wait_for_everyone()  # a rank that exits early may terminate ranks that are still writing
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()

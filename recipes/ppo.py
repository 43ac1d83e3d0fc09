"""Train any causal language model with PPO, on any prompts and rewards.

    python recipes/ppo.py --config recipes/qwen_7b_qlora/ppo.yaml
    accelerate launch recipes/ppo.py --config recipes/tldr/ppo.yaml --output_dir out/tldr
    python recipes/ppo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name prompts.jsonl \
        --reward_funcs my_rewards:short_answers --use_peft --total_episodes 512 --output_dir out/short

Flags override the YAML file. The arguments are those of `PPOConfig`, of TRL's `ModelConfig` (base, LoRA, quantization)
and of `PromptArguments` below. The dataset needs a column `prompt`, text or messages; all other columns are passed to
reward functions. `--resume_from_checkpoint True` resumes from the last valid checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from script_utils import init_kwargs, load_reward, train_and_eval_rows
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from ppo_plus import AdaptiveKLCallback, PPOConfig, PPOTrainer


@dataclass
class PromptArguments:
    """Arguments of prompts, rewards and the KL target."""

    dataset_name: str = field(metadata={"help": "A dataset on the Hub, or a json, jsonl, csv or parquet file."})
    reward_funcs: list[str] = field(
        metadata={"help": "Reward adapters or sequence classifiers (folder or name), or functions as module:function."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    eval_rows: int = field(
        default=0,
        metadata={"help": "Number of evaluation prompts, from the test split or else the last training prompts."},
    )
    kl_target: float | None = field(
        default=None, metadata={"help": "Target KL to the reference, nats per response; None keeps kl_coef fixed."}
    )
    kl_horizon: int | None = field(
        default=None,
        metadata={"help": "Episodes over which the KL coefficient adapts; None means a tenth of all episodes."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.reward_funcs, str):  # a single value in a YAML file
            self.reward_funcs = [self.reward_funcs]


def summary(log_history: list[dict[str, float]]) -> str:
    """Describe the first and the last evaluation of a run in one line; empty if there was none."""
    rows = [row for row in log_history if "eval_reward" in row]
    if not rows:
        return ""
    rewards = " -> ".join(f"{row['eval_reward']:.2f}" for row in [rows[0], *rows[1:][-1:]])
    return f"Held-out reward {rewards}, KL {rows[-1]['eval_kl']:.1f} nats"


def main() -> None:
    data, args, model = TrlParser((PromptArguments, PPOConfig, ModelConfig)).parse_args_and_config()
    train, held_out = train_and_eval_rows(
        data.dataset_name, data.dataset_config, data.dataset_train_split, data.dataset_test_split, data.eval_rows
    )
    args.model_init_kwargs = init_kwargs(model, args.model_init_kwargs)
    callbacks = [] if data.kl_target is None else [AdaptiveKLCallback(data.kl_target, data.kl_horizon)]
    trainer = PPOTrainer(
        model.model_name_or_path,
        reward_funcs=[load_reward(name) for name in data.reward_funcs],
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        callbacks=callbacks,
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "True" else resume)
    trainer.save_model()
    if held_out is not None and args.eval_strategy == "no":  # otherwise Trainer has run the last evaluation
        trainer.evaluate()
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(summary(trainer.state.log_history))
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)
    trainer.accelerator.wait_for_everyone()  # a rank that exits early may terminate ranks that are still writing
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()

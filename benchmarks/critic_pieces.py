"""Which of the options for the critic help? SAO's preset and each of its pieces removed, on a task with a checker.

    python benchmarks/critic_pieces.py [--seeds 0 1 2] [--tokens 8000] [--variants sao no_warmup ...]
    python benchmarks/critic_pieces.py --tiny        # a random model and few tokens, to see that all of it runs

The task, LoRA, learning rate and batch sizes are those of `verifiable.py`: SmolLM2-135M-Instruct continues a worked sum
with the answer to a second one, and the reward is 1 for the right number. Each variant and seed runs in a process of
its own until it has generated `--tokens` tokens, those of value pretraining included.

`critic_pieces.json`: by variant the held-out accuracy (greedy) before and after, by seed with mean and deviation,
seconds, and the explained variance of Monte Carlo returns over the rollouts of each seed. `default` is PPO without any
of the options, `gate` is the default with EVPO's gate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from verifiable import NEWLINE, Checker, accuracy, arguments, budget, sums

MLP = ["gate_proj", "up_proj", "down_proj"]
SAO: dict[str, Any] = {
    "critic": "adapter", "critic_backbone_learning_rate": 1e-3, "critic_peft_config": {"target_modules": MLP},
    "num_critic_updates": 2, "objective": "masked", "cliprange": 0.3, "cliprange_high": 5.0,
    "length_adaptive_alpha": 1.5, "lam_value": 1.0, "critic_warmup_steps": 20, "critic_warmup_explained_variance": 0.1,
}  # fmt: skip
WITHOUT = {  # a piece is removed by giving these options their defaults
    "no_lam_value": {"lam_value": None},
    "no_length_adaptive_lam": {"length_adaptive_alpha": None},
    "one_critic_update": {"num_critic_updates": 1},
    "critic_with_attention": {"critic_peft_config": None},
    "clipped": {"objective": "clip", "cliprange": 0.2, "cliprange_high": None},
    "no_warmup": {"critic_warmup_steps": 0, "critic_warmup_explained_variance": None},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {}, "gate": {"critic_gate": True}, "adapter": {"critic": "adapter"}, "sao": SAO,
    **{name: SAO | changes for name, changes in WITHOUT.items()},
}  # fmt: skip


def run(variant: str, args: argparse.Namespace) -> dict:
    """Train and evaluate one variant and seed in this process."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import ppo_plus

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.eos_token = NEWLINE  # an answer ends with its line
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    held_out, checker = sums(args.held_out, args.seed, held_out=True), Checker()
    before = accuracy(policy, tokenizer, held_out)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ppo_plus.PPOTrainer(
            policy,
            reward_funcs=checker,
            args=ppo_plus.PPOConfig(**arguments("ppo", args, folder) | VARIANTS[variant]),
            train_dataset=Dataset.from_dict(sums(args.prompts, args.seed, held_out=False)),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[budget(checker, args.tokens)],
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    rows, explained = trainer.state.log_history, "critic/explained_variance_mc"
    return {
        "before": before, "after": accuracy(trainer.model.policy, tokenizer, held_out), "seconds": seconds,
        "tokens": checker.tokens, "explained_variance": [row[explained] for row in rows if explained in row],
    }  # fmt: skip


def child(variant: str, seed: int, args: argparse.Namespace) -> dict:
    """Run one variant and seed in a process of its own."""
    command = [sys.executable, __file__, "--child", variant, "--seed", str(seed), "--model", args.model]
    command += ["--dtype", args.dtype]
    for name in ("tokens", "prompts", "held_out"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{variant}, seed {seed}: {result['before']:.2f} -> {result['after']:.2f}", file=sys.stderr, flush=True)
    return result


def summary(runs: list[dict]) -> dict:
    """Return the figures of one variant over its seeds; one seed has no deviation."""
    after = [run["after"] for run in runs]
    return {
        "before": [run["before"] for run in runs],
        "after": after,
        "after_mean": statistics.fmean(after),
        "after_sd": statistics.stdev(after) if len(after) > 1 else None,
        "seconds": statistics.fmean(run["seconds"] for run in runs),
        "explained_variance": [run["explained_variance"] for run in runs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--tokens", type=int, default=8000, help="that each run generates")
    parser.add_argument("--prompts", type=int, default=2048, help="to train on")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--model", help="a local folder; SmolLM2-135M-Instruct from its package by default")
    parser.add_argument("--tiny", action="store_true", help="one seed of a random model; writes no result")
    parser.add_argument("--dry", action="store_true", help="write no result")
    parser.add_argument("--child", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run(args.child, args)))
        return
    from _utils import report, smollm2

    with tempfile.TemporaryDirectory() as folder:
        if args.tiny:
            args.seeds, args.tokens, args.prompts, args.held_out, args.dtype = [0], 350, 128, 4, "float32"
            args.model = args.model or tiny_model(Path(folder))
        args.model = args.model or smollm2()
        runs = {variant: [child(variant, seed, args) for seed in args.seeds] for variant in args.variants}
    tables = {variant: summary(of) for variant, of in runs.items()}
    result = {"variants": tables, "tokens": args.tokens, "seeds": args.seeds, "held_out": args.held_out}
    report("critic_pieces", result, not (args.tiny or args.dry))


def tiny_model(folder: Path) -> str:
    """Save a random model of two layers that reads bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=256, pad_token_id=256, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()

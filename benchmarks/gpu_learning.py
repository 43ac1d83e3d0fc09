"""A short PPO run on a base of 4 bits: the reward it reaches, at which KL, how fast, and in how much memory.

    python benchmarks/gpu_learning.py [--model NAME] [--seconds 60] [--card-gb 12] [--output FOLDER] [--tiny]

The base is held in NF4 with LoRA on all linear layers. By default it has random weights in the shape of Qwen2.5-0.5B
with 512 words, of which 32 are wanted; with `--model`, the wanted tokens are those whose text has the letter e. Each
token is rewarded by itself (`gamma=0`), 1 if it is wanted, so a minute is enough to learn something, and learning can
only come out of gradients that went through the 4-bit base.
After each rollout the result is written; after `--seconds` of training the run ends with the rollout that it is in.

The last line is JSON; `ratio` is the rise of the mean reward (wanted tokens of a response) from the first quarter of
the rollouts to the last, over the standard deviation of the reward in the first quarter.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _utils import RESULTS, cap_memory, describe_machine, peak_mb, report, word_tokenizer, write_result
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

from ppo_plus import PPOCallback, PPOConfig, PPOTrainer

CUDA = torch.cuda.is_available()
VOCABULARY, WANTED = 512, 32
SHAPE = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
TINY_SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.1,
}  # fmt: skip
FULL = {"rollouts": 40, "rows": 64, "micro": 16, "prompt": 16, "response": 32, "learning_rate": 5e-4}
SMALL = {"rollouts": 12, "rows": 32, "micro": 16, "prompt": 4, "response": 8, "learning_rate": 3e-3}


def make_model(folder: str, tiny: bool) -> None:
    """Save a model with random weights, and a tokenizer of as many words."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=VOCABULARY - 1,
        pad_token_id=0, bos_token_id=1, **(TINY_SHAPE if tiny else SHAPE),
    )  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16 if CUDA else torch.float32).save_pretrained(folder)
    word_tokenizer(VOCABULARY).save_pretrained(folder)


def find_wanted(tokenizer: Any, random_model: bool) -> set[int]:
    """Return the ids of the tokens that are rewarded."""
    if random_model:
        return set(range(2, 2 + WANTED))
    return {i for i in range(len(tokenizer)) if "e" in tokenizer.decode([i])}


class Progress(PPOCallback):
    """Keep a row per rollout, hand all of them to `written`, and stop training when its time is up."""

    def __init__(self, seconds: float, written: Any) -> None:
        self.seconds, self.written, self.rows = seconds, written, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_rollout_end(self, args, state, control, rollout, samples, metrics, **kwargs):
        names = ("reward", "reward_std", "kl", "sampling/logp_difference", "critic/explained_variance")
        self.rows.append({name: metrics[name] for name in names} | {"tokens": int(rollout.action_mask.sum())})

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.steps_per_rollout == 0:
            self.rows[-1]["seconds"] = time.perf_counter() - self.started
            self.written(self.rows)
            control.should_training_stop |= self.rows[-1]["seconds"] > self.seconds


def summarize(rows: list[dict], size: dict) -> dict:
    """Return the figures of the rollouts so far; they are compared by their first and their last quarter."""
    quarter = max(1, len(rows) // 4)
    first, last = rows[:quarter], rows[-quarter:]
    before, after = (statistics.fmean(row["reward"] for row in part) for part in (first, last))
    spread = statistics.fmean(row["reward_std"] for row in first)
    return {
        "ratio": (after - before) / max(spread, 1e-9),
        "reward": {"first_quarter": before, "last_quarter": after, "std": spread},
        "kl": statistics.fmean(row["kl"] for row in last),
        "seconds": rows[-1]["seconds"],
        "tokens_per_second": sum(row["tokens"] for row in rows) / rows[-1]["seconds"],
        "peak_mb": peak_mb(),
        "rollouts": rows,
        "sizes": size,
    }


def build_trainer(model: str, random_model: bool, size: dict, callback: PPOCallback, folder: str) -> PPOTrainer:
    """Return a trainer on the model in NF4."""
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    wanted = find_wanted(tokenizer, random_model)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, len(tokenizer) - 1, (size["rollouts"] * size["rows"], size["prompt"]), generator=draw)
    half = torch.bfloat16 if CUDA and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=half if CUDA else torch.float32,
    )  # fmt: skip

    def wanted_tokens(completion_ids, **kwargs) -> list[list[float]]:
        return [[float(token in wanted) for token in row] for row in completion_ids]

    args = PPOConfig(
        output_dir=folder, total_episodes=len(ids), per_device_train_batch_size=size["micro"], num_mini_batches=2,
        gradient_accumulation_steps=size["rows"] // 2 // size["micro"], response_length=size["response"],
        temperature=1.0, gamma=0.0, kl_coef=0.01, learning_rate=size["learning_rate"], value_head_learning_rate=1e-3,
        lr_scheduler_type="constant", missing_eos_penalty=None, report_to="none", save_strategy="no",
        num_sample_generations=0, html_report=False, disable_tqdm=True,
    )  # fmt: skip
    return PPOTrainer(
        model,
        wanted_tokens,
        args,
        train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        quantization_config=nf4,
        callbacks=[callback],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name or a folder; random weights by default")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training")
    parser.add_argument("--card-gb", type=float, help="cap the memory as a card of so many GB would")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script; writes nothing")
    args = parser.parse_args()
    if not (CUDA or args.tiny):
        sys.exit("gpu_learning.py trains on a CUDA device and finds none; --tiny tries its logic on a CPU.")
    if args.card_gb is not None:
        cap_memory(args.card_gb)
    size, file = SMALL if args.tiny else FULL, args.output / "gpu_learning.json"
    shared = {"model": args.model or "random weights", "card_gb": args.card_gb}

    def write(rows: list[dict]) -> None:
        if not args.tiny:
            write_result(file, {**summarize(rows, size), **shared, **describe_machine()})

    progress = Progress(args.seconds, write)
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            make_model(f"{folder}/model", args.tiny)
        model = args.model or f"{folder}/model"
        build_trainer(model, args.model is None, size, progress, f"{folder}/out").train()
    report("gpu_learning", {**summarize(progress.rows, size), **shared}, write=not args.tiny, folder=args.output)


if __name__ == "__main__":
    main()

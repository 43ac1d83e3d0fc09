"""A task with an exact checker: PPO beside GRPO and RLOO of the installed TRL, at equal generated tokens.

    python benchmarks/verifiable.py [--seeds 0 1 2] [--tokens 4000] [--held-out 200]

SmolLM2-135M-Instruct continues a worked sum with the answer to a second one (`12 + 30 = 42`, operands 5 to 40, drawn
from a seed; the pairs of operands of the held-out sums are never trained on). The reward is 1 for the right number and
0 for anything else. Same LoRA, learning rate, KL coefficient, sampling, responses per generation (64), optimizer steps
per generation (2 x 2); each side runs in a fresh process until it has generated `--tokens` tokens. PPO answers 64
prompts once, the others 8 prompts 8 times.

The last line is JSON: by side the held-out accuracy (greedy) before and after, by seed, and the curve of the training
reward over generated tokens, drawn beside the JSON; `ratio` is PPO's accuracy after training over the better one of the
others.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIDES = ("ppo", "grpo", "rloo")
LOWEST, HIGHEST, EXAMPLES = 5, 40, 1
RESPONSES, MICRO, GROUP = 64, 16, 8
LENGTH = 5  # tokens of an answer at most: a space, two digits, the end of the line, and one to spare
NEWLINE = "Ċ"  # how byte-level BPE writes it


def sums(n: int, seed: int, held_out: bool) -> dict[str, list[str]]:
    """`n` prompts with their answers; a pair of operands is held out or not, whatever the seed."""
    rng = random.Random(f"{seed} {held_out}")

    def operands() -> tuple[int, int]:
        while True:
            a, b = rng.randint(LOWEST, HIGHEST), rng.randint(LOWEST, HIGHEST)
            if (random.Random(f"{a} {b}").random() < 0.2) == held_out:
                return a, b

    prompts, wanted = [], []
    for _ in range(n):
        lines = [f"{a} + {b} = {a + b}\n" for a, b in (operands() for _ in range(EXAMPLES))]
        a, b = operands()
        prompts.append("".join(lines) + f"{a} + {b} =")
        wanted.append(str(a + b))
    return {"prompt": prompts, "wanted": wanted}


class Checker:
    """The reward function of all sides: 1 for exactly the right number. Keeps the curve over generated tokens.

    What PPOTrainer asks before its first rollout (an empty answer, and the prompt repeated) is no generated text.
    """

    __name__ = "right"

    def __init__(self) -> None:
        self.tokens, self.curve = 0, []

    def __call__(self, completions: list[str], completion_ids: list[list[int]], wanted: list[str], **_: Any) -> list:
        right = [float(text.strip() == answer) for text, answer in zip(completions, wanted, strict=True)]
        if not completions[0].strip() and len(completions) < RESPONSES:  # a line break is the EOS here
            return right
        self.tokens += sum(map(len, completion_ids))
        self.curve.append({"tokens": self.tokens, "reward": statistics.fmean(right)})
        return right


def budget(checker: Checker, tokens: int):
    """Ends training once that many tokens were generated and learned from."""
    from transformers import TrainerCallback

    class Budget(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if checker.tokens >= tokens and state.global_step % 4 == 0:
                control.should_training_stop = True

    return Budget()


def arguments(side: str, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What all sides share, and what each calls by another name."""
    shared = {
        "output_dir": folder, "seed": args.seed, "per_device_train_batch_size": MICRO, "learning_rate": 2e-4,
        "gradient_accumulation_steps": RESPONSES // MICRO // 2, "lr_scheduler_type": "constant", "logging_steps": 4,
        "max_steps": 4 * -(-args.tokens // RESPONSES), "report_to": "none", "save_strategy": "no", "bf16": False,
        "temperature": 1.0, "disable_tqdm": True,
    }  # fmt: skip
    if side == "ppo":
        # The last token of an answer may be any: a missing end of line is not penalized on the other sides either.
        return shared | {
            "num_mini_batches": 2, "num_ppo_epochs": 2, "response_length": LENGTH, "kl_coef": 0.01,
            "missing_eos_penalty": None, "value_head_learning_rate": 1e-3, "num_sample_generations": 0,
            "html_report": False,
        }  # fmt: skip
    return shared | {
        "num_generations": GROUP, "steps_per_generation": RESPONSES // MICRO, "num_iterations": 2, "beta": 0.01,
        "max_completion_length": LENGTH, "gradient_checkpointing": None,
    }  # fmt: skip


def accuracy(model, tokenizer, tasks: dict[str, list[str]]) -> float:
    """Share of right answers, the likeliest token each time; the same code for all sides."""
    import torch

    right = 0
    model.eval()
    for start in range(0, len(tasks["prompt"]), 50):
        prompts, wanted = (tasks[name][start : start + 50] for name in ("prompt", "wanted"))
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
        with torch.no_grad():
            out = model.generate(
                **inputs, max_new_tokens=LENGTH, do_sample=False, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(text.strip() == answer for text, answer in zip(texts, wanted, strict=True))
    return right / len(tasks["prompt"])


def run(side: str, args: argparse.Namespace) -> dict:
    """One side and seed, in this process."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import ppo_plus

    classes = {
        "ppo": (ppo_plus.PPOTrainer, ppo_plus.PPOConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
    }
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.eos_token = NEWLINE  # an answer ends with its line
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    held_out, checker = sums(args.held_out, args.seed, held_out=True), Checker()
    before = accuracy(policy, tokenizer, held_out)
    trainer_class, config_class = classes[side]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            policy,
            reward_funcs=checker,
            args=config_class(**arguments(side, args, folder)),
            train_dataset=Dataset.from_dict(sums(args.prompts, args.seed, held_out=False)),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[budget(checker, args.tokens)],
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    model = trainer.accelerator.unwrap_model(trainer.model)
    after = accuracy(model.policy if side == "ppo" else model, tokenizer, held_out)
    return {
        "before": before, "after": after, "tokens": checker.tokens, "seconds": seconds, "curve": checker.curve,
        "steps": trainer.state.global_step,
    }  # fmt: skip


def child(side: str, seed: int, args: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--child", side, "--seed", str(seed), "--model", args.model]
    command += ["--dtype", args.dtype]
    for name in ("tokens", "prompts", "held_out"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{side}, seed {seed}: { {k: v for k, v in result.items() if k != 'curve'} }", file=sys.stderr, flush=True)
    return result


def summary(runs: list[dict]) -> dict:
    names = ("before", "after", "tokens", "seconds")
    return {
        **{name: statistics.fmean(run[name] for run in runs) for name in names},
        "after_by_seed": [run["after"] for run in runs],
        "curves": [run["curve"] for run in runs],
    }


def plot(result: dict, file: Path) -> None:
    """The curves of all sides: mean of five rollouts, one thin line per seed and a thick one for their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for side, color in zip(SIDES, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        curves = [[point["reward"] for point in curve] for curve in result[side]["curves"]]
        length = min(map(len, curves))
        smooth = [[statistics.fmean(c[max(0, i - 4) : i + 1]) for i in range(length)] for c in curves]
        tokens = [statistics.fmean(c[i]["tokens"] for c in result[side]["curves"]) for i in range(length)]
        for line in smooth:
            axes.plot(tokens, line, color=color, linewidth=0.6, alpha=0.5)
        axes.plot(tokens, [statistics.fmean(at) for at in zip(*smooth, strict=True)], color=color, label=side.upper())
    axes.set(xlabel="generated tokens", ylabel="share of right answers in training", ylim=(0, 1))
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=4000, help="that each run generates")
    parser.add_argument("--prompts", type=int, default=2048, help="to train on")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--model", help="a local folder; SmolLM2-135M-Instruct from its package by default")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "verifiable.json")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run(args.child, args)))
        return
    from _utils import describe_machine, smollm2

    args.model = args.model or smollm2()
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    for seed in args.seeds:
        for side, done in runs.items():
            done.append(child(side, seed, args))
    sides = {side: summary(done) for side, done in runs.items()}
    result = {
        "ratio": sides["ppo"]["after"] / max(sides["grpo"]["after"], sides["rloo"]["after"], 1e-9),
        "seeds": args.seeds,
        "tokens": args.tokens,
        "dtype": args.dtype,
        **sides,
        **describe_machine(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    plot(result, args.output.with_suffix(".png"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()

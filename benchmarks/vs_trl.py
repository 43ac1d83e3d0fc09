"""One PPO update, side by side with the last PPO of TRL (1.12): seconds by phase, tokens/s, and peak memory.

    python benchmarks/vs_trl.py [--repeats 2] [--updates 1] [--dtype bfloat16|float32]

Same machine, packages, model (SmolLM2-135M), prompts, lengths (nothing that ends a response is ever sampled), LoRA,
episodes (32 x 48 tokens), 4 PPO epochs x 2 minibatches of micro-batches of 8, a reward model of the same size. TRL is
installed into a folder of its own; the two trainers run in turn, each in a fresh process, and the first update of each
is not counted. TRL holds policy, value model and reward model; ppo_plus holds one backbone.

The last line is JSON: `ratio` is TRL's seconds over ours, `memory_ratio` ours over TRL's, both of medians; memory is
peak resident memory above what the imports take.
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

ROOT = Path(__file__).parents[1]
TRL = ROOT / "build" / "trl-1.12.0"
EPISODES, PROMPT, RESPONSE, EPOCHS, MINIBATCHES, MICRO = 32, 14, 48, 4, 2, 8
NEVER = 49151  # a token id that is never sampled, as the one that ends a response


def resident() -> float:
    """Resident memory now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def lora(task: str = "CAUSAL_LM"):
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task)


def shared_pieces(model: str, dtype: str, rows: int):
    """Policy, tokenizer and prompts, the same for both sides."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    policy.generation_config.eos_token_id = NEVER
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(NEVER)
    ids = torch.randint(100, 40000, (rows, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    return policy, tokenizer, Dataset.from_dict({"input_ids": ids})


def ours(model: str, dtype: str, updates: int, folder: str) -> dict:
    from ppo_plus import PPOCallback, PPOConfig, PPOTrainer

    baseline, lengths = resident(), []

    class Clock(PPOCallback):
        def __init__(self):
            self.rows, self.last = [], time.perf_counter()

        def on_rollout_end(self, args, state, control, rollout, samples, metrics, **kwargs):
            lengths.append(int(rollout.mask.sum()))
            seconds = samples.seconds
            self.rows.append({"generate": seconds["generate"], "score": seconds["score"] + seconds["logprobs"]})

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % args.steps_per_rollout == 0:
                now = time.perf_counter()
                self.rows[-1]["total"], self.last = now - self.last, now

    policy, tokenizer, prompts = shared_pieces(model, dtype, EPISODES * (updates + 1))
    clock = Clock()
    config = PPOConfig(
        output_dir=folder, total_episodes=EPISODES * (updates + 1), per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=EPISODES // MINIBATCHES // MICRO, num_mini_batches=MINIBATCHES,
        num_ppo_epochs=EPOCHS, response_length=RESPONSE, missing_eos_penalty=None, report_to="none",
        save_strategy="no", num_sample_generations=0, disable_tqdm=True,
    )  # fmt: skip
    trainer = PPOTrainer(
        policy, reward_adapter(model, dtype, folder), config, train_dataset=prompts, processing_class=tokenizer,
        peft_config=lora(), callbacks=[clock],
    )  # fmt: skip
    clock.last = time.perf_counter()
    trainer.train()
    return {"rows": clock.rows[1:], "peak": peak() - baseline, "tokens": lengths}


def reward_adapter(model: str, dtype: str, folder: str) -> str:
    """A reward adapter on that base, made in a process of its own so that its memory does not count."""
    code = f"""
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({model!r}, num_labels=1, dtype={dtype!r})
config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
get_peft_model(model, config).save_pretrained({folder + "/reward"!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return folder + "/reward"


def trls(model: str, dtype: str, updates: int, folder: str) -> dict:
    import torch
    import trl.experimental.ppo.ppo_trainer as module
    from transformers import AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    baseline, spent, lengths = resident(), {"generate": 0.0, "score": 0.0}, []

    def timed(name: str, phase: str) -> None:
        function = getattr(module, name)

        def wrapper(*args, **kwargs):
            if torch.is_grad_enabled() and phase == "score":
                return function(*args, **kwargs)
            started = time.perf_counter()
            result = function(*args, **kwargs)
            spent[phase] += time.perf_counter() - started
            if phase == "generate":
                lengths.append(result[0][:, PROMPT:].numel())
            return result

        setattr(module, name, wrapper)

    for name, phase in (("batch_generation", "generate"), ("forward", "score"), ("get_reward", "score")):
        timed(name, phase)

    class Clock(TrainerCallback):
        def __init__(self):
            self.rows, self.last = [], time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            now = time.perf_counter()
            self.rows.append({**spent, "total": now - self.last})
            spent.update(generate=0.0, score=0.0)
            self.last = now

    policy, tokenizer, prompts = shared_pieces(model, dtype, EPISODES * (updates + 1))
    value_model, reward_model = (
        AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=dtype) for _ in range(2)
    )
    config = PPOConfig(
        output_dir=folder, total_episodes=EPISODES * (updates + 1), per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=EPISODES // MICRO, num_mini_batches=MINIBATCHES, num_ppo_epochs=EPOCHS,
        response_length=RESPONSE, stop_token_id=NEVER, report_to="none", save_strategy="no", num_sample_generations=0,
        bf16=False, gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
    )  # fmt: skip
    clock = Clock()
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward_model,
        train_dataset=prompts, eval_dataset=prompts, value_model=value_model, peft_config=lora(), callbacks=[clock],
    )  # fmt: skip
    clock.last = time.perf_counter()
    trainer.train()
    return {"rows": clock.rows[1:], "peak": peak() - baseline, "tokens": lengths}


def child(side: str, args: argparse.Namespace) -> dict:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    if side == "trl":
        environment["PYTHONPATH"] = str(TRL)
    command = [sys.executable, __file__, "--child", side, "--model", args.model, "--dtype", args.dtype]
    done = subprocess.run(
        [*command, "--updates", str(args.updates)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    print(f"{side}: {done.stdout.splitlines()[-1]}", file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def install_trl() -> None:
    if not TRL.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(TRL), "trl==1.12.0"]
        subprocess.run(command, check=True)


def summary(runs: list[dict]) -> dict[str, float]:
    rows = [{**row, "learn": row["total"] - row["generate"] - row["score"]} for run in runs for row in run["rows"]]
    seconds = {
        phase: statistics.median(row[phase] for row in rows) for phase in ("total", "generate", "score", "learn")
    }
    tokens = EPISODES * RESPONSE
    return {
        **{f"{phase}_seconds": value for phase, value in seconds.items()},
        "generated_tokens_per_second": tokens / seconds["generate"],
        "learned_tokens_per_second": tokens * EPOCHS / seconds["learn"],
        "peak_mb": statistics.median(run["peak"] for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side, in turn")
    parser.add_argument("--updates", type=int, default=1, help="counted updates per run")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--model", help="a local folder; SmolLM2-135M-Instruct from its package by default")
    parser.add_argument("--child", choices=["ours", "trl"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model is None:
        sys.path.insert(0, str(ROOT / "recipes"))
        from demo_assets import load_smollm2

        args.model = str(load_smollm2())
    if args.child:
        with tempfile.TemporaryDirectory() as folder:
            side = ours if args.child == "ours" else trls
            print(json.dumps(side(args.model, args.dtype, args.updates, folder)))
        return
    install_trl()
    from machine import describe_machine

    runs: dict[str, list[dict]] = {"trl": [], "ours": []}
    for _ in range(args.repeats):
        for side, done in runs.items():
            done.append(child(side, args))
    sides = {side: summary(done) for side, done in runs.items()}
    result = {
        "ratio": sides["trl"]["total_seconds"] / sides["ours"]["total_seconds"],
        "memory_ratio": sides["ours"]["peak_mb"] / sides["trl"]["peak_mb"],
        "dtype": args.dtype,
        **sides,
        **describe_machine(),
    }
    (ROOT / "benchmarks" / "results" / f"vs_trl_{args.dtype}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

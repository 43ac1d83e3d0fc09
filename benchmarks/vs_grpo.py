"""One update of PPO with a critic beside one of TRL's GRPO, on the same work: seconds and peak memory.

    python benchmarks/vs_grpo.py [--shapes 64x48 256x48] [--repeats 2] [--updates 1] [--tiny]

SmolLM2-135M in bf16, LoRA of rank 16 on all linear layers, 8 prompts with 4 answers each, two passes over the rollout
in two minibatches, the reference in use on both sides, a reward function that takes no time, answers that never end
early. A shape is prompt tokens x response tokens. GRPO is that of the installed TRL and gets 4 answers per prompt by
`num_generations`; ppo_plus gets each prompt 4 times, and trains a value head on top. The sides run in turn, each in a
fresh process with the same number of threads, and the first update of each is not counted.

The last line is JSON; by shape, `time_ratio` is our seconds over TRL's, `memory_ratio` the same of peak resident memory
above what the imports take (on a GPU: of allocated memory), of medians. `--tiny` takes a random model and small shapes,
and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ppo_runs import lora, memory_above, resident

PROMPTS, ANSWERS, EPOCHS, MINIBATCHES = 8, 4, 2, 2
RESPONSES = PROMPTS * ANSWERS
STEPS = EPOCHS * MINIBATCHES  # optimizer steps of an update
NEVER = 49151  # a token id of SmolLM2 that is never sampled, as the one that ends a response
SIDES = ("grpo", "ppo")


def parse_shape(text: str) -> tuple[int, int]:
    """Return prompt and response tokens of a shape such as `256x48`."""
    prompt, _, response = text.partition("x")
    if not (prompt.isdigit() and response.isdigit() and int(prompt) and int(response)):
        raise argparse.ArgumentTypeError(f"a shape is prompt tokens x response tokens, as 256x48; got {text!r}")
    return int(prompt), int(response)


def make_prompts(tokenizer: Any, tokens: int) -> list[str]:
    """Return `PROMPTS` different texts of exactly so many tokens."""
    words = [w for w in (tokenizer.decode([i]) for i in range(1000, 3000)) if w.startswith(" ") and w[1:].isalpha()]
    words = words or [f" w{i}" for i in range(2, 200)]
    texts = [("".join(words[(13 * n + i) % len(words)] for i in range(tokens))).strip() for n in range(PROMPTS)]
    for text in texts:
        if len(tokenizer(text)["input_ids"]) != tokens:
            raise RuntimeError(f"A prompt has {len(tokenizer(text)['input_ids'])} tokens, and {tokens} were asked for.")
    return texts


def arguments(side: str, folder: str, response: int, updates: int) -> dict[str, Any]:
    """Return the options that both sides share, and what each calls by another name."""
    shared = {
        "output_dir": folder, "per_device_train_batch_size": RESPONSES // MINIBATCHES, "learning_rate": 2e-4,
        "gradient_accumulation_steps": 1, "lr_scheduler_type": "constant", "logging_steps": STEPS, "temperature": 1.0,
        "max_steps": STEPS * (updates + 1), "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "bf16": False, "seed": 0,
    }  # fmt: skip
    if side == "ppo":
        return shared | {
            "num_mini_batches": MINIBATCHES, "num_ppo_epochs": EPOCHS, "response_length": response, "kl_coef": 0.05,
            "missing_eos_penalty": None, "num_sample_generations": 0, "html_report": False,
        }  # fmt: skip
    return shared | {
        "num_generations": ANSWERS, "steps_per_generation": MINIBATCHES, "num_iterations": EPOCHS, "beta": 0.05,
        "max_completion_length": response, "gradient_checkpointing": None,
    }  # fmt: skip


def child(side: str, model: str, shape: tuple[int, int], updates: int) -> dict[str, Any]:
    """Run one side in this process; return the seconds of each counted update and the peak of memory, MB."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    import ppo_plus

    trainer_class, config_class = {
        "ppo": (ppo_plus.PPOTrainer, ppo_plus.PPOConfig), "grpo": (trl.GRPOTrainer, trl.GRPOConfig)
    }[side]  # fmt: skip
    baseline = resident()
    torch.manual_seed(0)

    class Clock(TrainerCallback):
        """Seconds at the beginning of training and after each update."""

        times: list[float] = []

        def on_train_begin(self, args, state, control, **kwargs):
            self.times.append(time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % STEPS == 0:
                self.times.append(time.perf_counter())

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    if len(tokenizer) > NEVER:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(NEVER)
    texts = make_prompts(tokenizer, shape[0])
    rows = texts if side == "grpo" else [text for text in texts for _ in range(ANSWERS)]
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    lengths: list[int] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [float(len(text) % 7) for text in completions]

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            policy, reward_funcs=reward, args=config_class(**arguments(side, folder, shape[1], updates)),
            train_dataset=Dataset.from_dict({"prompt": rows * (updates + 1)}), processing_class=tokenizer,
            peft_config=lora(), callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    spent = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return {
        "seconds": spent[1:], "first": spent[0], "responses": len(lengths), "tokens": sum(lengths),
        **memory_above(baseline),
    }  # fmt: skip


def run(side: str, model: str, shape: tuple[int, int], updates: int) -> dict[str, Any]:
    """Run one side in a fresh process."""
    command = [sys.executable, __file__, "--child", side, model, f"{shape[0]}x{shape[1]}", str(updates)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} at {shape} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summarize(runs: dict[str, list[dict]], shape: tuple[int, int]) -> dict[str, Any]:
    """Return medians by side and their ratios, ours over TRL's."""
    memory = "gpu_allocated" if "gpu_allocated" in runs["ppo"][0] else "peak"
    sides = {
        side: {
            "seconds": statistics.median(s for one in done for s in one["seconds"]),
            "peak_mb": statistics.median(one[memory] for one in done),
            "tokens": done[0]["tokens"], "responses": done[0]["responses"],
        }
        for side, done in runs.items()
    }  # fmt: skip
    return {
        "prompt_tokens": shape[0], "response_tokens": shape[1],
        "time_ratio": sides["ppo"]["seconds"] / sides["grpo"]["seconds"],
        "memory_ratio": sides["ppo"]["peak_mb"] / sides["grpo"]["peak_mb"], **sides,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=[(64, 48), (256, 48)])
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side, in turn")
    parser.add_argument("--updates", type=int, default=1, help="counted updates per run")
    parser.add_argument("--tiny", action="store_true", help="a random model and small shapes; writes no result")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        side, model, shape, updates = args.child
        print(json.dumps(child(side, model, parse_shape(shape), int(updates))))
        return
    from importlib.metadata import version

    from _utils import report, smollm2, tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder) / "model", 256) if args.tiny else smollm2()
        shapes = [(9, 5)] if args.tiny else args.shapes
        found = {}
        for shape in shapes:
            runs: dict[str, list[dict]] = {side: [] for side in SIDES}
            for _ in range(args.repeats):
                for side, done in runs.items():
                    done.append(run(side, str(model), shape, args.updates))
            found[f"{shape[0]}x{shape[1]}"] = summarize(runs, shape)
    report("vs_grpo", {"shapes": found, "trl": version("trl")}, write=not args.tiny)


if __name__ == "__main__":
    main()

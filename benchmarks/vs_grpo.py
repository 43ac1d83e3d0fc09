"""One update of PPO with a critic beside one of TRL's GRPO, on the same work: seconds and peak memory.

    python benchmarks/vs_grpo.py [--shapes 64x48 256x48 512x53] [--repeats 2] [--updates 1] [--tiny]

SmolLM2-135M in bf16, LoRA of rank 16 on all linear layers, 8 prompts with 4 answers each, two passes over the rollout
in two minibatches, the reference in use on both sides, a reward function that takes no time, answers that never end
early. A shape is prompt tokens x response tokens; 512x53 is that of TL;DR. There are three sides: `grpo` is that of the
installed TRL, `shared` is ppo_plus with `num_generations=4`, which reads each prompt once for its answers, and
`repeated` is ppo_plus with each prompt 4 times in the dataset. ppo_plus trains a value head on top. The sides run in
turn, each in a fresh process with the same number of threads, and the first update of each is not counted.

The last line is JSON; by shape, `ratio` is the seconds of `grpo` over those of `shared`, `over_repeated` those of
`repeated` over those of `shared`, `time_ratio` is 1 / `ratio`, and `memory_ratio` the peak resident memory of `shared`
over that of `grpo`, above what the imports take (on a GPU: of allocated memory), of medians. By side, `phases` has
seconds (`score` is all between generating and learning), and `layer_tokens` counts the tokens that pass the first
decoder layer in an update. `--tiny` takes a random model and small shapes, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from ppo_runs import lora, memory_above, resident

PROMPTS, ANSWERS, EPOCHS, MINIBATCHES = 8, 4, 2, 2
RESPONSES = PROMPTS * ANSWERS
STEPS = EPOCHS * MINIBATCHES  # optimizer steps of an update
NEVER = 49151  # a token id of SmolLM2 that is never sampled, as the one that ends a response
SIDES = ("grpo", "repeated", "shared")
PHASES = ("generate", "score", "learn")


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
    if side != "grpo":
        return shared | {
            "num_generations": ANSWERS if side == "shared" else 1,
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

    theirs, ours = (trl.GRPOTrainer, trl.GRPOConfig), (ppo_plus.PPOTrainer, ppo_plus.PPOConfig)
    trainer_class, config_class = theirs if side == "grpo" else ours
    baseline = resident()
    torch.manual_seed(0)

    counts = dict.fromkeys(("generate", "rollout", "layer_tokens"), 0.0)

    class Clock(TrainerCallback):
        """Time and counts at the beginning of training and after each update."""

        times: list[float] = []
        counts: list[dict[str, float]] = []

        def on_train_begin(self, args, state, control, **kwargs):
            self.times.append(time.perf_counter())
            self.counts.append(dict(counts))

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % STEPS == 0:
                self.on_train_begin(args, state, control)

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    if len(tokenizer) > NEVER:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(NEVER)
    texts = make_prompts(tokenizer, shape[0])
    rows = [text for text in texts for _ in range(ANSWERS)] if side == "repeated" else texts
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    policy.generation_config.eos_token_id = tokenizer.eos_token_id

    def count_tokens(layer, inputs, kwargs):
        counts["layer_tokens"] += (inputs[0] if inputs else kwargs["hidden_states"]).shape[:-1].numel()

    policy.base_model.layers[0].register_forward_pre_hook(count_tokens, with_kwargs=True)
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
        # Decoding, and the rollout as a whole, are a method of each trainer or of its collector.
        collector = trainer if side == "grpo" else trainer.collector
        time_calls(collector, "_generate", counts, "generate")
        time_calls(collector, "_generate_and_score_completions" if side == "grpo" else "sample", counts, "rollout")
        trainer.train()
    spent = [after - before for before, after in pairwise(clock.times)]
    per_update = [{name: after[name] - before[name] for name in after} for before, after in pairwise(clock.counts)]
    return {
        "seconds": spent[1:], "first": spent[0], "responses": len(lengths), "tokens": sum(lengths),
        "phases": [split_phases(s, found) for s, found in zip(spent[1:], per_update[1:], strict=True)],
        "layer_tokens": [int(found["layer_tokens"]) for found in per_update[1:]], **memory_above(baseline),
    }  # fmt: skip


def time_calls(owner: Any, name: str, counts: dict[str, float], key: str) -> None:
    """Add the seconds of each call of a method to `counts[key]`."""
    method = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            counts[key] += time.perf_counter() - start

    setattr(owner, name, timed)


def split_phases(seconds: float, counts: dict[str, float]) -> dict[str, float]:
    """Return the seconds of each phase of an update from those of decoding and of the rollout as a whole."""
    generate, rollout = counts["generate"], counts["rollout"]
    return dict(zip(PHASES, (generate, rollout - generate, seconds - rollout), strict=True))


def run(side: str, model: str, shape: tuple[int, int], updates: int) -> dict[str, Any]:
    """Run one side in a fresh process."""
    command = [sys.executable, __file__, "--child", side, model, f"{shape[0]}x{shape[1]}", str(updates)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} at {shape} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summarize(runs: dict[str, list[dict]], shape: tuple[int, int]) -> dict[str, Any]:
    """Return medians by side and their ratios."""
    memory = "gpu_allocated" if "gpu_allocated" in runs["shared"][0] else "peak"
    sides = {
        side: {
            "seconds": statistics.median(s for one in done for s in one["seconds"]),
            "peak_mb": statistics.median(one[memory] for one in done),
            "tokens": done[0]["tokens"], "responses": done[0]["responses"],
            "phases": {name: statistics.median(p[name] for one in done for p in one["phases"]) for name in PHASES},
            "layer_tokens": statistics.median(n for one in done for n in one["layer_tokens"]),
        }
        for side, done in runs.items()
    }  # fmt: skip
    grpo, repeated, shared = (sides[side] for side in SIDES)
    return {
        "prompt_tokens": shape[0], "response_tokens": shape[1],
        "ratio": grpo["seconds"] / shared["seconds"], "over_repeated": repeated["seconds"] / shared["seconds"],
        "time_ratio": shared["seconds"] / grpo["seconds"], "memory_ratio": shared["peak_mb"] / grpo["peak_mb"],
        **sides,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=[(64, 48), (256, 48), (512, 53)])
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

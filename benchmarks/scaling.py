"""Cost per token and memory as the work grows: 1x, 2x and 4x the episodes, the response length, and the model's width.

    python benchmarks/scaling.py [--repeats 2]

A Llama of 6 layers with random weights and LoRA; the 1x is 16 episodes of 16 + 32 tokens at width 256, 2 PPO epochs x
2 minibatches in micro-batches of 4. Each run is a process of its own, so that its peak memory is its own, and the runs
of all sizes take turns; the first update of each is not counted. The last line is JSON: seconds per response token and
peak memory of each size, their growth against 1x (flat is 1.0), and seconds per token and backbone parameter, which is
what should be flat over the width. `ratio` is the worst growth of the seconds per token with episodes and length.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

from _utils import ROOT, PhaseClock, by_phase, peak_mb, random_llama, report, word_tokenizer

FACTORS = (1, 2, 4)
BASE = {"episodes": 16, "response": 32, "width": 256}
TINY_BASE = {"episodes": 4, "response": 4, "width": 16}
PROMPT, LAYERS, MICRO, MINIBATCHES = 16, 6, 4, 2


def run(episodes: int, response: int, width: int, updates: int) -> dict:
    """Updates of one size, in this process: seconds by phase, tokens, parameters and peak memory."""
    import torch
    from datasets import Dataset
    from ppo_runs import lora

    from ppo_plus import PPOConfig, PPOTrainer

    vocabulary = 8192
    model = random_llama(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=LAYERS
    )
    model.generation_config.eos_token_id = vocabulary  # one past what the model can say: no response ends early
    tokenizer = word_tokenizer(vocabulary + 1)
    micro, minibatches = min(MICRO, episodes // MINIBATCHES), MINIBATCHES
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocabulary, (episodes * (updates + 1), PROMPT), generator=draw).tolist()
    clock = PhaseClock()
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder, total_episodes=episodes * (updates + 1), per_device_train_batch_size=micro,
            gradient_accumulation_steps=episodes // minibatches // micro, num_mini_batches=minibatches,
            response_length=response, missing_eos_penalty=None, report_to="none", save_strategy="no",
            num_sample_generations=0, html_report=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = PPOTrainer(
            model, count_words, config, train_dataset=Dataset.from_dict({"input_ids": ids}),
            processing_class=tokenizer, peft_config=lora(), callbacks=[clock],
        )  # fmt: skip
        before = peak_mb()
        trainer.train()
    assert set(clock.tokens) == {episodes * response}, f"responses ended early: {clock.tokens}"
    backbone = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n and "lora" not in n)
    return {
        "seconds": by_phase(clock.rows[1:]), "tokens": episodes * response, "backbone_parameters": backbone,
        "peak_mb": peak_mb(), "peak_mb_above_model": peak_mb() - before,
    }  # fmt: skip


def count_words(completions, **kwargs) -> list[float]:
    return [float(len(set(text))) for text in completions]


def child(sizes: dict, updates: int) -> dict:
    command = [sys.executable, __file__, "--child", json.dumps(sizes), "--updates", str(updates)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    print(f"{sizes}: {done.stdout.splitlines()[-1]}", file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def grown(base: dict, axis: str, factor: int) -> dict:
    return {**base, axis: factor * base[axis]}


def summary(runs: list[dict], first: dict | None) -> dict:
    """Medians over the repeats of one size, and growth against the size that is 1x."""
    per_token = statistics.median(r["seconds"]["total"] / r["tokens"] for r in runs)
    found = {
        "seconds_per_token": per_token,
        "seconds_per_token_and_parameter": per_token / runs[0]["backbone_parameters"],
        "peak_mb": statistics.median(r["peak_mb"] for r in runs),
        "peak_mb_above_model": statistics.median(r["peak_mb_above_model"] for r in runs),
        "phases": {p: statistics.median(r["seconds"][p] / r["tokens"] for r in runs) for p in runs[0]["seconds"]},
    }
    first = first or found
    names = ("seconds_per_token", "seconds_per_token_and_parameter", "peak_mb", "peak_mb_above_model")
    return {**found, "growth": {name: found[name] / max(first[name], 1e-12) for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each size, in turn")
    parser.add_argument("--updates", type=int, default=2, help="counted updates per run")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script; nothing is written")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run(**args.child, updates=args.updates)))
        return
    base = TINY_BASE if args.tiny else BASE
    sizes = [(axis, factor) for axis in base for factor in FACTORS]
    runs: dict[str, list[dict]] = {}
    for _ in range(args.repeats):
        distinct = {json.dumps(grown(base, *size)) for size in sizes}  # the three 1x are one size
        for key in sorted(distinct):
            runs.setdefault(key, []).append(child(json.loads(key), args.updates))
    axes: dict[str, dict[str, dict]] = {axis: {} for axis in base}
    for axis, factor in sizes:
        axes[axis][f"{factor}x"] = summary(runs[json.dumps(grown(base, axis, factor))], axes[axis].get("1x"))
    worst = max(
        axes[axis][f"{factor}x"]["growth"]["seconds_per_token"]
        for axis in ("episodes", "response")
        for factor in FACTORS
    )
    report("scaling", {"ratio": worst, "base": base, **axes}, write=not args.tiny)


if __name__ == "__main__":
    main()

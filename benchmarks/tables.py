"""Makes README's table of performance from benchmarks/results/*.json, so that nobody writes a figure by hand.

    python benchmarks/tables.py [--check]

The table stands between `<!-- performance -->` and `<!-- /performance -->`. A result that is not there has no row.
With `--check` nothing is written, and the exit status is 1 where README differs from the results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- performance -->", "<!-- /performance -->"


def against_trl(r: dict) -> str:
    ours, theirs = r["ours"], r["trl"]
    phases = ", ".join(
        f"{p} {theirs[f'{p}_seconds'] / ours[f'{p}_seconds']:.1f}×" for p in ("generate", "score", "learn")
    )
    seconds = f"{ours['total_seconds']:.1f} s against {theirs['total_seconds']:.1f} s"
    compiled = f"; **{r['ratio_compiled']:.2f}×** with `torch_compile`" if "ratio_compiled" in r else ""
    return f"**{r['ratio']:.2f}×** as fast ({seconds}; {phases}){compiled}; {r['memory_ratio']:.2f} of the memory"


def above_floor(r: dict) -> str:
    phases = ", ".join(f"{p} {r['ratio_by_phase'][p]:.2f}" for p in ("generate", "score", "learn"))
    seconds = f"{r['update_seconds']['total']:.1f} s over {r['floor_seconds']['total']:.1f} s"
    return f"**{r['ratio']:.2f}×** the floor ({seconds}; {phases})"


def uneven(r: dict) -> str:
    ours, theirs = r["ours_tokens_per_second"], r["generate_tokens_per_second"]
    return f"**{r['ratio']:.2f}×** as fast ({ours:.0f} tokens/s against {theirs:.0f})"


def scaling(r: dict) -> str:
    episodes, response = (r[axis]["4x"]["growth"]["seconds_per_token"] for axis in ("episodes", "response"))
    width = r["width"]["4x"]["growth"]["seconds_per_token_and_parameter"]
    return (
        f"a token takes {episodes:.2f}× the time with 4× the episodes, {response:.2f}× with 4× the response length; "
        f"a token and parameter {width:.2f}× at 4× the width"
    )


def top_layers(r: dict) -> str:
    by_top = ", ".join(
        f"the top {name.removeprefix('top_')} **{found['ratio']:.2f}×** as fast as without that, "
        f"{found['ratio_to_all_layers']:.2f}× as LoRA on all"
        for name, found in r.items()
        if name.startswith("top_")
    )
    return f"scoring and learning: {by_top}"


def memory(r: dict) -> str:
    return f"**{r['ratio']:.2f}** of TRL's peak"


def reward_model(r: dict) -> str:
    ours, nf4, theirs = (r[side]["accuracy"] for side in ("ours", "ours_4bit", "trl"))
    return (
        f"accuracy {ours:.3f}, on an NF4 base {nf4:.3f}, TRL's {theirs:.3f}; tensors of training on NF4 "
        f"{r['memory_ratio']:.2f} of TRL's, at 1.7B's shape **{r['memory_ratio_1.7b']:.2f}**"
    )


def verifiable(r: dict) -> str:
    after = ", ".join(f"{side.upper()} {r[side]['after']:.2f}" for side in ("ppo", "grpo", "rloo"))
    return f"right answers to held-out sums: {r['ppo']['before']:.2f} before, after {r['tokens']} tokens {after}"


def mixed(r: dict) -> str:
    return f"{r['ratio']:.2f}× the time of a pass for each role"


def kill(r: dict) -> str:
    return f"{r['kills']} kills, {r['identical']} ended in the same bits"


def demo(r: dict) -> str:
    rises = ", ".join(f"+{rise:.2f}" for rise in r["vader_rises"])
    return f"VADER score of held-out answers, by seed: {rises}"


# File, what it shows, and its figures in words; in the order of the table.
ROWS: list[tuple[str, str, Callable[[dict], str]]] = [
    ("vs_trl_bfloat16", "one update against TRL 1.12's PPO, SmolLM2-135M, bf16", against_trl),
    ("vs_trl_float32", "one update against TRL 1.12's PPO, SmolLM2-135M, fp32", against_trl),
    ("floor", "one update against its own arithmetic on the bare model", above_floor),
    ("uneven", "64 responses, 60 short and 4 long, against `generate`", uneven),
    ("scaling", "cost as the work grows", scaling),
    ("top_layers", "the layers below LoRA run once per rollout, not in every pass", top_layers),
    ("memory", "peak memory of an update against TRL 1.12's", memory),
    ("reward_model", "a reward model against TRL's RewardTrainer", reward_model),
    ("verifiable", "an exact checker as reward, beside TRL's GRPO and RLOO", verifiable),
    ("mixed_adapters_bfloat16", "all roles scored in one mixed pass, bf16", mixed),
    ("mixed_adapters_float32", "all roles scored in one mixed pass, fp32", mixed),
    ("kill", "killed at random moments and resumed", kill),
    ("demo", "reward model and PPO on real text", demo),
]


def machine(r: dict) -> str:
    """Where and when, in a few words; empty where a result does not say."""
    found, gpu = r.get("machine", {}), r.get("machine", {}).get("gpu")
    where = gpu or (f"{found['cpu_cores']} CPU cores, {found['cpu_capability']}" if found else "")
    return ", ".join(filter(None, [where, r.get("date", "")]))


def performance_table(results: Path = RESULTS) -> str:
    """The table in Markdown, of the results that are in the folder."""
    lines = ["| what | figures | where and when |", "|---|---|---|"]
    for name, what, figures in ROWS:
        file = results / f"{name}.json"
        if file.is_file():
            result = json.loads(file.read_text())
            lines.append(f"| [{what}](benchmarks/results/{name}.json) | {figures(result)} | {machine(result)} |")
    return "\n".join(lines)


def with_table(text: str, table: str) -> str:
    """The text with the table between its two markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"The text needs {BEGIN} and, after it, {END}, once each: the table goes between them.")
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{table}\n\n{END}", text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where README differs")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    made = with_table(text, performance_table())
    if args.check:
        sys.exit(0 if made == text else "README.md differs from benchmarks/results: run python benchmarks/tables.py")
    readme.write_text(made)


if __name__ == "__main__":
    main()

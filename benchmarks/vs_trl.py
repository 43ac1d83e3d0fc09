"""One PPO update, side by side with the last PPO of TRL (1.12): seconds by phase, tokens/s, and peak memory.

    python benchmarks/vs_trl.py [--repeats 2] [--updates 1] [--dtype bfloat16|float32] [--name NAME]

What is run is in `ppo_runs.py`. The two trainers run in turn, each in a fresh process, and the first update of each
is not counted.

ppo_plus runs as it comes, and with `torch_compile=True`, which pays its compilation once, in the first update. (TRL's
loop calls the model past what accelerate compiled: the option changes nothing there.)

The last line is JSON: `ratio` is TRL's seconds over ours and `ratio_compiled` over ours compiled, `memory_ratio` ours
over TRL's, all of medians; memory is peak resident memory above what the imports take.
"""

from __future__ import annotations

import argparse
import statistics

from ppo_runs import EPISODES, EPOCHS, RESPONSE, TRL_VERSION, install_trl, run


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
        "first_update_seconds": statistics.median(run["first"] for run in runs),
        "peak_mb": statistics.median(run["peak"] for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side, in turn")
    parser.add_argument("--updates", type=int, default=1, help="counted updates per run")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--model", help="a local folder; SmolLM2-135M-Instruct from its package by default")
    parser.add_argument("--name", help="of the result; vs_trl_ and the dtype by default")
    args = parser.parse_args()
    install_trl()
    from _utils import report, smollm2

    model = args.model or smollm2()
    runs: dict[str, list[dict]] = {"trl": [], "ours": [], "ours_compiled": []}
    for _ in range(args.repeats):
        for side, done in runs.items():
            done.append(run(side.split("_")[0], model, args.dtype, args.updates, compiled=side.endswith("_compiled")))
    sides = {side: summary(done) for side, done in runs.items()}
    result = {
        "ratio": sides["trl"]["total_seconds"] / sides["ours"]["total_seconds"],
        "ratio_compiled": sides["trl"]["total_seconds"] / sides["ours_compiled"]["total_seconds"],
        "memory_ratio": sides["ours"]["peak_mb"] / sides["trl"]["peak_mb"],
        "dtype": args.dtype,
        **sides,
    }
    report(args.name or f"vs_trl_{args.dtype}", result, trl=TRL_VERSION)


if __name__ == "__main__":
    main()

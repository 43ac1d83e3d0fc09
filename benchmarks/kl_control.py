"""Does the KL end at its target? Controllers of the KL coefficient on the demo task, by target and seed.

    python benchmarks/kl_control.py [--seeds 0 1 2] [--targets 6 8] [--episodes 512] [--jobs 1]

Runs, evaluation and shared settings are those of `learning.py`: only the controller differs, and all begin with the
demo's coefficient and lambda. `kl_control.json`: by controller and target the held-out KL at the end over its target
and the held-out reward, by seed, and the share of runs within 15 % of the target. A run that is there is not run again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from learning import ROOT, child, demo_arguments, run, spread

TOLERANCE = 0.15  # of the target
CONTROLLERS: dict[str, dict[str, Any]] = {
    "proportional-integral": {"gains": [1.0, 0.2]},
    "proportional, the demo's horizon": {"horizon": 128},
}


def table(runs: dict[float, list[dict]]) -> dict:
    """Figures of one controller; `runs` are results of `run` by target."""
    finals = {target: [each["curve"][-1] for each in of] for target, of in runs.items()}
    ratios = {target: [final["kl"] / target for final in of] for target, of in finals.items()}
    within = [abs(ratio - 1) <= TOLERANCE for of in ratios.values() for ratio in of]
    return {
        "within_15_percent": sum(within) / len(within),
        "targets": {
            str(target): {
                "kl_over_target": ratios[target],
                "reward": [final["reward"] for final in of],
                "reward_spread": spread([final["reward"] for final in of]),
            }
            for target, of in finals.items()
        },
    }


def measure(args: argparse.Namespace, job: dict) -> dict:
    """Run all controllers, targets and seeds."""
    counted = job | {"unit": "episodes", "points": [args.episodes / 2, args.episodes], "episodes": 10**6}
    demo, tables = demo_arguments(args.work).ppo, {}
    for number, (name, options) in enumerate(CONTROLLERS.items()):
        runs: dict[float, list[dict]] = {}
        for target in args.targets:
            changes = {"lam": demo["lam"], "kl_coef": demo["kl_coef"], "adaptive_kl": {"target": target, **options}}
            for seed in args.seeds:
                folder = str(args.work / f"kl-{number}-{target:g}-{seed}")
                runs.setdefault(target, []).append(
                    run("ours", counted | {"seed": seed, "folder": folder, "changes": changes})
                )
        tables[name] = table(runs)
    return {"controllers": tables, "episodes": args.episodes, "seeds": args.seeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--targets", type=float, nargs="+", default=[6.0, 8.0], help="nats per response")
    parser.add_argument("--episodes", type=int, default=512, help="of each run")
    parser.add_argument("--rollout", type=int, default=32, help="episodes per update")
    parser.add_argument("--held-out", type=int, default=128, help="prompts to evaluate on")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--model", help="a local folder; SmolLM2-135M-Instruct from its package by default")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "learning", help="what runs leave, to go on from")
    parser.add_argument("--dry", action="store_true", help="write no result")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "recipes" / "demo"))
    from _utils import report, smollm2

    args.work = args.work.resolve()
    job = {"model": args.model or smollm2(), "work": str(args.work), "folder": str(args.work), "dtype": args.dtype,
           "rollout": args.rollout, "held_out": args.held_out}  # fmt: skip
    child("prepare", job, "prepare.json")
    child("evaluate", job | {"seed": 0, "episodes": args.rollout}, "start.json")
    report("kl_control", measure(args, job), not args.dry)


if __name__ == "__main__":
    main()

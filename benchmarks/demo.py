"""Runs the demo recipe with several seeds and writes its figures, with machine and versions, to results/demo.json.

    python benchmarks/demo.py [--seeds 0 1 2] [--output out/demo] [--keep]

The last line is one JSON object; `ratio` is the smallest rise of the independent judge's mean over the seeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from measuring import ROOT, report


def run(seed: int, folder: Path, keep: bool) -> dict:
    if keep and (folder / "result.json").is_file():
        return json.loads((folder / "result.json").read_text())
    command = [sys.executable, "recipes/rm_then_ppo.py", "--config", "recipes/rm_then_ppo.yaml"]
    subprocess.run(
        [*command, "--seed", str(seed), "--output_dir", str(folder)], check=True, cwd=ROOT, stdout=sys.stderr
    )
    return json.loads((folder / "result.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "demo")
    parser.add_argument("--keep", action="store_true", help="do not run again the seeds that are in --output")
    args = parser.parse_args()
    runs = [run(seed, args.output / f"seed{seed}", args.keep) for seed in args.seeds]
    rises = [r["after"]["vader"] - r["before"]["vader"] for r in runs]
    result = {"ratio": min(rises), "vader_rises": rises, "runs": runs}
    report("demo", result)


if __name__ == "__main__":
    main()

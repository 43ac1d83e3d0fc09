"""Runs the demo recipe with several seeds and writes its figures, with machine and versions, to results/demo.json.

    python benchmarks/demo.py [--seeds 0 1 2] [--full | --top-layers 10 | --load-in-4bit] [--output out/demo] [--keep]

The last line is one JSON object; `ratio` is the smallest rise of the independent judge's mean over the seeds. The
figures of the full run go to results/demo_full.json, with LoRA on its top layers alone to demo_top_layers.json, with
its backbone in NF4 to demo_4bit.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from _utils import ROOT, report


def run(seed: int, flags: list[str], folder: Path, keep: bool) -> dict:
    if keep and (folder / "result.json").is_file():
        return json.loads((folder / "result.json").read_text())
    command = [sys.executable, "recipes/demo/rm_then_ppo.py"]
    command += [*flags, "--seed", str(seed), "--output_dir", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
    return json.loads((folder / "result.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    variant = parser.add_mutually_exclusive_group()
    variant.add_argument("--full", action="store_true", help="the full run")
    variant.add_argument("--top-layers", type=int, help="the full run with LoRA on so many layers")
    variant.add_argument("--load-in-4bit", action="store_true", help="the full run with its backbone in NF4")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "demo")
    parser.add_argument("--keep", action="store_true", help="do not run again the seeds that are in --output")
    args = parser.parse_args()
    result: dict = {}
    if args.top_layers is not None:
        file, name = "demo_top_layers", f"top{args.top_layers}-"
        flags = ["--full", "--top_layers", str(args.top_layers)]
        result["top_layers"] = args.top_layers
    elif args.load_in_4bit:
        file, name, flags = "demo_4bit", "4bit-", ["--full", "--load_in_4bit"]
    elif args.full:
        file, name, flags = "demo_full", "full-", ["--full"]
    else:
        file, name, flags = "demo", "seed", []
    runs = [run(seed, flags, args.output / f"{name}{seed}", args.keep) for seed in args.seeds]
    rises = [r["after"]["vader"] - r["before"]["vader"] for r in runs]
    report(file, {"ratio": min(rises), "vader_rises": rises, "runs": runs, **result})


if __name__ == "__main__":
    main()

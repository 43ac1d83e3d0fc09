"""Kills a training run at random moments, resumes it each time, and compares the end with an undisturbed run.

    python benchmarks/crash_recovery.py [--kills 50] [--seed 0] [--output out/crash_recovery]

A tiny model is trained with dropout, adaptive KL and reward normalization, with a checkpoint after every step. Each
attempt resumes with `resume_from_checkpoint=True` and is killed with SIGKILL after a random time: while it generates,
learns, or writes a checkpoint. When all kills are spent the run goes to its end, and its adapter and value head must
be those of the undisturbed run, bit for bit. The last line is JSON with `kills` and `identical`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

from attempts import equal_weights, finish, interrupt, start_attempt, wait_for

ROOT = Path(__file__).parents[1]
STARTED = "TRAINING"


def train(folder: Path, steps: int) -> None:
    """One attempt, in a process of its own."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import lora, make_trainer

    from ppo_plus import AdaptiveKLCallback, RewardNormalizationCallback

    warnings.simplefilter("ignore")
    trainer = make_trainer(
        folder,
        config={"max_steps": steps, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2},
        peft_config=lora(lora_dropout=0.1),
        callbacks=[AdaptiveKLCallback(target=1.0, horizon=20), RewardNormalizationCallback()],
    )
    print(STARTED, flush=True)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(folder / "final"))


def start(folder: Path, steps: int) -> tuple[subprocess.Popen, Path]:
    """Start an attempt and wait until it trains; returns it with its log."""
    log = folder.parent / f"{folder.name}.log"
    process = start_attempt(__file__, ["--train", str(folder), "--steps", str(steps)], log)
    wait_for(process, lambda: STARTED in log.read_text(encoding="utf-8", errors="replace"), log)
    return process, log


def step_reached(folder: Path) -> int:
    return max((int(p.name.rpartition("-")[2]) for p in folder.glob("checkpoint-*")), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which the run is killed")
    parser.add_argument("--steps", type=int, default=700, help="optimizer steps of the whole run")
    parser.add_argument("--longest", type=float, default=1.0, help="longest time before a kill, in seconds")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "crash_recovery")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.train, args.steps)
        return

    shutil.rmtree(args.output, ignore_errors=True)
    undisturbed, killed = args.output / "undisturbed", args.output / "killed"
    finish(*start(undisturbed, args.steps))
    moments, kills, while_writing = random.Random(args.seed), 0, 0
    while kills < args.kills:
        process, log = start(killed, args.steps)
        time.sleep(moments.uniform(0, args.longest))
        if process.poll() is not None:
            sys.exit(f"The run ended by itself after {kills} kills: raise --steps.")
        interrupt(process, signal.SIGKILL, log)
        kills += 1
        unfinished = [p for p in killed.glob("checkpoint-*") if not (p / "manifest.json").exists()]
        while_writing += bool(unfinished)
        print(f"kill {kills}: step {step_reached(killed)} of {args.steps}", file=sys.stderr, flush=True)
    finish(*start(killed, args.steps))
    equal = equal_weights(undisturbed / "final", killed / "final")
    result = {"kills": kills, "identical": kills if equal else 0, "killed_while_writing": while_writing}
    result |= {"seed": args.seed, "steps": args.steps}
    if kills >= 50:
        from _utils import describe_machine

        file = ROOT / "benchmarks" / "results" / "crash_recovery.json"
        file.write_text(json.dumps({**result, **describe_machine()}, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

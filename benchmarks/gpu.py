"""Everything that only a GPU can show, in nine minutes: tests, memory, a 4-bit learning run, speed, in this order.

    python benchmarks/gpu.py [--card-gb 12] [--model NAME] [--minutes 9] [--only tests memory ...] [--output FOLDER]
    python benchmarks/gpu.py --tiny      the same parts on a CPU and tiny models, to try this driver

    tests      tests/test_gpu.py
    memory     gpu_memory.py: 7B in NF4 under the card's cap, and the planner beside it
    learning   gpu_learning.py, on `--model` if there is one
    speed      gpu_speed.py: 0.5B and 1.5B, bf16 and NF4

Each part is a process with its own time box; time that a part leaves goes to those after it, so all of them together
keep to `--minutes`. A part that fails or runs over is recorded and the next one starts. `gpu.json` in the output folder
(benchmarks/results/gpu/<card>) is written after each part; beside it stand each part's log and the results that it has
written as it went. `--card-gb` caps the memory of every process as a card of so many GB would. The exit status is 1
where a part did not pass.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
GRACE_SECONDS = 5  # between asking a part to end and ending it
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
TINY_TESTS = "noise_falls or heads_of_the_critic or greedy"
# Of the nine minutes; by name of the part.
SECONDS = {"tests": 190, "memory": 100, "learning": 90, "speed": 160}


@dataclass(frozen=True)
class Part:
    """A part: its command, its time box in seconds, and the file of the result that it writes as it goes."""

    name: str
    command: list[str]
    seconds: float
    result: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


def plan_parts(args: argparse.Namespace, output: Path) -> list[Part]:
    """Return the parts in the order of their value."""
    scale = args.minutes * 60 / sum(SECONDS.values())
    cap = [] if args.card_gb is None else ["--card-gb", f"{args.card_gb:g}"]
    tests = ["-m", "pytest", str(ROOT / "tests" / "test_gpu.py"), "-m", "gpu", "-vv", "-p", "no:cacheprovider"]
    written = ["--output", str(output)]
    flags: dict[str, list[str]] = {
        "memory": ["--models", "qwen2.5-7b", "--caps", f"{args.card_gb or 12:.0f}", *written],
        "learning": [
            *(["--model", args.model] if args.model else []),
            "--seconds",
            f"{50 * scale:.0f}",
            *cap,
            *written,
        ],
        "speed": ["--shapes", "0.5B", "1.5B", "--no-trl", *cap, *written],
    }
    if args.tiny:
        tests += ["-k", TINY_TESTS]
        flags = {name: [*given, "--tiny"] for name, given in flags.items()}
        flags["speed"] += ["--precisions", "bf16"]
    variables = {"PPO_PLUS_GPU_TESTS_ON": "cpu"} if args.tiny else {}
    variables |= {} if args.card_gb is None else {"PPO_PLUS_CARD_GB": f"{args.card_gb:g}"}
    parts = [Part("tests", tests, SECONDS["tests"] * scale, None, variables)]
    for name, given in flags.items():
        command = [str(BENCHMARKS / f"gpu_{name}.py"), *given]
        parts.append(Part(name, command, SECONDS[name] * scale, output / f"gpu_{name}.json"))
    return [part for part in parts if part.name in args.only]


def run_part(part: Part, seconds: float, log: Path) -> dict[str, Any]:
    """Run a part in a session of its own for at most so long; returns what became of it."""
    paths = [str(ROOT), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
    environment = {"CUDA_VISIBLE_DEVICES": "0", "HF_HUB_OFFLINE": "1", **os.environ, **part.environment}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    started, written_before = time.monotonic(), modified(part.result)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *part.command], stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=environment, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        try:
            status = "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "ran over its time"
        finally:
            end_session(process)
    text = log.read_text(encoding="utf-8", errors="replace")
    found: dict[str, Any] = {
        "status": status,
        "exit_status": process.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "time_box_seconds": round(seconds, 1),
        "log": log.name,
    }
    if status != "passed":
        found["last_line"] = ([line for line in text.splitlines() if line.strip()] or [""])[-1][:300]
    if part.name == "tests":
        found |= count_outcomes(text)
    fresh = part.result is not None and modified(part.result) not in (None, written_before)
    found["result"] = part.result.name if part.result is not None and fresh else None
    return found


def modified(file: Path | None) -> int | None:
    """Return when a file was written last; None where there is none."""
    return file.stat().st_mtime_ns if file is not None and file.is_file() else None


def end_session(process: subprocess.Popen) -> None:
    """End a process and all that it has started: ask first, so that it can give memory back, then do not ask."""
    for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # nobody is left
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def count_outcomes(text: str) -> dict[str, Any]:
    """Return how many tests passed, failed and were skipped by pytest's verbose log, and which failed."""
    outcomes = OUTCOME.findall(text)
    counts = {kind.lower(): sum(found == kind for _, found in outcomes) for kind in ("PASSED", "FAILED", "SKIPPED")}
    failures = [name for name, found in outcomes if found in ("FAILED", "ERROR")]
    return {**counts, "failures": failures}


def run_parts(parts: list[Part], output: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Run the parts one after the other and write `gpu.json` after each; returns what is in it."""
    output.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {**about, "parts": {}}
    spare = 0.0
    for part in parts:
        allowed = part.seconds + spare
        found = run_part(part, allowed, output / f"{part.name}.log")
        spare = max(0.0, allowed - found["seconds"])
        result["parts"][part.name] = found
        write_atomically(output / "gpu.json", result)
        print(f"{part.name}: {json.dumps(found)}", flush=True)
    return result


def write_atomically(file: Path, result: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    aside = file.with_name(f".{file.name}")
    aside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    aside.replace(file)


def describe() -> dict[str, Any]:
    """Return machine, card and versions; asked in another process, since a CUDA context here would take memory."""
    code = "import json; from _utils import describe_machine; print(json.dumps(describe_machine()))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=BENCHMARKS, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card-gb", type=float, help="cap the memory of each process as a card of so many GB would")
    parser.add_argument("--model", help="for the learning run: a name or a folder; random weights by default")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all parts together")
    parser.add_argument("--only", nargs="+", choices=SECONDS, default=list(SECONDS), help="parts to run")
    parser.add_argument("--output", type=Path, help="folder of results; benchmarks/results/gpu/<card> by default")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on a CPU too, to try this driver")
    args = parser.parse_args()
    about = describe()
    card = about["machine"]["gpu"]
    if card is None and not args.tiny:
        parser.error("there is no CUDA device here; --tiny runs the same parts on the CPU")
    name = re.sub(r"[^a-z0-9]+", "_", (card or "cpu").lower()).strip("_")
    name += "" if args.card_gb is None else f"_as_{args.card_gb:g}_gb"
    output = (args.output or BENCHMARKS / "results" / "gpu" / name).resolve()
    result = run_parts(plan_parts(args, output), output, {"card_gb": args.card_gb, "tiny": args.tiny, **about})
    sys.exit(any(part["status"] != "passed" for part in result["parts"].values()))


if __name__ == "__main__":
    main()

"""A run of 510 rollouts: does its memory, its time per rollout or its number of open files grow, and does it resume?

    python benchmarks/long_run.py [--rollouts 510] [--seed 0] [--output out/long_run] [--tiny]

SmolLM2-135M-Instruct is trained with LoRA on its top 5 layers against a reward adapter that `RewardTrainer` makes
first, with adaptive KL, evaluations, checkpoints with `save_total_limit=2`, and the HTML report. The run is made twice,
side by side, each process with one thread:

    undisturbed   in one process; growth of memory and time is measured here
    disturbed     SIGKILL and SIGTERM, twice each, at rollouts drawn before; each time a new process resumes with
                  `resume_from_checkpoint=True`

After each rollout's last optimizer step the process writes down its resident memory (VmRSS; RssAnon without mapped
files beside it), open files and threads, and its wall and CPU seconds since the rollout before: evaluations,
checkpoints and the report are in them. Memory of rollout 500 is compared with rollout 50 in one process; a restarted
process begins anew, so each process of the disturbed run is listed with its own first and last value. Time is compared
by the medians of the first and of the last 50 rollouts, in CPU seconds too, since other work on the machine stretches
wall seconds. The final adapter and value head of both runs must be the same bits.

The last line is JSON; `ratio` is the resident memory of rollout 500 over that of rollout 50. Of fewer than 500 rollouts
the first and the last quarter are compared, and nothing is written. `--tiny` takes a random model and 20 rollouts, with
one signal of each kind, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from _utils import ROOT, report, tiny_model
from attempts import equal_weights, finish, interrupt, start_attempt, wait_for

from ppo_plus import PPOCallback

FULL = {
    "rollouts": 510, "kills": 2, "top_layers": 5, "prompts": 256, "eval_prompts": 4, "prompt_tokens": 8,
    "response_tokens": 6, "pairs": 64, "eval_rollouts": 25, "save_steps": 19, "lora_r": 16,
}  # fmt: skip
TINY = FULL | {
    "rollouts": 20, "kills": 1, "top_layers": 1, "prompts": 16, "pairs": 8, "eval_rollouts": 5, "save_steps": 3,
    "lora_r": 4,
}  # fmt: skip
LATE = 500  # the rollout whose memory is compared, where a run has so many
STATUS = {"resident_mb": "VmRSS", "anonymous_mb": "RssAnon"}


class Watch(PPOCallback):
    """Append this process's memory, files, threads and seconds to a file of JSON lines after each rollout."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def on_train_begin(self, args, state, control, **kwargs):
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.steps_per_rollout:
            return
        wall, cpu = time.perf_counter(), time.process_time()
        row = {
            "rollout": state.global_step // args.steps_per_rollout,
            "wall_seconds": wall - self._wall,
            "cpu_seconds": cpu - self._cpu,
            **process_status(),
        }
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._wall, self._cpu = wall, cpu


def process_status() -> dict[str, float]:
    """Memory in MB, open files and threads of this process now; Linux only."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory = {name: int(lines[key].split()[0]) / 2**10 for name, key in STATUS.items()}
    return {**memory, "open_files": len(os.listdir("/proc/self/fd")), "threads": int(lines["Threads"])}


def make_datasets(tokenizer: Any, sizes: dict, tiny: bool) -> tuple[Any, Any, Any]:
    """Return preference pairs, prompts, and held-out prompts: movie reviews, or random words."""
    if tiny:
        from datasets import Dataset

        draw = random.Random(0)

        def words(n: int) -> list[str]:
            return [" ".join(f"w{draw.randint(2, 200)}" for _ in range(sizes["prompt_tokens"])) for _ in range(n)]

        pairs = Dataset.from_dict({"chosen": words(sizes["pairs"]), "rejected": words(sizes["pairs"])})
        return pairs, *(Dataset.from_dict({"prompt": words(sizes[name])}) for name in ("prompts", "eval_prompts"))
    sys.path.insert(0, str(ROOT / "recipes" / "demo"))
    from demo_assets import movie_reviews, preference_pairs, prompts, splits

    reviews = splits(movie_reviews())
    return (
        preference_pairs(reviews["rm_train"], tokenizer, sizes["pairs"], 32),
        prompts(reviews["ppo_train"], tokenizer, sizes["prompts"], sizes["prompt_tokens"]),
        prompts(reviews["ppo_eval"], tokenizer, sizes["eval_prompts"], sizes["prompt_tokens"]),
    )


def make_lora(model: str, sizes: dict, **overrides: Any) -> Any:
    """Return LoRA on the linear layers of the top decoder layers."""
    from peft import LoraConfig
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(model).num_hidden_layers
    return LoraConfig(
        r=sizes["lora_r"],
        lora_alpha=2 * sizes["lora_r"],
        target_modules=[f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
        layers_to_transform=list(range(layers - sizes["top_layers"], layers)),
        task_type="CAUSAL_LM",
        **overrides,
    )


def prepare(folder: Path, sizes: dict, tiny: bool) -> None:
    """Make the base model, its reward adapter and the prompts on disk, all that a run reads."""
    from _utils import smollm2
    from transformers import AutoTokenizer

    from ppo_plus import RewardConfig, RewardTrainer

    model = tiny_model(folder / "model", 256) if tiny else smollm2()
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    pairs, prompts, held_out = make_datasets(tokenizer, sizes, tiny)
    args = RewardConfig(
        output_dir=str(folder / "reward"), per_device_train_batch_size=8, num_train_epochs=1, learning_rate=5e-4,
        report_to="none", save_strategy="no", disable_tqdm=True, bf16=False, use_cpu=True,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trainer = RewardTrainer(
        model, args, train_dataset=pairs, processing_class=tokenizer, peft_config=make_lora(model, sizes)
    )
    trainer.train()
    trainer.save_model()
    prompts.to_json(folder / "prompts.jsonl")
    held_out.to_json(folder / "held_out.jsonl")
    (folder / "model.json").write_text(json.dumps(model))


def train(folder: Path, prepared: Path, sizes: dict, measurements: Path) -> None:
    """One attempt: resume from the newest whole checkpoint, or start, and go to the end."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from ppo_plus import AdaptiveKLCallback, PPOConfig, PPOTrainer

    warnings.simplefilter("ignore")
    model = json.loads((prepared / "model.json").read_text())
    prompts, held_out = (
        Dataset.from_list([json.loads(line) for line in (prepared / f"{name}.jsonl").read_text().splitlines()])
        for name in ("prompts", "held_out")
    )
    args = PPOConfig(
        output_dir=str(folder), total_episodes=2 * sizes["rollouts"], per_device_train_batch_size=2, num_mini_batches=1,
        num_ppo_epochs=2, response_length=sizes["response_tokens"], learning_rate=1e-4, value_head_learning_rate=1e-3,
        missing_eos_penalty=None, report_to="none", disable_tqdm=True, use_cpu=True, bf16=False,
        model_init_kwargs={"dtype": "float32"}, save_strategy="steps", save_steps=sizes["save_steps"],
        save_total_limit=2, eval_strategy="steps", eval_steps=2 * sizes["eval_rollouts"],
    )  # fmt: skip
    trainer = PPOTrainer(
        model,
        str(prepared / "reward"),
        args,
        train_dataset=prompts,
        eval_dataset=held_out,
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        peft_config=make_lora(model, sizes, lora_dropout=0.05),
        callbacks=[AdaptiveKLCallback(target=1.0, horizon=200), Watch(measurements)],
    )
    if not trainer.model.num_cached_layers:
        raise RuntimeError("No layer lies below the adapters: the cache of frozen layers is not in use.")
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(folder / "final"))


def read_rows(file: Path) -> list[dict]:
    """Read the rollouts that a process has measured; its last line may still be unfinished."""
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]


def draw_signals(sizes: dict, seed: int) -> list[tuple[int, float, signal.Signals]]:
    """Draw when which signal comes: after this rollout, and so much of a rollout's time later."""
    draw = random.Random(seed)
    kinds = [signal.SIGKILL, signal.SIGTERM] * sizes["kills"]
    draw.shuffle(kinds)
    rollouts = sorted(draw.sample(range(2, sizes["rollouts"] - 2), len(kinds)))
    return [(rollout, draw.random(), kind) for rollout, kind in zip(rollouts, kinds, strict=True)]


class Run:
    """A run in its own folder, made by one process or by several, one after the other."""

    def __init__(self, output: Path, name: str, flags: list[str]) -> None:
        self.folder, self.name, self.flags, self.attempts = output / name, name, flags, 0

    def start(self) -> tuple[subprocess.Popen, Path, Path]:
        """Start the next process; returns it with its log and its measurements."""
        stem = self.folder.parent / f"{self.name}_{self.attempts}"
        self.attempts += 1
        log, rows = stem.with_suffix(".log"), stem.with_suffix(".jsonl")
        return start_attempt(__file__, [*self.flags, "--train", str(self.folder), str(rows)], log), log, rows

    def finish(self, process: subprocess.Popen, log: Path, rows: Path) -> list[dict]:
        """Wait until a process has ended the run; returns what it measured."""
        finish(process, log)
        return read_rows(rows)


def disturb(run: Run, signals: list[tuple[int, float, signal.Signals]]) -> tuple[list, list]:
    """Interrupt a run by these signals and resume it after each; returns what came when, and all measurements."""
    came, measured = [], []
    for rollout, part, kind in signals:
        process, log, rows = run.start()
        wait_for(process, lambda rows=rows, goal=rollout: any(r["rollout"] >= goal for r in read_rows(rows)), log)
        time.sleep(part * read_rows(rows)[-1]["wall_seconds"])
        interrupt(process, kind, log)
        measured.append(read_rows(rows))
        came.append({"signal": kind.name, "after_rollout": measured[-1][-1]["rollout"]})
        print(json.dumps(came[-1]), file=sys.stderr, flush=True)
    measured.append(run.finish(*run.start()))
    return came, measured


def compare(rows: list[dict], sizes: dict) -> dict:
    """Compare the end of one process's rollouts with their beginning."""
    at = {row["rollout"]: row for row in rows}
    early, late = (at[sizes[moment]] for moment in ("early", "late"))
    found: dict[str, Any] = {
        name: {"early": early[name], "late": late[name], "ratio": late[name] / early[name]} for name in STATUS
    }
    for name in ("wall_seconds", "cpu_seconds"):
        windows = (rows[: sizes["window"]], rows[-sizes["window"] :])
        first, last = (statistics.median(row[name] for row in window) for window in windows)
        means = [statistics.fmean(row[name] for row in window) for window in windows]
        found[name] = {"first": first, "last": last, "ratio": last / first, "means": means}
    for name in ("open_files", "threads"):
        after_first = [row[name] for row in rows[1:]]
        found[name] = {"least": min(after_first), "most": max(after_first)}
    return found


def by_process(measured: list[list[dict]]) -> list[dict]:
    """Return of each process its first and last rollout with the memory and files at them."""
    names = ("rollout", *STATUS, "open_files")
    return [{name: [rows[0][name], rows[-1][name]] for name in names} for rows in measured]


def check_bounds(result: dict) -> dict[str, bool]:
    """Return which promises the figures keep."""
    undisturbed = result["undisturbed"]
    files = undisturbed["open_files"]
    return {
        "resident memory within 3 %": undisturbed["resident_mb"]["ratio"] <= 1.03,
        "CPU seconds a rollout within 5 %": undisturbed["cpu_seconds"]["ratio"] <= 1.05,
        "wall seconds a rollout within 5 %": undisturbed["wall_seconds"]["ratio"] <= 1.05,
        "open files constant": files["least"] == files["most"],
        "weights equal": result["identical"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, help="of each of the two runs; 510 by default")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which signals come")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "long_run")
    parser.add_argument("--tiny", action="store_true", help="a random model and 20 rollouts; writes no result")
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--train", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes: dict[str, int] = dict(TINY if args.tiny else FULL)
    sizes["rollouts"] = rollouts = args.rollouts if args.rollouts is not None else sizes["rollouts"]
    if rollouts < 12:
        parser.error(f"--rollouts must be 12 or more: its first and last quarter are compared; got {rollouts}")
    window = min(50, rollouts // 4)
    sizes |= {"window": window, "early": window, "late": min(LATE, rollouts)}
    prepared = args.output / "prepared"
    if args.prepare:
        prepare(prepared, sizes, args.tiny)
        return
    if args.train:
        train(args.train[0], prepared, sizes, args.train[1])
        return
    shutil.rmtree(args.output, ignore_errors=True)
    flags = ["--output", str(args.output), "--rollouts", str(sizes["rollouts"]), *["--tiny"] * args.tiny]
    log = args.output / "prepare.log"
    finish(start_attempt(__file__, [*flags, "--prepare"], log), log)
    alone, disturbed = (Run(args.output, name, flags) for name in ("undisturbed", "disturbed"))
    started = alone.start()
    came, measured = disturb(disturbed, draw_signals(sizes, args.seed))
    undisturbed = compare(alone.finish(*started), sizes)
    result = {
        "ratio": undisturbed["resident_mb"]["ratio"],
        "identical": equal_weights(alone.folder / "final", disturbed.folder / "final"),
        "undisturbed": undisturbed,
        "signals": came,
        "processes": by_process(measured),
        "seed": args.seed,
        **sizes,
    }
    report("long_run", {**result, "kept": check_bounds(result)}, write=not args.tiny and rollouts >= LATE)


if __name__ == "__main__":
    main()

"""GSM8K as prompts and solutions, then PPO, then one file with accuracy, seconds per step and peak memory.

    python recipes/gsm8k/gsm8k.py --config recipes/gsm8k/ppo.yaml [--questions openai/gsm8k] [arguments of ppo-plus ppo]

`--questions` is a dataset on the Hub, or a folder with train.jsonl and test.jsonl, with columns `question` and
`answer`, which ends in `#### number`. The prompts go to the folder that the configuration calls `dataset_name`, unless
it is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import load_dataset

from ppo_plus.cli.launch import run

INSTRUCTION = "Let's think step by step, and put the final answer within \\boxed{}."


def to_prompt(row: dict[str, str]) -> dict[str, Any]:
    """Return the messages of a question and its solution in the form that math-verify reads."""
    number = row["answer"].rpartition("####")[2].strip().replace(",", "")
    content = f"{row['question']} {INSTRUCTION}"
    return {"prompt": [{"role": "user", "content": content}], "solution": f"\\boxed{{{number}}}"}


def prepare(questions: str, folder: Path) -> None:
    """Write the prompts of both splits as JSON lines, unless the folder is there."""
    if folder.is_dir():
        return
    config = None if Path(questions).is_dir() else "main"
    splits = {split: load_dataset(questions, config, split=split) for split in ("train", "test")}
    for split, rows in splits.items():
        rows.map(to_prompt, remove_columns=rows.column_names).to_json(folder / f"{split}.jsonl")


def summarize(state: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a finished run from its `trainer_state.json`; accuracy is the mean held-out reward."""
    history = state["log_history"]
    evaluations = [row for row in history if "eval_reward" in row]
    seconds = next(row["train_runtime"] for row in history if "train_runtime" in row)
    on_gpu = torch.cuda.is_available()
    return {
        "accuracy": [row["eval_reward"] for row in evaluations],
        "at_step": [row["step"] for row in evaluations],
        "kl": evaluations[-1]["eval_kl"],
        "seconds_per_step": seconds / state["global_step"],  # with evaluations
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
    }


def setting(name: str, arguments: list[str]) -> str:
    """Return the value of an argument of `ppo-plus ppo`: from the command line, or else from the YAML file."""
    for index, word in enumerate(arguments):
        if word == f"--{name}":
            return arguments[index + 1]
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return yaml.safe_load(Path(setting("config", arguments)).read_text(encoding="utf-8"))[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", default="openai/gsm8k", help="a dataset on the Hub, or a folder")
    args, arguments = parser.parse_known_args()
    if not any(word.partition("=")[0] == "--config" for word in arguments):
        arguments = ["--config", str(Path(__file__).with_name("ppo.yaml")), *arguments]
    prepare(args.questions, Path(setting("dataset_name", arguments)))
    run("ppo", arguments)
    folder = Path(setting("output_dir", arguments))
    result = summarize(json.loads((folder / "trainer_state.json").read_text(encoding="utf-8")))
    (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    main()

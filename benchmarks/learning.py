"""Does it learn, and how fast? ppo_plus beside the last PPO of TRL (1.12) on the demo task, and one choice at a time.

    python benchmarks/learning.py [--seeds 0 1 2] [--seconds 210] [--trl-lam 0.8]
    python benchmarks/learning.py --ablations [critic kl_controller ...] [--seeds 0 1 2] [--episodes 256] [--jobs 2]

The task is that of `recipes/demo/rm_then_ppo.py --full`: SmolLM2-135M-Instruct continues openings of reviews, and the
reward model is the recipe's, trained once (seed 0) on the training split and shared by all runs. Everything is sampled
at temperature 1. Runs are processes of their own. The adapter is saved at fixed points with the clock stopped, and one
routine, `evaluate`, answers the same held-out prompts with the same noise for every adapter of either side.

Against TRL both sides train for the same wall-clock time, loading not counted. Equal are base (bf16), prompts, answer
length, LoRA, learning rate, Adam, KL coefficient (the default of both), and 32 episodes per update, learned from in 2
passes of 2 optimizer steps. What TRL needs for that, and what it gets beyond its defaults:

- 32 rows per device and no accumulation: with accumulation its `num_mini_batches` would not add optimizer steps.
- No activation checkpointing, and `stop_token="eos"` without a penalty, as here.
- The reward model merged into its base, which makes its forward pass as fast as can be.
- A critic that starts as that reward model and trains a LoRA and its score head: TRL has one learning rate for policy
  and critic, and the one of a LoRA is high for a critic that is trained in full, and slower.

Only here are a learning rate of the value head and a lambda of GAE, both the recipe's; TRL has its default of 0.95, or
what `--trl-lam` says, which goes into a result of its own. Our critic is the default: a head on the actor, from zero,
and the baseline from the reward adapter's scores of prefixes.

`learning.json`: `time_ratio_to_trl_final_reward` is our seconds until TRL's final held-out reward over TRL's seconds,
`kl_ratio` our KL at that moment over TRL's final one, both of means over seeds; null where a seed does not get there.
`frontier` is the mean held-out reward at equal KL; `curves` hold seconds, episodes, reward, KL (nats per answer), VADER
(took no part in training), length in tokens, distinct-2, repetition-3 and the reference's surprise, by seed.
`ablations.json` has a table for each question: by variant mean and deviation over seeds of reward, KL and VADER at the
end, reward at equal KL, and the critic's explained variance in the last quarter. One question alone goes into a result
of its own, `ablations_critic.json` for instance. A run that is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECIPE = ROOT / "recipes" / "demo" / "rm_then_ppo_full.yaml"
SIDES = ("trl", "ours")
POINTS = (1, 2, 3, 4, 6, 9, 12)  # twelfths of the budget after which an adapter is kept
FINAL = ("reward", "kl", "vader", "distinct_2", "repetition_3", "tokens", "seconds", "episodes")
HALVES = (6, 12)  # the same for ablations

# What is changed of the settings that all runs share, which are PPOConfig's defaults where `settings` has no other.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "detached": {"critic": "detached"},
    "adapter": {"critic": "adapter", "critic_backbone_learning_rate": 6e-4},  # twice the actor's, as by default
    "separate": {"value_model": True},
    "proportional": {"adaptive_kl": {"target": 2.0, "horizon": 64}},
    "band": {"adaptive_kl": {"band": [1.0, 2.0]}},
    "k3": {"kl_estimator": "k3"},
    "in_loss": {"kl_estimator": "k3", "kl_penalty_in": "loss"},
    "normalized": {"reward_normalization": True},
    "1x1": {"num_ppo_epochs": 1, "num_mini_batches": 1},
    "4x1": {"num_ppo_epochs": 4, "num_mini_batches": 1},
    "mlp": {"value_head": "mlp"},
    "no_baseline": {"prefix_reward_baseline": False},
    "lam_80": {"lam": 0.8},
    "lam_65": {"lam": 0.65},
    "lam_50": {"lam": 0.5},
}
ABLATIONS: dict[str, dict[str, str]] = {
    "critic": {"shared": "default", "detached": "detached", "adapter": "adapter", "separate": "separate"},
    "prefix_reward_baseline": {"on": "default", "off": "no_baseline"},
    "kl_controller": {"fixed": "default", "proportional": "proportional", "band": "band"},
    "kl_penalty": {"k1 in the reward": "default", "k3 in the reward": "k3", "k3 in the loss": "in_loss"},
    "reward_normalization": {"off": "default", "on": "normalized"},
    "epochs_x_minibatches": {"2x2": "default", "1x1": "1x1", "4x1": "4x1"},
    "value_head": {"linear": "default", "mlp": "mlp"},
    "gae_lambda": {"0.95": "default", "0.8": "lam_80", "0.65": "lam_65", "0.5": "lam_50"},
}


# ------------------------------------------------------------------------------------------------ what is run


def demo_arguments(work: Path) -> Any:
    """The recipe's settings, with its output in `work`."""
    import yaml
    from rm_then_ppo import DemoArguments

    return DemoArguments(**{**yaml.safe_load(RECIPE.read_text()), "output_dir": str(work)})


def prepare(job: dict) -> dict:
    """What all runs share, in `work`: prompts, and the recipe's reward model, as an adapter and merged for TRL."""
    import torch
    from demo_assets import movie_reviews, prompts, splits
    from peft import PeftModel
    from rm_then_ppo import build_reward_trainer, filter_by_source, train_reward_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    work = Path(job["work"])
    demo, tokenizer = demo_arguments(work), AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    reviews = splits(movie_reviews(), seed=demo.seed)
    found = {
        name: prompts(filter_by_source(reviews[split], "imdb"), tokenizer, n, demo.prompt_tokens, demo.seed)["prompt"]
        for name, split, n in (("train", "ppo_train", demo.num_prompts), ("held_out", "ppo_eval", job["held_out"]))
    }
    (work / "prompts.json").write_text(json.dumps({name: list(texts) for name, texts in found.items()}))
    folder, info = train_reward_model(build_reward_trainer(demo, job["model"], tokenizer, reviews))
    base = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype=torch.float32)
    base.config.pad_token_id = base.config.eos_token_id
    merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload().to(getattr(torch, job["dtype"]))
    merged.save_pretrained(work / "merged")
    return {"accuracy": info["accuracy"]}


def openings(job: dict) -> tuple[Any, Any, Any]:
    """Tokenizer, prompts to train on, and held-out prompts: the same for all seeds."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    found = json.loads((Path(job["work"]) / "prompts.json").read_text())
    train, held_out = (Dataset.from_dict({"prompt": found[name]}) for name in ("train", "held_out"))
    return AutoTokenizer.from_pretrained(job["model"], padding_side="left"), train, held_out


def settings(job: dict) -> dict[str, Any]:
    """Of the recipe, what both sides call by the same name; and what keeps them quiet."""
    recipe = demo_arguments(Path(job["work"])).ppo
    names = ("response_length", "learning_rate", "lr_scheduler_type", "missing_eos_penalty")
    return {name: recipe[name] for name in names} | {
        "output_dir": job["folder"], "seed": job["seed"], "total_episodes": job["episodes"], "temperature": 1.0,
        "num_ppo_epochs": 2, "num_mini_batches": 2, "adam_epsilon": 1e-5, "num_sample_generations": 0,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


class BudgetSpent(Exception):
    """Ends a run; TRL's PPO looks at no flag that would."""


def point_saver(job: dict, steps_per_update: int):
    """A callback that keeps the adapter after the first update at or beyond each point, with the clock stopped."""
    from transformers import TrainerCallback

    class PointSaver(TrainerCallback):
        def __init__(self) -> None:
            self.points, self.seconds, self.updates, self.saved = list(job["points"]), 0.0, 0, []

        def on_train_begin(self, args, state, control, **kwargs):
            self.since = time.perf_counter()

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step % steps_per_update:
                return
            self.seconds += time.perf_counter() - self.since
            self.updates += 1
            row = {"seconds": self.seconds, "episodes": self.updates * job["rollout"]}
            if row[job["unit"]] >= self.points[0]:
                folder = f"{job['folder']}/{len(self.saved)}"
                model.policy.save_pretrained(folder, selected_adapters=["default"])
                self.saved.append(row | {"adapter": folder})
                self.points = [point for point in self.points if point > row[job["unit"]]]
            if not self.points:
                raise BudgetSpent
            self.since = time.perf_counter()

    return PointSaver()


def until_spent(trainer: Any) -> None:
    try:
        trainer.train()
    except BudgetSpent:
        return
    raise RuntimeError("The run ended before its budget: give it more episodes.")


def our_trainer(job: dict, callbacks: list, **changes: Any):
    """PPO with the recipe's reward adapter on the actor's own backbone."""
    from rm_then_ppo import lora

    from ppo_plus import AdaptiveKLCallback, PPOConfig, PPOTrainer
    from ppo_plus.callbacks.reward_normalization import RewardNormalizationCallback

    tokenizer, train, held_out = openings(job)
    value_model = str(Path(job["work"]) / "merged") if changes.pop("value_model", False) else None
    if adaptive := changes.pop("adaptive_kl", None):
        callbacks = [*callbacks, AdaptiveKLCallback(**adaptive)]
    if changes.pop("reward_normalization", False):
        callbacks = [*callbacks, RewardNormalizationCallback()]
    given = settings(job) | {"value_head_learning_rate": 1e-3, "bf16": job["dtype"] == "bfloat16", "html_report": False}
    given |= {"model_init_kwargs": {"dtype": job["dtype"]}, **changes}
    given["per_device_train_batch_size"] = job["rollout"] // 2
    given["gradient_accumulation_steps"] = 2 // given["num_mini_batches"]
    return PPOTrainer(
        job["model"], str(Path(job["work"]) / "reward_model"), PPOConfig(**given), train_dataset=train,
        eval_dataset=held_out, processing_class=tokenizer, peft_config=lora(), value_model=value_model,
        callbacks=callbacks,
    )  # fmt: skip


def ours(job: dict) -> dict:
    changes = dict(job["changes"])
    updates = {"num_ppo_epochs": 2, "num_mini_batches": 2} | changes
    saver = point_saver(job, updates["num_ppo_epochs"] * updates["num_mini_batches"])
    trainer = our_trainer(job, [saver], **changes)
    until_spent(trainer)
    names = {"kl_coef": "ppo/kl_coef", "explained_variance": "critic/explained_variance", "reward": "reward"}
    logs = [row for row in trainer.state.log_history if "reward" in row]
    return {"points": saver.saved, "log": {name: [row[key] for row in logs] for name, key in names.items()}}


def trls(job: dict) -> dict:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    set_seed(job["seed"])
    tokenizer, train, _ = openings(job)
    train = train.map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=["prompt"])
    policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"])
    merged = str(Path(job["work"]) / "merged")
    reward_model, value_model = (
        AutoModelForSequenceClassification.from_pretrained(merged, num_labels=1, dtype=job["dtype"]) for _ in range(2)
    )
    lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    critic = LoraConfig(**lora, task_type="SEQ_CLS", modules_to_save=["score"])
    config = PPOConfig(
        **settings(job), **job["changes"], per_device_train_batch_size=job["rollout"], gradient_accumulation_steps=1,
        stop_token="eos", bf16=False, gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    saver = point_saver(job, 1)
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward_model,
        train_dataset=train, eval_dataset=train, callbacks=[saver],
        value_model=get_peft_model(value_model, critic).get_base_model(),
        peft_config=LoraConfig(**lora, task_type="CAUSAL_LM"),
    )  # fmt: skip
    until_spent(trainer)
    return {"points": saver.saved}


def evaluate(job: dict) -> dict:
    """What each saved adapter of a run answers to the held-out prompts; of no run, what the untrained model does."""
    import torch
    from rm_then_ppo import evaluate_prompts

    from ppo_plus.models.adapter_files import adapter_weights
    from ppo_plus.models.adapter_loading import load_adapter

    trainer = our_trainer({**job, "seed": 0}, [])  # the seed of sampling, the same for all runs

    def figures(adapter: str | None) -> dict[str, float]:
        if adapter is not None:
            load_adapter(trainer.model.policy, "default", adapter_weights(Path(adapter)), Path(adapter), "")
        with torch.no_grad():
            return evaluate_prompts(trainer)[0]

    if "changes" not in job:
        return {"curve": [{"seconds": 0.0, "episodes": 0, **figures(None)}]}
    points = json.loads((Path(job["folder"]) / "run.json").read_text())["points"]
    return {"curve": [figures(point.pop("adapter")) | point for point in points]}


CHILDREN = {"prepare": prepare, "ours": ours, "trl": trls, "evaluate": evaluate}


def child(kind: str, job: dict, file: str) -> dict:
    """Run one of `CHILDREN` in a process of its own, unless the file with its result is there."""
    path = Path(job["folder"]) / file
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        if kind == "trl":
            from ppo_runs import TRL

            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TRL), os.environ.get("PYTHONPATH")]))
        with (path.parent / f"{kind}.log").open("w") as log:
            command = [sys.executable, __file__, "--child", kind, json.dumps(job), str(path)]
            subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)
    return json.loads(path.read_text())


def run(side: str, job: dict) -> dict:
    """Train, then evaluate what was saved."""
    result = child(side, job, "run.json") | child("evaluate", job, "curve.json")
    start = json.loads((Path(job["work"]) / "start.json").read_text())["curve"]
    last = {name: round(value, 3) for name, value in result["curve"][-1].items()}
    print(f"{Path(job['folder']).name}: {last}", file=sys.stderr, flush=True)
    return result | {"curve": start + result["curve"]}


# ------------------------------------------------------------------------------------------------ what comes out


def where(curve: list[dict], name: str, level: float) -> dict | None:
    """The first place on the curve where `name` has risen to `level`, between two points by the straight line.

    None where it never does.
    """
    if curve[0][name] >= level:
        return curve[0]
    for before, after in pairwise(curve):
        if after[name] >= level:
            share = (level - before[name]) / (after[name] - before[name])
            return {key: before[key] + share * (after[key] - before[key]) for key in before}
    return None


def common_kl(curves: list[list[dict]]) -> float:
    """The largest KL that every curve reaches, nats."""
    return min(max(point["kl"] for point in curve) for curve in curves)


def reward_at_kl(curve: list[dict], kl: float) -> float:
    found = where(curve, "kl", kl)
    assert found is not None, "common_kl is reached by every curve"
    return found["reward"]


def spread(values: list[float]) -> dict[str, float | None]:
    """Mean and deviation over seeds; one seed has no deviation."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def against_trl(curves: dict[str, list[list[dict]]]) -> dict:
    """How the two sides compare; curves by side, in the order of the seeds."""
    finals = [curve[-1] for curve in curves["trl"]]
    reached = [where(curve, "reward", final["reward"]) for curve, final in zip(curves["ours"], finals, strict=True)]

    def ratio(name: str) -> float | None:
        if any(point is None for point in reached):
            return None
        return statistics.fmean(p[name] for p in reached) / statistics.fmean(f[name] for f in finals)  # type: ignore[index]

    top = common_kl(curves["trl"] + curves["ours"])
    levels = [top * share / 4 for share in range(1, 5)]
    return {
        "time_ratio_to_trl_final_reward": ratio("seconds"),
        "kl_ratio": ratio("kl"),
        "seconds_to_trl_final_reward": [None if point is None else point["seconds"] for point in reached],
        "kl_at_trl_final_reward": [None if point is None else point["kl"] for point in reached],
        "final": {
            side: {name: spread([curve[-1][name] for curve in of]) for name in FINAL} for side, of in curves.items()
        },
        "frontier": [
            {"kl": kl} | {side: spread([reward_at_kl(c, kl) for c in of]) for side, of in curves.items()}
            for kl in levels
        ],
    }  # fmt: skip


def ablation_table(runs: dict[str, list[dict]]) -> dict:
    """One table: by variant its figures over seeds; `runs` are results of `run` by variant."""
    kl = common_kl([run["curve"] for of in runs.values() for run in of])

    def explained(run: dict) -> float:
        values = run["log"]["explained_variance"]
        return statistics.fmean(values[-max(1, len(values) // 4) :])

    return {
        "equal_kl": kl,
        "variants": {
            name: {
                **{key: spread([run["curve"][-1][key] for run in of]) for key in ("reward", "kl", "vader", "seconds")},
                "reward_at_equal_kl": spread([reward_at_kl(run["curve"], kl) for run in of]),
                "explained_variance": spread([explained(run) for run in of]),
                "seeds": len(of),
            }
            for name, of in runs.items()
        },
    }


def compare(args: argparse.Namespace, job: dict) -> None:
    """Both sides, in turn, and results/learning.json."""
    from _utils import report
    from ppo_runs import TRL_VERSION, install_trl

    install_trl()
    timed = job | {"unit": "seconds", "points": [args.seconds * p / 12 for p in POINTS], "episodes": 10**6}
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    changes = {"trl": {} if args.trl_lam is None else {"lam": args.trl_lam}}
    changes["ours"] = {"lam": demo_arguments(args.work).ppo["lam"]}
    for seed in args.seeds:
        for side, done in runs.items():
            marks = "".join(f"-{name}-{value}" for name, value in changes[side].items())
            folder = str(args.work / f"{side}{marks}-{seed}")
            done.append(run(side, timed | {"seed": seed, "folder": folder, "changes": changes[side]}))
    curves = {side: [run["curve"] for run in done] for side, done in runs.items()}
    result = against_trl(curves) | {"seeds": args.seeds, "budget_seconds": args.seconds, "held_out": args.held_out}
    result |= {"changes": changes}
    accuracy = child("prepare", job, "prepare.json")["accuracy"]
    result |= {"reward_model_accuracy": accuracy, "curves": curves}
    name = "learning" if args.trl_lam is None else f"learning_trl_lam_{args.trl_lam}"
    report(name, result, not args.dry, trl=TRL_VERSION)


def ablate(args: argparse.Namespace, job: dict) -> None:
    """The tables that are asked for, and results/ablations.json after every run that completes one."""
    from _utils import report

    asked = {name: ABLATIONS[name] for name in args.ablations or ABLATIONS}
    name = "ablations" if len(asked) > 1 else f"ablations_{next(iter(asked))}"
    variants = list(dict.fromkeys(variant for table in asked.values() for variant in table.values()))
    counted = job | {"unit": "episodes", "points": [args.episodes * p / 12 for p in HALVES], "episodes": 10**6}
    done: dict[str, dict[int, dict]] = {variant: {} for variant in variants}

    def one(pair: tuple[int, str]) -> None:
        seed, variant = pair
        folder = str(args.work / f"{variant}-{seed}")
        done[variant][seed] = run("ours", counted | {"seed": seed, "folder": folder, "changes": VARIANTS[variant]})

    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(one, [(seed, variant) for seed in args.seeds for variant in variants]):
            tables = {
                question: ablation_table({row: list(done[variant].values()) for row, variant in table.items()})
                for question, table in asked.items()
                if all(done[variant] for variant in table.values())
            }
            if tables:
                ran = {"episodes": args.episodes, "seeds": args.seeds, "jobs": args.jobs}
                report(name, ran | {"tables": tables}, not args.dry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablations", nargs="*", choices=list(ABLATIONS), help="these tables; all if none is named")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=210, help="of training, of each run against TRL")
    parser.add_argument("--trl-lam", type=float, help="lambda of TRL's GAE, if not its default")
    parser.add_argument("--episodes", type=int, default=256, help="of each run of an ablation")
    parser.add_argument("--rollout", type=int, default=32, help="episodes per update")
    parser.add_argument("--held-out", type=int, default=128, help="prompts to evaluate on")
    parser.add_argument("--jobs", type=int, default=1, help="runs of an ablation side by side")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--model", help="a local folder; SmolLM2-135M-Instruct from its package by default")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "learning", help="what runs leave, to go on from")
    parser.add_argument("--dry", action="store_true", help="write no result")
    parser.add_argument("--child", nargs=3, metavar=("KIND", "JOB", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "recipes" / "demo"))
    if args.child:
        kind, job, file = args.child
        result = CHILDREN[kind](json.loads(job))
        Path(file).write_text(json.dumps(result))
        return
    from _utils import smollm2

    args.work = args.work.resolve()
    job = {"model": args.model or smollm2(), "work": str(args.work), "folder": str(args.work), "dtype": args.dtype,
           "rollout": args.rollout, "held_out": args.held_out}  # fmt: skip
    child("prepare", job, "prepare.json")
    child("evaluate", job | {"seed": 0, "episodes": args.rollout}, "start.json")
    (compare if args.ablations is None else ablate)(args, job)


if __name__ == "__main__":
    main()

"""Makes the tables of docs/, README.md and recipes/ from benchmarks/results/*.json: no figure is written by hand.

    python benchmarks/tables.py [--check]

A text shows a table where it has `<!-- name -->` and `<!-- /name -->`, with a name of `TABLES`, or `rows` and names of
results, as `<!-- rows crash_recovery long_run -->`. A result that does not exist has no row. `--check` writes nothing
and exits with status 1 where a text differs from the results.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def against_trl(r: dict) -> str:
    ours, theirs = r["ours"], r["trl"]
    phases = ", ".join(
        f"{p} {theirs[f'{p}_seconds'] / ours[f'{p}_seconds']:.1f}×" for p in ("generate", "score", "learn")
    )
    seconds = f"{ours['total_seconds']:.1f} s against {theirs['total_seconds']:.1f} s"
    compiled = f"; **{r['ratio_compiled']:.2f}×** with `torch_compile`" if "ratio_compiled" in r else ""
    return f"**{r['ratio']:.2f}×** as fast ({seconds}; {phases}){compiled}; {r['memory_ratio']:.2f} of the memory"


def above_floor(r: dict) -> str:
    phases = ", ".join(f"{p} {r['ratio_by_phase'][p]:.2f}" for p in ("generate", "score", "learn"))
    seconds = f"{r['update_seconds']['total']:.1f} s over {r['floor_seconds']['total']:.1f} s"
    return f"**{r['ratio']:.2f}×** the floor ({seconds}; {phases})"


def variable_length(r: dict) -> str:
    ours, theirs, batched = (r[f"{side}_tokens_per_second"] for side in ("ours", "generate", "generate_batch"))
    few, uniform = r["passes"]["few_long"], r["passes"]["uniform"]
    passes = (
        f"learning **{few['learn']:.2f}×** as fast without padding as with it "
        f"({few['padding'] * 100:.0f} % of the tokens), "
        f"{uniform['learn']:.2f}× where lengths are uniform ({uniform['padding'] * 100:.0f} %)"
    )
    speeds = f"{ours:.0f} tokens/s against {theirs:.0f}; {batched:.0f} by continuous batching, `generate_batch`"
    return f"**{r['ratio']:.2f}×** as fast ({speeds}); {passes}"


def turns(r: dict) -> str:
    read = r["tokens_read"]
    return (
        f"**{r['ratio']:.2f}×** as fast as reading the conversation again in each turn ({read['kept']} tokens of a "
        f"response pass through the model against {read['read_again']})"
    )


def tools(r: dict) -> str:
    names = {"ppo_turns": "PPO with rewards per turn", "ppo": "PPO", "grpo": "GRPO"}
    after = ", ".join(
        f"{name} {r[side]['after']['right']:.2f} ({listed(r[side]['after_by_seed']['right'], 2)})"
        for side, name in names.items()
    )
    return (
        f"right answers to held-out questions: {r['before']['right']:.2f} before, after {r['tokens']} sampled tokens "
        f"(by seed) {after}"
    )


def scaling(r: dict) -> str:
    episodes, response = (r[axis]["4x"]["growth"]["seconds_per_token"] for axis in ("episodes", "response"))
    width = r["width"]["4x"]["growth"]["seconds_per_token_and_parameter"]
    return (
        f"a token takes {episodes:.2f}× the time with 4× the episodes, {response:.2f}× with 4× the response length; "
        f"a token and parameter {width:.2f}× at 4× the width"
    )


def top_layers(r: dict) -> str:
    by_top = ", ".join(
        f"the top {name.removeprefix('top_')} **{found['ratio']:.2f}×** as fast as without that, "
        f"{found['ratio_to_all_layers']:.2f}× as LoRA on all"
        for name, found in r.items()
        if name.startswith("top_")
    )
    return f"scoring and learning: {by_top}"


def memory(r: dict) -> str:
    return f"**{r['ratio']:.2f}** of TRL's peak"


def reward_model(r: dict) -> str:
    def accuracies(ours: str, trls: str, apart: dict) -> str:
        above = f"{apart['mean']:+.3f} ± {apart['standard_error']:.3f}"
        return f"{r[ours]['accuracy']:.3f} ({above}), TRL's {r[trls]['accuracy']:.3f}"

    return (
        f"accuracy over {len(r['seeds'])} seeds {accuracies('ours', 'trl', r['accuracy_difference']['ours'])}; both on "
        f"an NF4 base {accuracies('ours_4bit', 'trl_4bit', r['accuracy_difference_4bit'])}; tensors of training on NF4 "
        f"{r['memory_ratio']:.2f} of TRL's default, at 1.7B's shape **{r['memory_ratio_1.7b']:.2f}** "
        f"(resident {r['resident_ratio_1.7b']:.2f})"
    )


def verifiable(r: dict) -> str:
    after = ", ".join(f"{side.upper()} {r[side]['after']:.2f}" for side in ("ppo", "grpo", "rloo"))
    return f"right answers to held-out sums: {r['ppo']['before']:.2f} before, after {r['tokens']} tokens {after}"


def mixed(r: dict) -> str:
    return f"{r['ratio']:.2f}× the time of a pass for each role"


def crash_recovery(r: dict) -> str:
    return f"{r['kills']} kills, {r['identical']} ended in the same bits"


def long_run(r: dict) -> str:
    alone, signals = r["undisturbed"], [one["signal"] for one in r["signals"]]
    came = " and ".join(f"{signals.count(name)} {name}s" for name in sorted({*signals}))
    least, most = (alone["open_files"][end] for end in ("least", "most"))
    files = f"{least} open files throughout" if least == most else f"{least} to {most} open files"
    ends = "in the same bits as" if r["identical"] else "in other bits than"
    return (
        f"rollout {r['late']} holds **{alone['resident_mb']['ratio']:.3f}** of rollout {r['early']}'s resident memory; "
        f"a rollout takes {alone['cpu_seconds']['ratio']:.2f}× the CPU time and {alone['wall_seconds']['ratio']:.2f}× "
        f"the wall time; {files}; after {came} it ended {ends} an undisturbed run"
    )


def demo_ends(r: dict) -> str:
    ends = [f"{run['after']['reward']:.2f} at {run['after']['kl']:.1f} nats" for run in r["runs"]]
    rises = ", ".join(f"{rise:+.2f}" for rise in r["vader_rises"])
    means = {name: statistics.fmean(run[name] for run in r["runs"]) for name in MINUTES if name in r["runs"][0]}
    return (
        f"held-out reward by seed {', '.join(ends)}; VADER score of held-out answers, by seed: {rises}; "
        f"{show_minutes(means)} minutes"
    )


MINUTES = ("minutes", "cpu_minutes")  # elapsed, and of all threads: what counts where the machine had other work


def show_minutes(of: dict[str, float]) -> str:
    """Elapsed minutes, and those of the CPU in parentheses where they were measured."""
    return f"{of['minutes']:.1f}" + (f" ({of['cpu_minutes']:.1f} of CPU time)" if "cpu_minutes" in of else "")


def against_grpo(r: dict) -> str:
    shapes = [
        f"{shape['prompt_tokens']} + {shape['response_tokens']} tokens: **{shape['time_ratio']:.2f}** of the time, "
        f"**{shape['memory_ratio']:.2f}** of the memory"
        for shape in r["shapes"].values()
    ]
    return "; ".join(shapes)


def engines(r: dict) -> str:
    speeds = []
    for name, words in (("equal", "48 tokens each"), ("uneven", "30 short and 2 of 256")):
        work = r["workloads"][name]
        ours, batch, vllm = (work[side]["tokens_per_cpu_second"] for side in ("ours", "generate_batch", "vllm"))
        speeds.append(
            f"{words}: {ours:.0f} tokens per CPU second, `generate_batch` {batch:.0f}, vLLM {vllm:.0f} "
            f"(**{work['cpu_ratio']:.2f}×** ours)"
        )
    sync = r["sync"]
    return (
        f"{'; '.join(speeds)}; the adapter is handed over in {sync['adapter_seconds']:.2f} s "
        f"({sync['adapter_mb']:.0f} MB), all weights alone take {sync['all_seconds']:.2f} s through a file "
        f"({sync['all_mb']:.0f} MB)"
    )


# File, what it shows, and its figures in words; in the order of the table.
ROWS: list[tuple[str, str, Callable[[dict], str]]] = [
    ("vs_trl_bfloat16", "one update against TRL 1.12's PPO, SmolLM2-135M, bf16", against_trl),
    ("vs_trl_bfloat16_no_amx", "the same on cores without AMX", against_trl),
    ("vs_trl_float32", "one update against TRL 1.12's PPO, SmolLM2-135M, fp32", against_trl),
    ("lower_bound", "one update against its own arithmetic on the bare model", above_floor),
    ("lower_bound_no_amx", "that on cores without AMX", above_floor),
    ("variable_length", "64 responses, 60 short and 4 long, against `generate`", variable_length),
    ("turns", "4 turns of 64 + 64 tokens whose keys and values are kept", turns),
    ("tools", "a calculator as tool, SmolLM2-135M, beside TRL's GRPO", tools),
    ("scaling", "cost as the work grows", scaling),
    ("top_layers", "the layers below LoRA run once per rollout, not in every pass", top_layers),
    ("vs_grpo", "one update against TRL 1.16's GRPO, 8 prompts x 4 answers, a critic trained on top", against_grpo),
    ("engines", "32 responses from our decoding and from a vLLM server, SmolLM2-135M with LoRA", engines),
    ("memory", "peak memory of an update against TRL 1.12's", memory),
    ("reward_model", "a reward model against TRL's RewardTrainer", reward_model),
    ("verifiable", "an exact checker as reward, beside TRL's GRPO and RLOO", verifiable),
    ("mixed_adapters_bfloat16", "all roles scored in one mixed pass, bf16", mixed),
    ("mixed_adapters_float32", "all roles scored in one mixed pass, fp32", mixed),
    ("crash_recovery", "killed at random moments and resumed", crash_recovery),
    ("long_run", "510 rollouts of SmolLM2-135M with checkpoints, evaluations and the report", long_run),
    ("demo", "reward model and PPO on real text", demo_ends),
    ("demo_full", "the full run of that: all layers, twice the episodes", demo_ends),
    ("demo_4bit", "the full run, the backbone of all roles in NF4", demo_ends),
    ("demo_top_layers", "the full run, LoRA on the top third of the layers alone", demo_ends),
]


def machine(r: dict) -> str:
    """Where and when, in a few words; empty where a result does not say."""
    found, gpu = r.get("machine", {}), r.get("machine", {}).get("gpu")
    cores = "1 CPU core" if found.get("cpu_cores") == 1 else f"{found.get('cpu_cores')} CPU cores"
    where = gpu or (f"{cores}, {found['cpu_capability']}" if found else "")
    return ", ".join(filter(None, [where, r.get("date", "")]))


def cards_table(results: Path = RESULTS) -> str:
    """Which models the planner predicts to fit which card, in Markdown; empty where it was not asked."""
    file = results / "cards.json"
    if not file.is_file():
        return ""
    r = json.loads(file.read_text())
    cards = list(r["models_by_card"])
    lines = [f"| Qwen2.5 in NF4 | {' | '.join(f'{card} GB' for card in cards)} |", "|---" * (len(cards) + 1) + "|"]
    for name, row in r["models"].items():
        lines.append(f"| {name} | {' | '.join(card_cell(row[card]) for card in cards)} |")
    lines += [
        "",
        "Predicted by the planner, never compared with a card: micro-batch of learning and peak, for prompts of "
        f"{r['prompt_length']} and responses of {r['response_length']} tokens, all four roles on one base. \\* with "
        "activation checkpointing ([cards.json](benchmarks/results/cards.json)).",
    ]
    return "\n".join(lines)


def card_cell(cell: dict) -> str:
    """Return the micro-batch and the peak of one model on one card."""
    if not cell["fits"]:
        return "no"
    star = "\\*" if cell["activation_checkpointing"] else ""
    rows = cell["per_device_train_batch_size"]
    return f"{rows} row{'' if rows == 1 else 's'}{star}, {cell['peak_gib']:.1f} GB"


# What README shows of the rows.
HEADLINES = ("vs_trl_bfloat16", "vs_grpo", "reward_model", "verifiable", "crash_recovery", "demo")


def headlines_table(results: Path = RESULTS) -> str:
    """Return the rows of `performance_table` that README shows, and how soon TRL's final reward is reached."""
    file = results / "learning.json"
    sentence = f"\n\nOn the demo task, {headline(json.loads(file.read_text()))}." if file.is_file() else ""
    return performance_table(results, HEADLINES) + sentence


def performance_table(results: Path = RESULTS, names: Iterable[str] | None = None) -> str:
    """The table in Markdown, of the results that are in the folder, or of those with some names."""
    if unknown := {*(names or ())} - {name for name, _, _ in ROWS}:
        raise ValueError(f"There is no row for {', '.join(sorted(unknown))}: add one to ROWS.")
    lines = ["| what | figures | where and when |", "|---|---|---|"]
    for name, what, figures in ROWS:
        file = results / f"{name}.json"
        if file.is_file() and (names is None or name in names):
            result = json.loads(file.read_text())
            lines.append(f"| [{what}](benchmarks/results/{name}.json) | {figures(result)} | {machine(result)} |")
    return "\n".join(lines)


def plus_minus(of: dict[str, float | None], digits: int = 2) -> str:
    """Mean and deviation over seeds; the mean alone of one seed."""
    return " ± ".join(f"{of[name]:.{digits}f}" for name in ("mean", "sd") if of[name] is not None)


# What a run ends with, and how many digits it is shown with.
ENDS = [
    ("episodes", "episodes", 0),
    ("reward", "held-out reward", 2),
    ("kl", "KL to the reference, nats", 1),
    ("vader", "VADER (took no part in training)", 2),
    ("distinct_2", "distinct-2", 2),
    ("repetition_3", "repetition-3", 3),
    ("tokens", "length, tokens", 1),
]


def learning_table(results: Path = RESULTS) -> str:
    """ppo_plus and TRL after the same time, in Markdown; empty where it was not measured."""
    file = results / "learning.json"
    if not file.is_file():
        return ""
    r = json.loads(file.read_text())
    seeds = ", ".join(map(str, r["seeds"]))
    lines = [f"| after {r['budget_seconds']:.0f} s of training, seeds {seeds} | TRL 1.12 | ppo_plus |", "|---|---|---|"]
    for name, what, digits in ENDS:
        theirs, ours = (plus_minus(r["final"][side][name], digits) for side in ("trl", "ours"))
        lines.append(f"| {what} | {theirs} | {ours} |")
    for level in r["frontier"]:
        theirs, ours = (plus_minus(level[side]) for side in ("trl", "ours"))
        lines.append(f"| reward where KL is {level['kl']:.1f} nats | {theirs} | {ours} |")
    lines += ["", f"{headline(r)} ([learning.json](benchmarks/results/learning.json); {machine(r)})."]
    for other in sorted(results.glob("learning_trl_lam_*.json")):
        r = json.loads(other.read_text())
        link = f"[{other.name}](benchmarks/results/{other.name})"
        lines += ["", f"Against TRL with λ {r['changes']['trl']['lam']}, {headline(r)} ({link}; {machine(r)})."]
    return "\n".join(lines)


def demo_table(results: Path = RESULTS) -> str:
    """The demo before and after, a row per variant and seed, in Markdown; empty where it was not run."""
    names = {"as it is": "demo", "`--full`": "demo_full", "`--full --load_in_4bit`": "demo_4bit"}
    files = {variant: results / f"{name}.json" for variant, name in names.items()}
    found = {variant: json.loads(file.read_text()) for variant, file in files.items() if file.is_file()}
    if not found:
        return ""
    titles = ("demo", "seed", "reward-model accuracy", "reward", "VADER (took no part in training)", "KL, nats",
              "distinct-2", "minutes")  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for variant, run in ((variant, run) for variant, r in found.items() for run in r["runs"]):
        rises = [f"{run['before'][name]:.2f} → {run['after'][name]:.2f}" for name in ("reward", "vader", "distinct_2")]
        cells = [variant, str(run["seed"]), f"{run['reward_model_accuracy']:.2f}", *rises[:2]]
        cells.append(f"{run['after']['kl']:.1f}")
        lines.append("| " + " | ".join([*cells, rises[2], show_minutes(run)]) + " |")
    ran = (f"[{files[v].name}](benchmarks/results/{files[v].name}): {machine(r)}" for v, r in found.items())
    return "\n".join([*lines, "", f"By `benchmarks/demo.py`. {'; '.join(ran)}."])


def headline(r: dict) -> str:
    """How soon TRL's final reward is reached, in words."""
    reached = [seconds for seconds in r["seconds_to_trl_final_reward"] if seconds is not None]
    if len(reached) < len(r["seeds"]):
        return f"ppo_plus reached TRL's final held-out reward with {len(reached)} of {len(r['seeds'])} seeds"
    return (
        f"ppo_plus reached TRL's final held-out reward in **{r['time_ratio_to_trl_final_reward']:.2f}** of its time, "
        f"at **{r['kl_ratio']:.2f}** of its KL"
    )


QUESTIONS = {
    "critic": "critic",
    "prefix_reward_baseline": "baseline from prefix scores",
    "reward_baseline": "baseline from prefix scores",  # its name when the committed result was measured
    "kl_controller": "KL coefficient",
    "kl_penalty": "KL penalty",
    "reward_normalization": "reward normalization",
    "epochs_x_minibatches": "epochs × minibatches",
    "value_head": "value head",
    "gae_lambda": "λ of GAE",
}


def defaults_table(results: Path = RESULTS) -> str:
    """All ablations in one table, in Markdown; the default is the first of each question. Empty if not measured."""
    found = [json.loads(file.read_text()) for file in sorted(results.glob("ablations*.json"))]
    if not found:
        return ""
    titles = ("", "", "reward", "KL, nats", "reward at equal KL", "VADER", "explained variance", "seconds")
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for name, table in (item for r in found for item in r["tables"].items()):
        for index, (variant, v) in enumerate(table["variants"].items()):
            question, shown = ("", variant) if index else (QUESTIONS[name], f"**{variant}**")
            # Where one variant hardly moved, equal KL is where all of them began.
            moved = table["equal_kl"] >= 0.5
            at_kl = f"{plus_minus(v['reward_at_equal_kl'])} at {table['equal_kl']:.1f}" if moved else "-"
            cells = [question, shown, plus_minus(v["reward"]), plus_minus(v["kl"], 1), at_kl, plus_minus(v["vader"])]
            lines.append(
                "| " + " | ".join([*cells, plus_minus(v["explained_variance"]), plus_minus(v["seconds"], 0)]) + " |"
            )
    ran = (
        f"{', '.join(QUESTIONS[name] for name in r['tables'])}: {r['episodes']} episodes each, seeds "
        f"{', '.join(map(str, r['seeds']))}{', two runs side by side' * (r.get('jobs', 2) == 2)}; {machine(r)}."
        for r in found
    )
    return "\n".join([*lines, "", *ran])


def signal_table(results: Path = RESULTS) -> str:
    """What a step is worth by lambda and baseline, in Markdown; empty where it was not measured."""
    files = [results / f"{name}.json" for name in ("gradient_signal", "gradient_signal_trained")]
    found = [json.loads(file.read_text()) for file in files if file.is_file()]
    if not found:
        return ""
    columns = [(r, baseline) for r in found for baseline in ("off", "on")]
    titles = ["λ", *(f"policy at {r['kl']:.1f} nats, baseline {baseline}" for r, baseline in columns)]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for lam in dict.fromkeys(name.split()[1] for r in found for name in r["gains"]):
        cells = [r["gains"][f"{baseline} {lam}"] for r, baseline in columns]
        lines.append(f"| {lam} | " + " | ".join(f"{c['gain']:.2f} ± {c['standard_error']:.2f}" for c in cells) + " |")
    ran = (f"{r['minibatches']} minibatches of {r['rows']} at {r['kl']:.1f} nats; {machine(r)}." for r in found)
    return "\n".join([*lines, "", *ran])


def listed(numbers: Iterable[float], digits: int = 1) -> str:
    return ", ".join(f"{number:.{digits}f}" for number in numbers)


def recipes_table(results: Path = RESULTS, folder: str = "") -> str:
    """Markdown table of what each YAML file trains on a small model and the demo's data, also of one folder only."""
    file = results / "recipes.json"
    if not file.is_file():
        return ""
    r = json.loads(file.read_text())
    lines = ["| file | here | figures | minutes |", "|---|---|---|---|"]
    for run in r["runs"].values():
        by_seed = run["by_seed"]
        if folder and not (run["config"] or "").startswith(f"{folder}/"):
            continue
        if "accuracy" in by_seed[0]:
            right = listed((one["accuracy"] for one in by_seed), 2)
            found = f"{right} of {by_seed[0]['pairs']} held-out pairs in the right order"
        else:
            rises = (f"{one['before']['reward']:.2f} → {one['after']['reward']:.2f}" for one in by_seed)
            found = f"held-out reward {', '.join(rises)} at {listed(one['after']['kl'] for one in by_seed)} nats"
        config = (run["config"] or "").removeprefix(f"{folder}/")
        file_name = f"[{config}]({config})" if config else "none"
        lines.append(f"| {file_name} | {run['what']} | {found} | {listed(one['minutes'] for one in by_seed)} |")
    link = "[recipes.json](benchmarks/results/recipes.json), by `benchmarks/recipes.py`"
    return "\n".join([*lines, "", f"{link}, seeds {', '.join(map(str, r['seeds']))}; {machine(r)}."])


def recipe_output(folder: str, results: Path = RESULTS) -> str:
    """Last lines that the runs of a recipe print for the first seed, in Markdown."""
    if folder == "demo":
        run = json.loads((results / "demo.json").read_text())["runs"][0]
        before, after = run["before"], run["after"]
        lines = [
            f"Held-out reward {before['reward']:.2f} -> {after['reward']:.2f}, KL {after['kl']:.1f} nats, "
            f"VADER {before['vader']:.2f} -> {after['vader']:.2f}, {run['minutes']:.1f} minutes"
        ]
    else:
        runs = json.loads((results / "recipes.json").read_text())["runs"].values()
        first = [run["by_seed"][0] for run in runs if (run["config"] or "").startswith(f"{folder}/")]
        lines = [
            f"Accuracy on {one['pairs']} held-out pairs: {one['accuracy']:.3f}"
            if "accuracy" in one
            else f"Held-out reward {one['before']['reward']:.2f} -> {one['after']['reward']:.2f}, "
            f"KL {one['after']['kl']:.1f} nats"
            for one in first
        ]
    return "\n".join(["```text", *lines, "```"])


def memory_table(results: Path = RESULTS) -> str:
    """Memory in use beside TRL's, in Markdown, with ours over theirs; of what was measured."""
    files = {name: results / f"{name}.json" for name in ("memory", "reward_model")}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    lines = ["| what | ppo_plus | TRL (default) | TRL on NF4 |", "|---|---|---|---|"]

    def row(what: str, ours: float, *theirs: float) -> None:
        cells = [f"{ours:,.0f} MB", *(f"{their:,.0f} MB ({ours / their:.2f})" for their in theirs)]
        lines.append(f"| {what} | {' | '.join([*cells, *[''] * (3 - len(cells))])} |")

    if r := found.get("memory"):
        row("two rollouts with their updates in fp32, resident", r["ours"]["peak_mb"], r["trl"]["peak_mb"])
    if r := found.get("reward_model"):
        for shape, sides in (("135M", r), ("1.7B's shape", r["memory_1.7b"])):
            for what, name in (("tensors", "tensor_peak_mb"), ("resident", "resident_peak_mb")):
                each = (sides[side][name] for side in ("ours_4bit", "trl", "trl_4bit"))
                row(f"a reward model on NF4, {shape}, {what}", *each)
    ran = (f"[{name}.json](../benchmarks/results/{name}.json): {machine(r)}." for name, r in found.items())
    return "\n".join([*lines, "", " ".join(ran)]) if found else ""


VERIFIERS = {"math-verify": "math-verify", "reasoning-gym": "reasoning-gym", "if-verifiable": "IFEval"}
NO_WORK = ("empty", "full stop", "refusal", "question")
WRONG_ANSWER = 0.01  # what many data sets of reasoning-gym pay for any answer, by intent


def verifiers(results: Path = RESULTS) -> dict:
    """The committed measurement of verifiers; empty where there is none."""
    file = results / "verifiers.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def paid(score: Any) -> bool:
    """Whether a score is more than what a wrong answer gets, or none at all."""
    return isinstance(score, str) or score > WRONG_ANSWER + 1e-9


def score_cell(score: Any) -> str:
    return score if isinstance(score, str) else f"{score:.2f}"


def verifiers_table(results: Path = RESULTS) -> str:
    """What each kind of answer earns from each verifier, in Markdown."""
    r = verifiers(results)
    if not r:
        return ""
    forms, sets, checkers = (r[name]["scores"] for name in VERIFIERS)
    heads = [*(f"math-verify, {form}" for form in forms), "reasoning-gym", "IFEval"]
    lines = [f"| answer | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for kind in dict.fromkeys([*next(iter(forms.values())), *next(iter(checkers.values()))]):
        cells = [score_cell(row[kind]) if kind in row else "" for row in forms.values()]
        of_sets = [row[kind] for row in sets.values() if kind in row]
        if of_sets:
            full, nothing = sum(s == 1 for s in of_sets), sum(not paid(s) for s in of_sets)
            cells.append(f"{full} in full, {len(of_sets) - full - nothing} in part, {nothing} nothing")
        else:
            cells.append("")
        shares = [row[kind] for row in checkers.values() if not isinstance(row.get(kind, ""), str)]
        cells.append(
            f"{sum(s == 1 for s in shares)} always, {sum(0 < s < 1 for s in shares)} sometimes" if shares else ""
        )
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {r[name]['version']}" for name in VERIFIERS)
    counts = f"{len(sets)} data sets and {sum(not isinstance(c['empty'], str) for c in checkers.values())} checkers"
    return "\n".join([*lines, "", f"{versions}; {counts}, {r['items']} items each; {r['date']}."])


def paid_for_nothing_table(name: str, results: Path = RESULTS) -> str:
    """The scorers of one verifier that pay for an answer that solves nothing, in Markdown."""
    r = verifiers(results)
    if not r:
        return ""
    scores = r[name]["scores"]
    kinds = [kind for kind in NO_WORK if kind in next(iter(scores.values()))]
    rows = {scorer: [row[kind] for kind in kinds] for scorer, row in scores.items()}
    lines = [f"| scorer | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    lines += [
        f"| `{scorer}` | {' | '.join(map(score_cell, found))} |"
        for scorer, found in rows.items()
        if any(map(paid, found)) and "no data" not in found
    ]
    return "\n".join(lines)


def reason(text: str) -> str:
    """What a cell says after its first word, without what differs from model to model."""
    text = re.sub(r"\w+(ForCausalLM|LMHeadModel|ForConditionalGeneration)\b", "the model", text)
    text = re.sub(r"/tmp/\S+|'\S*/tmp\S*'", "a folder", text)
    text = re.sub(r" (<class \S+>|\(model_type=\S+\))| (Model type should be|Incompatible modules:) .*", "", text)
    text = re.sub(r"(?<=[.)])\.? (If an adapter|Choose another model).*", "", text)  # hints, some cut
    text = text.replace("<", "&lt;")
    return re.sub(r" \(relative error \S+\)", "", text).strip(" .")


# What is measured of each architecture, and the heading of its column.
ARCHITECTURE_COLUMNS = {
    "left_padding": "left padding",
    "packing": "packing",
    "shared_prompts": "shared prompts",
    "frozen_layers": "frozen layers",
    "cached_decoding": "cached decoding",
    "generate": "greedy = `generate`",
    "nf4": "4 bit (NF4)",
    "reward_head": "reward head",
    "lora": "LoRA, all-linear",
}


def architectures_table(results: Path = RESULTS) -> str:
    """What works with which decoder, in Markdown, with the reasons in a list; empty where it was not measured."""
    file = results / "architectures.json"
    if not file.is_file():
        return ""
    r = json.loads(file.read_text())
    measured = {name for row in r["rows"] for name in row.get("cells", {})}
    columns = {name: title for name, title in ARCHITECTURE_COLUMNS.items() if name in measured}
    numbers: dict[str, int] = {}
    lines = [f"| model | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for row in (row for row in r["rows"] if "cells" in row and "refused" not in row):
        cells = []
        for name in columns:
            word, why = re.match(r"(\w+)[:,]?\s*(.*)", row["cells"][name]).groups()  # type: ignore[union-attr]
            number = numbers.setdefault(reason(why), len(numbers) + 1) if why else None
            cells.append(word if number is None else f"{word} ({number})")
        lines.append(f"| {row['model']} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {why}" for why, number in numbers.items())]
    for key, title in (("refused", "Refused when a trainer is made"), ("left_out", "Not measured")):
        lines += ["", f"{title}:", "", "| model | reason |", "|---|---|"]
        lines += [f"| {row['model']} | {reason(row[key])} |" for row in r["rows"] if key in row]
    counts = f"{r['models']} classes of transformers {r['versions']['transformers']}: {r['taken']} taken, "
    counts += f"{r['refused']} refused, {r['left_out']} not measured"
    link = "[architectures.json](benchmarks/results/architectures.json), by `benchmarks/architectures.py`"
    return "\n".join([*lines, "", f"{counts} ({link}; {machine(r)})."])


# What makes the table of each name.
TABLES: dict[str, Callable[[], str]] = {
    "performance": performance_table,
    "headlines": headlines_table,
    "cards": cards_table,
    "learning": learning_table,
    "demo": demo_table,
    "recipes": recipes_table,
    **{f"recipe {name}": partial(recipes_table, folder=name) for name in ("qwen_7b_qlora", "qwen_deberta", "tldr")},
    **{f"output {name}": partial(recipe_output, name) for name in ("demo", "qwen_7b_qlora", "qwen_deberta", "tldr")},
    "memory": memory_table,
    "defaults": defaults_table,
    "signal": signal_table,
    "verifiers": verifiers_table,
    "reasoning_gym": partial(paid_for_nothing_table, "reasoning-gym"),
    "ifeval": partial(paid_for_nothing_table, "if-verifiable"),
    "architectures": architectures_table,
}


def find_places(root: Path = ROOT) -> list[tuple[str, str]]:
    """Return each text of the repository with the name of a table that it has markers for."""
    marker = re.compile(r"<!-- /?(\w+|(?:rows|recipe|output) [\w. ]+) -->")
    texts = [root / "README.md", *sorted(root.glob("docs/*.md")), *sorted(root.glob("recipes/**/README.md"))]
    return [
        (text.relative_to(root).as_posix(), name)
        for text in texts
        for name in dict.fromkeys(marker.findall(text.read_text(encoding="utf-8")))
        if name in TABLES or name.startswith("rows ")
    ]


def make_table(file: str, name: str) -> str:
    """Make a table for a text, with its links to the results as they are from there.

    Args:
        file: path of the text in the repository.
        name: a key of `TABLES`, or `rows` and names of results: these rows of the table of performance.
    """
    results = f"{'../' * file.count('/')}benchmarks/results/"
    table = performance_table(names=name.split()[1:]) if name.startswith("rows ") else TABLES[name]()
    return re.sub(r"\]\((?:\.\./)*benchmarks/results/", f"]({results}", table)


def with_table(text: str, name: str, table: str) -> str:
    """The text with the table between its two markers."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"The text needs {begin} and, after it, {end}, once each: the table goes between them.")
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n\n{table}\n\n{end}", text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a text differs")
    args = parser.parse_args()
    for file, name in find_places():
        text = (ROOT / file).read_text()
        made = with_table(text, name, make_table(file, name))
        if args.check and made != text:
            sys.exit(f"{file} differs from benchmarks/results at {name}: run python benchmarks/tables.py")
        if not args.check:
            (ROOT / file).write_text(made)


if __name__ == "__main__":
    main()

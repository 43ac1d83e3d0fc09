"""The figures in README and docs are those of the committed results, and of nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables  # noqa: E402

SIDE = {"generate_seconds": 1.0, "score_seconds": 2.0, "learn_seconds": 4.0, "total_seconds": 7.0}
MACHINE = {"machine": {"cpu_cores": 2, "cpu_capability": "AVX512", "gpu": None}, "date": "2026-01-02"}
VARIABLE_LENGTH = {
    "ratio": 2.345, "ours_tokens_per_second": 469.0, "generate_tokens_per_second": 200.0,
    "generate_batch_tokens_per_second": 300.0, **MACHINE,
    "passes": {"few_long": {"padding": 0.8, "learn": 3.5}, "uniform": {"padding": 0.4, "learn": 1.25}},
}  # fmt: skip
LEARNED = {"after": {"right": 0.75}, "after_by_seed": {"right": [0.7, 0.8]}}


def growth(per_token, per_parameter):
    return {"4x": {"growth": {"seconds_per_token": per_token, "seconds_per_token_and_parameter": per_parameter}}}


RESULTS = {
    "vs_trl_bfloat16": {
        "ratio": 3.0, "memory_ratio": 0.25, "ours": SIDE, "trl": {k: 3 * v for k, v in SIDE.items()}, **MACHINE,
    },
    "vs_trl_bfloat16_no_amx": {
        "ratio": 2.0, "memory_ratio": 0.25, "ours": SIDE, "trl": {k: 2 * v for k, v in SIDE.items()}, **MACHINE,
    },
    "vs_trl_float32": {"ratio": 1.0, "memory_ratio": 0.5, "ours": SIDE, "trl": SIDE},
    "lower_bound": {
        "ratio": 1.5, "ratio_by_phase": {"generate": 1.25, "score": 2.0, "learn": 1.5},
        "update_seconds": {"total": 30.0}, "floor_seconds": {"total": 20.0}, **MACHINE,
    },
    "lower_bound_no_amx": {
        "ratio": 1.25, "ratio_by_phase": {"generate": 1.0, "score": 1.5, "learn": 1.25},
        "update_seconds": {"total": 50.0}, "floor_seconds": {"total": 40.0}, **MACHINE,
    },
    "variable_length": VARIABLE_LENGTH,
    "turns": {"ratio": 1.75, "tokens_read": {"kept": 700, "read_again": 2000}},
    "tools": {"tokens": 4000, "before": {"right": 0.5}, "ppo_turns": LEARNED, "ppo": LEARNED, "grpo": LEARNED},
    "scaling": {"episodes": growth(0.9, 0), "response": growth(1.1, 0), "width": growth(0, 0.75)},
    "memory": {"ratio": 0.333},
    "reward_model": {
        "ours": {"accuracy": 0.75}, "trl": {"accuracy": 0.74}, "ours_4bit": {"accuracy": 0.7},
        "trl_4bit": {"accuracy": 0.71}, "accuracy_difference": {"ours": {"mean": 0.01, "standard_error": 0.002}},
        "accuracy_difference_4bit": {"mean": -0.01, "standard_error": 0.0125},
        "seeds": [0, 2], "memory_ratio": 0.3, "memory_ratio_1.7b": 0.2, "resident_ratio_1.7b": 0.25,
    },
    "verifiable": {
        "ppo": {"before": 0.25, "after": 0.5}, "grpo": {"after": 0.4}, "rloo": {"after": 0.3}, "tokens": 2000,
    },
    "mixed_adapters_bfloat16": {"ratio": 1.5},
    "mixed_adapters_float32": {"ratio": 1.25},
    "crash_recovery": {"kills": 50, "identical": 49},
    "long_run": {
        "identical": True, "early": 50, "late": 500, "signals": [{"signal": "SIGTERM"}, {"signal": "SIGKILL"}] * 2,
        "undisturbed": {
            "resident_mb": {"ratio": 1.0125}, "cpu_seconds": {"ratio": 1.024}, "wall_seconds": {"ratio": 0.99},
            "open_files": {"least": 6, "most": 6},
        },
    },
    "demo": {
        "vader_rises": [0.25, -0.5], "runs": [{"after": {"reward": 2, "kl": 7.0}, "minutes": 3}], **MACHINE,
        "machine": {"gpu": "A card"},
    },
    "demo_4bit": {
        "vader_rises": [0.5], "runs": [{"after": {"reward": 1.25, "kl": 6.0}, "minutes": 8}],
    },
}  # fmt: skip


def table_of(folder, results) -> list[list[str]]:
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    lines = tables.performance_table(folder).splitlines()
    assert lines[1] == "|---|---|---|"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize(("file", "name"), tables.find_places())
def test_texts_say_what_the_committed_results_say(file, name):
    text = (ROOT / file).read_text()
    assert tables.with_table(text, name, tables.make_table(file, name)) == text


def test_every_table_but_the_headlines_is_in_docs_or_recipes():
    found = {name for file, name in tables.find_places() if file != "README.md"}
    assert found >= tables.TABLES.keys() - {"headlines"}


def test_links_of_a_table_lead_to_the_results_from_where_it_stands():
    for file in ("README.md", "docs/benchmarks.md"):
        links = re.findall(r"\]\(([^)]+\.json)\)", tables.make_table(file, "performance"))
        assert links and all((ROOT / file).parent.joinpath(link).is_file() for link in links)


def test_a_page_may_show_some_rows():
    table = tables.make_table("docs/x/y.md", "rows long_run crash_recovery")
    links = re.findall(r"\]\(([^)]+)\)", table)
    assert links == [
        f"../../benchmarks/results/{name}.json" for name in ("crash_recovery", "long_run")
    ]  # in the order of ROWS
    with pytest.raises(ValueError, match="gone"):
        tables.make_table("README.md", "rows crash_recovery gone")


def test_tables_are_found_by_their_markers(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- learning -->\n<!-- /learning -->\n<!-- parameters -->")
    (tmp_path / "docs" / "a.md").write_text(
        "<!-- /rows crash_recovery -->"
    )  # its other marker is missing: an error later
    assert tables.find_places(tmp_path) == [("README.md", "learning"), ("docs/a.md", "rows crash_recovery")]


def test_headlines_are_some_rows_of_performance(tmp_path):
    rows = table_of(tmp_path, RESULTS)
    lines = tables.headlines_table(tmp_path).splitlines()[2:]
    assert 0 < len(lines) < len(rows)
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        row for row in rows if any(f"/{name}.json" in row[0] for name in tables.HEADLINES)
    ]


@pytest.mark.parametrize("name", [name for name, _, _ in tables.ROWS])
def test_each_committed_result_has_its_row(name):
    there = (tables.RESULTS / f"{name}.json").is_file()
    assert (f"(benchmarks/results/{name}.json)" in tables.performance_table()) == there


def test_every_result_becomes_words(tmp_path):
    rows = table_of(tmp_path, RESULTS)
    assert [figures for _, figures, _ in rows] == [
        "**3.00×** as fast (7.0 s against 21.0 s; generate 3.0×, score 3.0×, learn 3.0×); 0.25 of the memory",
        "**2.00×** as fast (7.0 s against 14.0 s; generate 2.0×, score 2.0×, learn 2.0×); 0.25 of the memory",
        "**1.00×** as fast (7.0 s against 7.0 s; generate 1.0×, score 1.0×, learn 1.0×); 0.50 of the memory",
        "**1.50×** the floor (30.0 s over 20.0 s; generate 1.25, score 2.00, learn 1.50)",
        "**1.25×** the floor (50.0 s over 40.0 s; generate 1.00, score 1.50, learn 1.25)",
        "**2.35×** as fast (469 tokens/s against 200; 300 by continuous batching, `generate_batch`); "
        "learning **3.50×** as fast without padding "
        "as with it (80 % of the tokens), 1.25× where lengths are uniform (40 %)",
        "**1.75×** as fast as reading the conversation again in each turn (700 tokens of a response pass through the "
        "model against 2000)",
        "right answers to held-out questions: 0.50 before, after 4000 sampled tokens (by seed) PPO with rewards per "
        "turn 0.75 (0.70, 0.80), PPO 0.75 (0.70, 0.80), GRPO 0.75 (0.70, 0.80)",
        "a token takes 0.90× the time with 4× the episodes, 1.10× with 4× the response length; a token and parameter "
        "0.75× at 4× the width",
        "**0.33** of TRL's peak",
        "accuracy over 2 seeds 0.750 (+0.010 ± 0.002), TRL's 0.740; both on an NF4 base 0.700 (-0.010 ± 0.013), TRL's "
        "0.710; tensors of training on NF4 0.30 of TRL's default, at 1.7B's shape **0.20** (resident 0.25)",
        "right answers to held-out sums: 0.25 before, after 2000 tokens PPO 0.50, GRPO 0.40, RLOO 0.30",
        "1.50× the time of a pass for each role",
        "1.25× the time of a pass for each role",
        "50 kills, 49 ended in the same bits",
        "rollout 500 holds **1.012** of rollout 50's resident memory; a rollout takes 1.02× the CPU time and 0.99× the "
        "wall time; 6 open files throughout; after 2 SIGKILLs and 2 SIGTERMs it ended in the same bits as an "
        "undisturbed run",
        "held-out reward by seed 2.00 at 7.0 nats; VADER score of held-out answers, by seed: +0.25, -0.50; 3.0 minutes",
        "held-out reward by seed 1.25 at 6.0 nats; VADER score of held-out answers, by seed: +0.50; 8.0 minutes",
    ]
    assert [where for _, _, where in rows] == [
        *["2 CPU cores, AVX512, 2026-01-02"] * 2, "", *["2 CPU cores, AVX512, 2026-01-02"] * 3, *[""] * 10,
        "A card, 2026-01-02", "",
    ]  # fmt: skip


def test_a_result_that_is_not_there_has_no_row(tmp_path):
    assert table_of(tmp_path, {}) == []
    (row,) = table_of(tmp_path, {"variable_length": VARIABLE_LENGTH})
    assert row[0].endswith("(benchmarks/results/variable_length.json)")


def test_only_what_is_between_the_markers_is_replaced():
    text = "before\n<!-- one -->\nold, with \\1 in it\n<!-- /one -->\nafter <!-- two --> two <!-- /two -->"
    once = tables.with_table(text, "one", "| \\g<0> |")
    assert once == ("before\n<!-- one -->\n\n| \\g<0> |\n\n<!-- /one -->\nafter <!-- two --> two <!-- /two -->")
    assert tables.with_table(once, "one", "| \\g<0> |") == once


@pytest.mark.parametrize("text", ["", "<!-- t -->", "<!-- /t --> <!-- t -->", "<!-- t --> <!-- t --> <!-- /t -->"])
def test_without_its_markers_there_is_an_error(text):
    with pytest.raises(ValueError, match="once each"):
        tables.with_table(text, "t", "table")


def figures(mean):
    return {"mean": mean, "sd": 0.25}


def test_learning_in_words(tmp_path):
    assert tables.learning_table(tmp_path) == ""
    ends = {name: figures(1.0) for name, _, _ in tables.ENDS}
    result = {
        "seeds": [0, 1], "budget_seconds": 180.0, "time_ratio_to_trl_final_reward": 0.5, "kl_ratio": 0.75,
        "seconds_to_trl_final_reward": [80.0, 100.0], "final": {"trl": ends, "ours": ends | {"kl": figures(2.0)}},
        "frontier": [{"kl": 3.0, "trl": figures(0.5), "ours": figures(1.5)}], **MACHINE,
    }  # fmt: skip
    (tmp_path / "learning.json").write_text(json.dumps(result))
    lines = tables.learning_table(tmp_path).splitlines()
    assert lines[0] == "| after 180 s of training, seeds 0, 1 | TRL 1.12 | ppo_plus |"
    assert "| KL to the reference, nats | 1.0 ± 0.2 | 2.0 ± 0.2 |" in lines
    assert "| reward where KL is 3.0 nats | 0.50 ± 0.25 | 1.50 ± 0.25 |" in lines
    assert lines[-1].startswith(
        "ppo_plus reached TRL's final held-out reward in **0.50** of its time, at **0.75** of its KL"
    )
    equal = result | {"time_ratio_to_trl_final_reward": 0.625, "changes": {"trl": {"lam": 0.8}, "ours": {"lam": 0.8}}}
    (tmp_path / "learning_trl_lam_0.8.json").write_text(json.dumps(equal))
    more = tables.learning_table(tmp_path).splitlines()
    assert more[:-2] == lines
    assert more[-1].startswith("Against TRL with λ 0.8, ppo_plus reached TRL's final held-out reward in **0.62** of")
    one = tables.headline(result | {"seconds_to_trl_final_reward": [None, 80.0]})
    assert one == "ppo_plus reached TRL's final held-out reward with 1 of 2 seeds"


def test_the_demo_in_words(tmp_path):
    def figures(reward: float, kl: float) -> dict:
        return {"reward": reward, "kl": kl, "vader": reward / 10, "distinct_2": 0.5}

    run = {"seed": 3, "reward_model_accuracy": 0.8, "before": figures(0.5, 0), "after": figures(1.5, 6.8), "minutes": 4,
           "cpu_minutes": 5.25}  # fmt: skip
    assert tables.demo_table(tmp_path) == ""
    (tmp_path / "demo.json").write_text(json.dumps({"runs": [run], "date": "2026-01-02"}))
    lines = tables.demo_table(tmp_path).splitlines()
    assert lines[2] == "| as it is | 3 | 0.80 | 0.50 → 1.50 | 0.05 → 0.15 | 6.8 | 0.50 → 0.50 | 4.0 (5.2 of CPU time) |"
    assert lines[-1].endswith("2026-01-02.")
    other = {name: run[name] for name in run if name != "cpu_minutes"} | {"seed": 5, "after": figures(1.25, 6)}
    (tmp_path / "demo_4bit.json").write_text(json.dumps({"runs": [other], "date": "2026-01-03"}))
    assert tables.demo_table(tmp_path).splitlines()[:3] == lines[:3]
    lines = tables.demo_table(tmp_path).splitlines()
    assert lines[3] == "| `--full --load_in_4bit` | 5 | 0.80 | 0.50 → 1.25 | 0.05 → 0.12 | 6.0 | 0.50 → 0.50 | 4.0 |"
    assert lines[-1].endswith("2026-01-02; [demo_4bit.json](benchmarks/results/demo_4bit.json): 2026-01-03.")


def test_recipes_in_words(tmp_path):
    assert tables.recipes_table(tmp_path) == ""
    runs = {
        "one": {
            "config": "a.yaml", "what": "an adapter",
            "by_seed": [
                {"accuracy": 0.755, "pairs": 200, "minutes": 2.26}, {"accuracy": 0.8, "pairs": 200, "minutes": 12},
            ],
        },
        "two": {
            "config": None, "what": "a policy",
            "by_seed": [
                {"before": {"reward": -0.5}, "after": {"reward": 1.25, "kl": 6.04}, "minutes": 3},
                {"before": {"reward": 0}, "after": {"reward": 0.5, "kl": 5}, "minutes": 4},
            ],
        },
    }  # fmt: skip
    (tmp_path / "recipes.json").write_text(json.dumps({"runs": runs, "seeds": [4, 6], "date": "2026-01-02"}))
    lines = tables.recipes_table(tmp_path).splitlines()
    assert lines[2:4] == [
        "| [a.yaml](a.yaml) | an adapter | 0.76, 0.80 of 200 held-out pairs in the right order | 2.3, 12.0 |",
        "| none | a policy | held-out reward -0.50 → 1.25, 0.00 → 0.50 at 6.0, 5.0 nats | 3.0, 4.0 |",
    ]
    assert lines[-1].endswith("seeds 4, 6; 2026-01-02.")


def test_a_recipes_own_rows_and_output(tmp_path):
    policy = {"before": {"reward": -0.5}, "after": {"reward": 1.25, "kl": 6.04}, "minutes": 3}
    runs = {
        name: {"config": config, "what": "it", "by_seed": [one]}
        for name, config, one in (
            ("a", "two/reward.yaml", {"accuracy": 0.7551, "pairs": 200, "minutes": 2}),
            ("b", "two/ppo.yaml", policy),
            ("c", "two_more/ppo.yaml", policy),
            ("d", None, policy),
        )
    }
    (tmp_path / "recipes.json").write_text(json.dumps({"runs": runs, "seeds": [4], "date": "2026-01-02"}))
    rows = [line for line in tables.recipes_table(tmp_path, "two").splitlines() if line.startswith("| [")]
    assert [row.split(" | ")[0] for row in rows] == ["| [reward.yaml](reward.yaml)", "| [ppo.yaml](ppo.yaml)"]
    assert tables.recipe_output("two", tmp_path).splitlines()[1:-1] == [
        "Accuracy on 200 held-out pairs: 0.755",
        "Held-out reward -0.50 -> 1.25, KL 6.0 nats",
    ]


def test_memory_in_words(tmp_path):
    assert tables.memory_table(tmp_path) == ""
    update = {"ours": {"peak_mb": 1000}, "trl": {"peak_mb": 4000}, "date": "2026-01-02"}
    (tmp_path / "memory.json").write_text(json.dumps(update))
    first = "| two rollouts with their updates in fp32, resident | 1,000 MB | 4,000 MB (0.25) |  |"
    assert tables.memory_table(tmp_path).splitlines()[2] == first

    def sides(scale: float) -> dict:
        used = {"ours_4bit": 1, "trl": 4, "trl_4bit": 2}
        return {k: {"tensor_peak_mb": v * scale, "resident_peak_mb": 10 * v * scale} for k, v in used.items()}

    scores = {**sides(100), "memory_1.7b": sides(1000), "date": "2026-01-03"}
    (tmp_path / "reward_model.json").write_text(json.dumps(scores))
    lines = tables.memory_table(tmp_path).splitlines()
    assert lines[2:7] == [
        first,
        "| a reward model on NF4, 135M, tensors | 100 MB | 400 MB (0.25) | 200 MB (0.50) |",
        "| a reward model on NF4, 135M, resident | 1,000 MB | 4,000 MB (0.25) | 2,000 MB (0.50) |",
        "| a reward model on NF4, 1.7B's shape, tensors | 1,000 MB | 4,000 MB (0.25) | 2,000 MB (0.50) |",
        "| a reward model on NF4, 1.7B's shape, resident | 10,000 MB | 40,000 MB (0.25) | 20,000 MB (0.50) |",
    ]
    assert "2026-01-02. " in lines[-1] and lines[-1].endswith("2026-01-03.")


def test_defaults_in_words(tmp_path):
    assert tables.defaults_table(tmp_path) == ""
    names = ("reward", "kl", "vader", "reward_at_equal_kl", "explained_variance")
    row = {name: figures(1.0) for name in names} | {"seconds": figures(96.4), "seeds": 3}
    assert tables.plus_minus({"mean": 0.5, "sd": None}) == "0.50"
    tables_of = {
        "critic": {"equal_kl": 2.0, "variants": {"shared": row, "detached": row | {"reward": figures(0.5)}}},
        "value_head": {"equal_kl": 0.1, "variants": {"linear": row}},
    }
    found = {"episodes": 256, "seeds": [0, 2], "tables": tables_of, **MACHINE}
    (tmp_path / "ablations.json").write_text(json.dumps(found))
    lines = tables.defaults_table(tmp_path).splitlines()
    same = "1.0 ± 0.2 | 1.00 ± 0.25 at 2.0 | 1.00 ± 0.25 | 1.00 ± 0.25 | 96 ± 0 |"
    assert lines[2:5] == [
        f"| critic | **shared** | 1.00 ± 0.25 | {same}",
        f"|  | detached | 0.50 ± 0.25 | {same}",
        f"| value head | **linear** | 1.00 ± 0.25 | {same.replace('1.00 ± 0.25 at 2.0', '-')}",
    ]
    ran = "256 episodes each, seeds 0, 2, two runs side by side; 2 CPU cores, AVX512, 2026-01-02."
    assert lines[-1] == f"critic, value head: {ran}"
    alone = found | {"tables": {"gae_lambda": {"equal_kl": 2.0, "variants": {"0.95": row}}}}
    (tmp_path / "ablations_gae_lambda.json").write_text(json.dumps(alone))
    more = tables.defaults_table(tmp_path).splitlines()
    assert more[:5] == lines[:5] and more[5] == f"| λ of GAE | **0.95** | 1.00 ± 0.25 | {same}"
    assert more[-2:] == [lines[-1], f"λ of GAE: {ran}"]


def test_signal_in_words(tmp_path):
    assert tables.signal_table(tmp_path) == ""
    gains = {f"{baseline} {lam}": {"gain": lam + (baseline == "on"), "standard_error": 0.125}
             for baseline in ("off", "on") for lam in (1.0, 0.5)}  # fmt: skip
    found = {"gains": gains, "minibatches": 40, "rows": 16, "kl": 0.0, **MACHINE}
    (tmp_path / "gradient_signal.json").write_text(json.dumps(found))
    lines = tables.signal_table(tmp_path).splitlines()
    assert lines[0] == "| λ | policy at 0.0 nats, baseline off | policy at 0.0 nats, baseline on |"
    assert lines[2:4] == ["| 1.0 | 1.00 ± 0.12 | 2.00 ± 0.12 |", "| 0.5 | 0.50 ± 0.12 | 1.50 ± 0.12 |"]
    assert lines[-1] == "40 minibatches of 16 at 0.0 nats; 2 CPU cores, AVX512, 2026-01-02."
    (tmp_path / "gradient_signal_trained.json").write_text(json.dumps(found | {"kl": 3.25}))
    assert tables.signal_table(tmp_path).splitlines()[0].endswith("| policy at 3.2 nats, baseline on |")


def test_a_figure_written_by_hand_is_found(tmp_path):
    """Negative control: a copy of the repository's texts and results, with one digit changed."""
    results = [
        f"benchmarks/results/{name}.json"
        for name in (
            "learning", "learning_trl_lam_0.8", "ablations", "ablations_gae_lambda", "gradient_signal",
            "gradient_signal_trained", "architectures", "cards", "recipes", "verifiers",
            *(row[0] for row in tables.ROWS),
        )
    ]  # fmt: skip
    texts = {"README.md", *(place for place, _ in tables.find_places())}
    for file in [*texts, "benchmarks/tables.py", *results]:
        if (ROOT / file).is_file():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    command = [sys.executable, str(tmp_path / "benchmarks" / "tables.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0
    page = tmp_path / "docs" / "benchmarks.md"
    text = page.read_text()
    table = text[text.index("<!-- performance -->") :]
    figure = next(c for c in table if c.isdigit())
    page.write_text(text.replace(table, table.replace(figure, str(9 - int(figure)), 1)))
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1 and "differs" in done.stderr

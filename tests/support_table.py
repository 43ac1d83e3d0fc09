"""The table of docs/distributed.md, from the marks `support` of the tests that it is about.

python tests/support_table.py    writes the table into the page; tests/test_support_table.py checks that it is there

`@pytest.mark.support(LETTERS, ROW, columns=...)` puts letters into cells. Tests of the runs in sharded_runs.py name no
row: the run's own, in `RUN_ROWS`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "distributed.md"
FILES = ("distributed", "fsdp", "fsdp_rewards", "two_nodes", "recipes")
COLUMNS = ("DDP", "sharded", "sharded, layer by layer", "two nodes", "two nodes, sharded")
LETTERS = ("1", "B", "R", "runs")
SHARED = "LoRA on fp32, critic `shared`"
EVALUATION = "evaluation of uneven prompts, win rate, report"
SCORES = "reward adapter, classifier, `prefix_reward_baseline`"
CACHED = "`cache_frozen_layers`"
# Column and rows of each run of a test that is parametrized by `name`.
RUN_ROWS: dict[str, tuple[str, list[str]]] = {
    "shared critic": ("sharded", [SHARED]),
    "tied embeddings, half precision": ("sharded", ["base in half precision, tied embeddings"]),
    "nf4": ("sharded", ["base in NF4, computed in fp32"]),
    "int8": ("sharded", ["base in int8"]),
    "nf4 in bf16": ("sharded", ["base in NF4, stored as bf16"]),
    "answers to a prompt, a critic updated twice, recomputed activations": (
        "sharded", ["critic `adapter`, updated twice", "`num_generations`", "activation checkpointing"]),
    "a separate critic": ("sharded", ["critic `separate`"]),
    "cached lower layers": ("sharded", [CACHED]),
    "an adapter that is continued": ("sharded", ["an adapter that is continued (`ref`)"]),
    "a reward adapter and a classifier": ("sharded", [SCORES]),
    "evaluation of uneven prompts, report, samples": ("sharded", [EVALUATION]),
    "layer by layer": ("sharded, layer by layer", [SHARED, CACHED, SCORES, EVALUATION]),
    "a reward model": ("sharded", ["`RewardTrainer` on fp32"]),
    "a reward model on nf4": ("sharded", ["`RewardTrainer` on NF4"]),
    "a reward model on int8, recomputed activations, pairs with prompts": (
        "sharded", ["`RewardTrainer` on int8, activation checkpointing"]),
}  # fmt: skip


class _Collected:
    """A plugin that keeps what pytest collects."""

    items: list[pytest.Item]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def collect() -> list[pytest.Item]:
    """Return the tests that carry the mark."""
    collected = _Collected()
    files = [str(TESTS / f"test_{name}.py") for name in FILES]
    options = ["--collect-only", "-qq", "-p", "no:cacheprovider", "-m", "support"]
    assert pytest.main([*options, *files], plugins=[collected]) == 0
    return collected.items


def cells(items: list[pytest.Item]) -> dict[tuple[str, str], set[str]]:
    """Return the letters of each (row, column)."""
    found: dict[tuple[str, str], set[str]] = {}
    for item in items:
        for mark in item.iter_markers("support"):
            letters, *rows = mark.args
            columns = mark.kwargs.get("columns", ["DDP"])
            if not rows:
                column, rows = RUN_ROWS[item.callspec.params["name"]]
                columns = [column]
            for cell in ((row, column) for row in rows for column in columns):
                assert cell[1] in COLUMNS, cell
                found.setdefault(cell, set()).update(letters.split())
    return found


def table(found: dict[tuple[str, str], set[str]]) -> str:
    """Return the table, rows in the order of `RUN_ROWS` and then of the tests."""
    rows = dict.fromkeys([row for _, each in RUN_ROWS.values() for row in each] + [row for row, _ in found])
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
    for row in rows:
        letters = (found.get((row, column), set()) for column in COLUMNS)
        lines.append(f"| {' | '.join([row, *(' '.join(sorted(cell, key=LETTERS.index)) for cell in letters)])} |")
    return "\n".join(lines)


def replace_table(text: str, new: str) -> str:
    """Return the page with this table."""
    start, end = "<!-- support -->\n", "<!-- /support -->"
    return re.sub(f"(?<={start}).*?(?={end})", lambda _: f"\n{new}\n\n", text, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(replace_table(page, table(cells(collect()))), encoding="utf-8")

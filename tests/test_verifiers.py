"""What verifiers pay for answers that solve nothing, and what our own reward functions pay for them."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables  # noqa: E402
import verifiable  # noqa: E402
import verifiers  # noqa: E402

COMMITTED = json.loads((ROOT / "benchmarks" / "results" / "verifiers.json").read_text())


def installed(name: str) -> None:
    """Skip where the package, or the version of the committed result, is not installed."""
    wanted = COMMITTED[name]["version"]
    try:
        there = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed: pip install {name}=={wanted}")
    if there != wanted:
        pytest.skip(f"the committed result is of {name} {wanted}, and {there} is installed")


@pytest.mark.parametrize("name", list(tables.VERIFIERS))
def test_the_committed_scores_are_what_the_package_gives(name):
    installed(name)
    assert verifiers.available()[name](COMMITTED["items"]) == COMMITTED[name]["scores"]


def test_every_verifier_was_measured_on_every_kind_of_answer():
    forms, sets, checkers = (COMMITTED[name]["scores"] for name in tables.VERIFIERS)
    assert {kind for row in forms.values() for kind in row} == set(verifiers.ANSWERS)
    assert len(sets) > 90 and len(checkers) > 20
    for row in sets.values():
        assert set(verifiers.ANSWERS) - set(row) in (set(), set(verifiers.NEEDS_RIGHT))
        assert row.get("right", 1.0) == 1.0  # the answers are asked for in the form that the scorer reads


def test_what_cannot_be_scored_is_told_apart():
    def missing(i):
        raise LookupError("Please use the NLTK Downloader to obtain the resource, nltk.download('punkt')".lower())

    def broken(i):
        raise KeyError(i)

    assert verifiers.mean(lambda i: float(i % 2), 4) == 0.5
    assert verifiers.mean(missing, 4) == "no data" and verifiers.mean(broken, 4) == "raises"


def test_a_table_names_who_pays_for_nothing(tmp_path):
    row = {"right": 1.0, "empty": 0.0, "full stop": 0.01, "refusal": 0.0, "question": 0.0}
    scores = {
        "honest": row, "pays": {**row, "question": 0.25}, "fails": {**row, "refusal": "raises"},
        "unknown": dict.fromkeys(row, "no data"),
    }  # fmt: skip
    result = {**COMMITTED, "reasoning-gym": {"version": "1", "scores": scores}}
    (tmp_path / "verifiers.json").write_text(json.dumps(result))
    lines = tables.paid_for_nothing_table("reasoning-gym", tmp_path).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["`pays`", "`fails`"]
    assert lines[2].endswith("| 0.00 | 0.01 | 0.00 | 0.25 |") and "raises" in lines[3]


WANTED = "42"
QUESTION = "17 + 25 ="
# Texts by what the recipe's only reward function, exact match, must give for them.
WORTH = {
    " 42": 1.0, "": 0.0, ".": 0.0, QUESTION: 0.0, f"{QUESTION} 42": 0.0, "42 or 43": 0.0, "43 or 42": 0.0,
    "42\n42\n42": 0.0, "42 " * 40: 0.0, "I do not know": 0.0,
}  # fmt: skip


def test_the_reward_of_the_sums_pays_for_the_number_alone():
    checker = verifiable.Checker()
    given = checker(completions=list(WORTH), completion_ids=[[0]] * len(WORTH), wanted=[WANTED] * len(WORTH))
    assert given == list(WORTH.values())

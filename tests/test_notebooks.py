"""Notebooks run from top to bottom on the small model, and hold the outputs of such a run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from test_recipe import real_model

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
sys.path.insert(0, str(ROOT / "notebooks"))
from execute import execute  # noqa: E402

MAX_BYTES = 100_000
RISE = re.compile(r"reward.* (-?\d+\.\d+) -> (-?\d+\.\d+)")


def printed(node) -> str:
    outputs = (output for cell in node.cells if cell.cell_type == "code" for output in cell.outputs)
    return "".join(output.get("text", "") for output in outputs)


def check_outputs(node) -> None:
    """Assert that a reward rises and that the KL computed by hand is the one logged, where a notebook prints them."""
    text = printed(node)
    for before, after in RISE.findall(text):
        assert float(after) > float(before) + 0.2
    for by_hand, logged in re.findall(r"KL by hand (\S+), logged (\S+)", text):
        assert abs(float(by_hand) - float(logged)) <= 1e-3 * max(1.0, float(logged))
    assert RISE.search(text) or "KL by hand" in text


def test_there_are_three():
    assert {notebook.stem for notebook in NOTEBOOKS} == {"quickstart", "reward_model_then_ppo", "inspect_run"}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_outputs_of_a_run_are_in_the_file(notebook):
    node = nbformat.read(notebook, as_version=4)
    nbformat.validate(node)
    code = [cell for cell in node.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # in order, without a second try
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert notebook.stat().st_size < MAX_BYTES
    assert not re.search(r"(/home/|/root/|/opt/|/tmp/)", notebook.read_text(encoding="utf-8"))
    check_outputs(node)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook, tmp_path):
    check_outputs(execute(notebook, str(real_model()), tmp_path))

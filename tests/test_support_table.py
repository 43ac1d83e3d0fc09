"""The table of what runs on several processes is what the tests say."""

from __future__ import annotations

import subprocess
import sys

from sharded_reward_runs import RUNS as REWARD_RUNS
from sharded_runs import RUNS
from support_table import PAGE, RUN_ROWS, replace_table, table

PRINT = "import support_table as s; print(s.table(s.cells(s.collect())))"


def test_the_table_of_the_page_has_the_cells_that_tests_mark():
    done = subprocess.run([sys.executable, "-c", PRINT], cwd=PAGE.parents[1] / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = "| | DDP" + done.stdout.partition("| | DDP")[2].rstrip()
    text = PAGE.read_text(encoding="utf-8")
    assert replace_table(text, found) == text, "run python tests/support_table.py"
    without = found.replace("| B R |", "| B |").replace("| 1 B R |", "| 1 B |")
    assert without != found and replace_table(text, without) != text  # negative control


def test_every_run_has_a_row():
    assert RUN_ROWS.keys() == {*RUNS, *REWARD_RUNS}


def test_letters_of_several_tests_share_a_cell():
    lines = table({("a row", "DDP"): {"R", "1"}, ("a row", "two nodes"): {"runs"}}).splitlines()
    assert lines[-1] == "| a row | 1 R |  |  | runs |  |"

"""`python -m ppo_plus.report DIR...`: compare runs in one page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .page import REPORT, read_run, write_page


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare runs in one page."""
    parser = argparse.ArgumentParser(prog="python -m ppo_plus.report", description="Compare runs in one page.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help=f"output folders, each with a {REPORT}")
    parser.add_argument("--output", type=Path, default=Path("report_comparison.html"), help="the page to write")
    args = parser.parse_args(arguments)
    runs = []
    for folder in args.folders:
        try:
            runs.append({**read_run(folder / REPORT if folder.is_dir() else folder), "name": str(folder)})
        except ValueError as error:
            parser.error(str(error))
    write_page(args.output, runs)
    print(f"{len(runs)} runs: {args.output}")


if __name__ == "__main__":
    main()

"""Command line `ppo-plus report DIR...`, or `python -m ppo_plus.report DIR...`: compare runs in one page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .page import REPORT, read_run, write_page

COMPARISON = "report_comparison.html"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write one page that compares the reports of several runs."""
    parser = argparse.ArgumentParser(prog="ppo-plus report", description="Compare runs in one page.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help=f"output folders that contain {REPORT}")
    parser.add_argument("--output", type=Path, default=Path(COMPARISON), help="path of the comparison page")
    args = parser.parse_args(arguments)
    runs = []
    for folder in args.folders:
        page = folder / REPORT if folder.is_dir() else folder
        if page.resolve() == args.output.resolve():
            parser.error(f"--output {args.output} would overwrite the report of {folder}: pass another path.")
        try:
            runs.append({**read_run(page), "name": str(folder)})
        except (ValueError, OSError) as error:
            parser.error(str(error))
    try:
        if args.output.is_dir():
            parser.error(f"--output {args.output} is a folder: pass a file, such as {args.output / COMPARISON}.")
        write_page(args.output, runs)
    except OSError as error:
        parser.error(f"--output {args.output} cannot be written ({error}): pass another path.")
    print(f"{len(runs)} runs: {args.output}")


if __name__ == "__main__":
    main()

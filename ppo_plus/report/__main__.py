"""`python -m ppo_plus.report DIR...`: compare runs in one page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .page import REPORT, read_run, write_page

COMPARISON = "report_comparison.html"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare runs in one page."""
    parser = argparse.ArgumentParser(prog="python -m ppo_plus.report", description="Compare runs in one page.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help=f"output folders, each with a {REPORT}")
    parser.add_argument("--output", type=Path, default=Path(COMPARISON), help="the page to write")
    args = parser.parse_args(arguments)
    runs = []
    for folder in args.folders:
        page = folder / REPORT if folder.is_dir() else folder
        if page.resolve() == args.output.resolve():
            parser.error(f"--output {args.output} is the report of {folder}, which would be lost: name another file.")
        try:
            runs.append({**read_run(page), "name": str(folder)})
        except (ValueError, OSError) as error:
            parser.error(str(error))
    try:
        if args.output.is_dir():
            parser.error(f"--output {args.output} is a folder: name a file, as {args.output / COMPARISON}.")
        write_page(args.output, runs)
    except OSError as error:
        parser.error(f"--output {args.output} cannot be written ({error}): name another file.")
    print(f"{len(runs)} runs: {args.output}")


if __name__ == "__main__":
    main()

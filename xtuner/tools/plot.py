"""``xtuner plot WORK_DIR...``: the curves of one or more runs, as a picture and in the terminal."""

from __future__ import annotations

import argparse
from pathlib import Path

from xtuner.utils.lang import tr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("work_dirs", nargs="+", metavar="WORK_DIR", help=tr("work dirs of runs"))
    parser.add_argument(
        "--out",
        metavar="PNG",
        help=tr("the picture (default: curves.png in the first work dir)"),
    )


def run(args: argparse.Namespace) -> int:
    """Read the runs, show them as text and write the picture."""
    from xtuner.reporting.curves import draw, read_run, text_curves

    runs = [read_run(Path(folder)) for folder in args.work_dirs]
    for each in runs:
        print("\n".join(text_curves(each)))
    out = Path(args.out or Path(args.work_dirs[0]) / "curves.png")
    draw(runs, out)
    print(out)
    return 0

"""``xtuner preprocess arxiv``: take papers of some categories out of the arXiv metadata dump."""

from __future__ import annotations

import argparse
import json
from datetime import date
from typing import TYPE_CHECKING

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from xtuner.dataset.reading import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("src_file", help=tr("the dump: one JSON object a line"))
    parser.add_argument("dst_file", help=tr("the JSON file to write"))
    parser.add_argument(
        "--categories",
        nargs="+",
        default=["cs.AI", "cs.CL", "cs.CV"],
        help=tr("keep papers in any of these"),
    )
    parser.add_argument(
        "--start-date",
        default="2020-01-01",
        metavar="YYYY-MM-DD",
        help=tr("keep papers updated on this day or later"),
    )


def run(args: argparse.Namespace) -> int:
    """Filter the dump, row by row.

    Returns:
        0.
    """
    from xtuner.dataset.reading import find_files, require_rows
    from xtuner.utils.files import written_aside

    start = _day(args.start_date)
    wanted = set(args.categories)
    (source,) = find_files([args.src_file])
    seen = kept = 0
    with written_aside(args.dst_file) as aside, aside.open("w", encoding="utf-8") as out:
        out.write("[")
        for row in require_rows(source):
            seen += 1
            if _fits(row, wanted, start):
                out.write(",\n" if kept else "\n")
                out.write(json.dumps(row.value, ensure_ascii=False))
                kept += 1
        out.write("\n]\n")
    print(
        tr(
            "{kept:,} of {seen:,} papers -> {dst_file}",
            kept=kept,
            seen=seen,
            dst_file=args.dst_file,
        )
    )
    return 0


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise UserError(
            tr("--start-date {text!r} is not a date", text=text),
            hint="--start-date 2020-01-01",
        ) from error


def _fits(row: Row, wanted: set[str], start: date) -> bool:
    """Whether a paper is in a wanted category and recent enough.

    Raises:
        UserError: when the row lacks what is needed to tell.
    """
    try:
        updated = date.fromisoformat(row.value["update_date"])
        return updated >= start and not wanted.isdisjoint(row.value["categories"].split())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            tr("this is no row of the arXiv metadata dump: it needs categories and update_date"),
            hint="https://www.kaggle.com/datasets/Cornell-University/arxiv",
            where=Where(row.file, row.line),
        ) from error

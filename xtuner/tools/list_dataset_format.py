"""``xtuner list-dataset-format``: the row layouts, and the fields that each map function reads."""

from __future__ import annotations

import argparse

from xtuner.doctor.layouts import AUTO, LAYOUTS, MESSAGES, SHAREGPT, TURNS, Layout
from xtuner.utils.lang import tr
from xtuner.utils.terminal import width

RULER = 60
SHAPES = {
    MESSAGES: "[{role, content}, ...]",
    SHAREGPT: "[{from, value}, ...]",
    TURNS: "[{system, input, output}, ...]",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "-p",
        "--pattern",
        default="",
        help=tr("show formats that hold this text"),
    )


def run(args: argparse.Namespace) -> int:
    """Print the formats.

    Returns:
        0, or 1 when no format fits.
    """
    chosen = [layout for layout in LAYOUTS.values() if _fits(layout, args.pattern)]
    formats = [layout for layout in chosen if layout.map_fn and not layout.preference]
    print("DATASET_FORMATS".center(RULER, "="))
    for layout in sorted(formats, key=lambda layout: layout.name):
        print(_line(layout))
    if _fits(AUTO, args.pattern):
        what = tr("recognises the layout of each row")
        print(f"{AUTO.name:<17} {what}")
        chosen.append(AUTO)
    plain = [layout for layout in chosen if not layout.map_fn and not layout.preference]
    if plain:
        print(_ruler(tr("without a map function:")))
        print("\n".join(map(_line, plain)))
    pairs = [layout for layout in chosen if layout.preference]
    if pairs:
        print(_ruler(tr("for DPO, ORPO and reward models:")))
        print("\n".join(map(_line, pairs)))
    print("=" * RULER)
    return 0 if chosen else 1


def _ruler(title: str) -> str:
    """A title in the middle of a line."""
    return title.center(RULER - width(title) + len(title), "-")


def _fits(layout: Layout, pattern: str) -> bool:
    """Whether the name, a field or the shape of the rows (sharegpt) has the text."""
    shapes = ["sharegpt"] if SHAREGPT in layout.fields.values() else []
    return any(pattern.lower() in word for word in (layout.name, *layout.fields, *shapes))


def _line(layout: Layout) -> str:
    fields = [
        f"{name}: {SHAPES[kind]}" if kind in SHAPES else name
        for name, kind in layout.fields.items()
    ]
    return f"{layout.name:<17} {', '.join(fields)}"

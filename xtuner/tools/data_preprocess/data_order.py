"""``xtuner preprocess data-order``: write down the order of the files of a tokenized folder.

Training with ``data_order_path`` then reads the files in this order on every machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xtuner.utils.lang import tr

ORDER_FILE = "data_order.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--data-folder", required=True, help=tr("the data"))
    parser.add_argument(
        "--save-folder",
        help=tr("where {order_file} goes (the data folder)", order_file=ORDER_FILE),
    )
    parser.add_argument("--file-type", default=".bin", help=tr("ending of the files"))


def run(args: argparse.Namespace) -> int:
    """Write the order: one path a line, relative to the data folder, sorted.

    Returns:
        0.
    """
    from xtuner.dataset.data_order import find_by_suffix
    from xtuner.utils.files import write_text

    folder = Path(args.data_folder)
    files = find_by_suffix(folder, args.file_type)
    target = Path(args.save_folder or folder) / ORDER_FILE
    write_text(target, "".join(f"{file.relative_to(folder).as_posix()}\n" for file in files))
    print(tr("{count:,} files -> {target}", count=len(files), target=target))
    return 0

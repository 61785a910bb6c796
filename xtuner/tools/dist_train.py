"""``xtuner dist_train CONFIG [N] ...``: train with N processes on this machine (and others)."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from xtuner.engine.launch import become_torchrun, read_layout
from xtuner.tools import train
from xtuner.utils.lang import tr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line: that of ``train`` with the number of processes."""
    parser.usage = "%(prog)s CONFIG [NPROC] " + tr("[arguments of train]")
    train.add_arguments(parser)
    parser.add_argument(
        "processes",
        nargs="?",
        type=int,
        metavar="NPROC",
        help=tr("processes on this machine (default: NPROC_PER_NODE, else one for each GPU)"),
    )


def run(args: argparse.Namespace) -> int:
    """Start the processes."""
    count = args.processes or int(os.environ.get("NPROC_PER_NODE") or 0) or _gpus()
    words = ["train", *_without_count(args.argv, args.config, args.processes)]
    layout = read_layout(os.environ, count)
    if layout is None:
        args.argv = words[1:]
        return train.run(args)
    become_torchrun(layout, words)
    raise AssertionError("become_torchrun does not return")


def _without_count(argv: list[str], config: str, count: int | None) -> list[str]:
    """The words for ``train``: without the number of processes that follows the config."""
    if count is None:
        return argv
    words = list(argv)
    number = words.index(str(count), words.index(config) + 1)
    del words[number]
    return words


def _gpus() -> int:
    """GPUs of this machine as the driver lists them, at least 1; torch is not loaded for it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([gpu for gpu in visible.split(",") if gpu.strip()]))
    return max(1, len(list(Path("/dev").glob("nvidia[0-9]*"))))

"""``xtuner test CONFIG --checkpoint C``: measure a checkpoint on a config's test data."""

from __future__ import annotations

import argparse

from xtuner.tools.train import add_shared_arguments
from xtuner.utils.lang import tr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", help=tr("name or path of a config"))
    parser.add_argument(
        "--checkpoint",
        help=tr(
            "an iter_N.pth, or a folder of DeepSpeed or FSDP; without it the base model is measured"
        ),
    )
    parser.add_argument("--work-dir", help=tr("where the results go"))
    add_shared_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Test; with several processes asked for by the environment, through torchrun."""
    from xtuner.engine.launch import start_processes

    start_processes(args.launcher, ["test", *args.argv])
    from xtuner.engine.train import test

    return test(
        args.config,
        checkpoint=args.checkpoint,
        work_dir=args.work_dir,
        options=args.cfg_options,
        launcher=args.launcher,
    )

"""``xtuner preprocess sft``: tokenize a config's dataset, and write a config that trains on it.

Also answers to ``untokenized CONFIG --save-folder FOLDER``, the words of the published script.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xtuner.tools.arguments import add_config_options
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", help=tr("name or path of a config"))
    parser.add_argument("out", nargs="?", help=tr("folder to write"))
    parser.add_argument("--save-folder", help=tr("the same as OUT"), metavar="OUT", default=None)
    add_config_options(parser)


def run(args: argparse.Namespace) -> int:
    """Build the dataset as train does, and save it.

    Returns:
        0.
    """
    from xtuner.config import load_config
    from xtuner.tools.data_preprocess import prepared
    from xtuner.tools.train_dataset import build, call_before_run, train_dataset_of

    folder = out_folder(args)
    cfg = load_config(args.config, args.cfg_options)
    call_before_run(cfg)
    dataset = build(train_dataset_of(cfg, args.config))
    prepared.save(dataset, folder)
    config = prepared.write_config(cfg, prepared.from_disk(folder), folder)
    prepared.say_where(len(dataset), config)
    return 0


def out_folder(args: argparse.Namespace) -> Path:
    """The folder to write.

    Raises:
        UserError: when none is given.
    """
    out = args.out or args.save_folder
    if not out:
        raise UserError(
            tr("the folder to write is missing"),
            hint="xtuner preprocess sft CONFIG OUT",
            status=2,
        )
    return Path(out)

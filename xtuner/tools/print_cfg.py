"""``xtuner print-cfg``: a config as it will be used, and where each value comes from."""

from __future__ import annotations

import argparse

from xtuner.tools.arguments import add_config_options
from xtuner.utils.lang import tr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("config", help=tr("a path or a name"))
    add_config_options(parser)
    parser.add_argument("--why", metavar="KEY", help=tr("where the value of a key comes from"))


def run(args: argparse.Namespace) -> int:
    """Print the config with every value spelled out, or the way to one value."""
    from xtuner.config.dump import spelled_out
    from xtuner.config.load import load
    from xtuner.config.override import override
    from xtuner.config.provenance import provenance_of

    document = override(load(args.config), args.cfg_options)

    if args.why:
        print("\n".join(map(str, provenance_of(document, args.why))))
        return 0
    print(spelled_out(document.config), end="")
    return 0

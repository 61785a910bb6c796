"""``xtuner check-cfg``: find the mistakes in configs before a run."""

from __future__ import annotations

import argparse

from xtuner.tools.arguments import add_config_options
from xtuner.tools.json_output import print_json
from xtuner.utils.lang import tr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("config", nargs="+", help=tr("paths or names"))
    add_config_options(parser)
    parser.add_argument("--json", action="store_true", help=tr("print JSON, for editors and CI"))


def run(args: argparse.Namespace) -> int:
    """Print the problems; 1 when there is an error, 0 otherwise."""
    from xtuner.config.check import ERROR, check

    problems = [problem for name in args.config for problem in check(name, args.cfg_options)]
    errors = sum(problem.severity == ERROR for problem in problems)
    if args.json:
        print_json([problem.as_json() for problem in problems])
        return 1 if errors else 0
    for problem in problems:
        print(problem)
    files, warnings = len(args.config), len(problems) - errors
    print(
        tr(
            "{files} config(s): {errors} error(s), {warnings} warning(s)",
            files=files,
            errors=errors,
            warnings=warnings,
        )
    )
    return 1 if errors else 0

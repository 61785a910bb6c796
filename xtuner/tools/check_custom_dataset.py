"""``xtuner check-custom-dataset``: examine a whole dataset and say what to fix, and where."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from xtuner.tools.arguments import add_config_options
from xtuner.tools.json_output import print_json
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from xtuner.config.document import ConfigDocument
    from xtuner.doctor.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", help=tr("name or path of a config"))
    parser.add_argument(
        "--html",
        metavar="FILE",
        help=tr("write the report as one HTML file"),
    )
    parser.add_argument(
        "--fix",
        action="store_true",
        help=tr("write the map function that fits into the config"),
    )
    parser.add_argument("--json", action="store_true", help=tr("print the report as JSON"))
    parser.add_argument(
        "--all-rows",
        action="store_true",
        help=tr("encode all rows of tables with more than 100,000; without it a sample"),
    )
    parser.add_argument(
        "--strict", action="store_true", help=tr("exit with status 1 for warnings as well")
    )
    add_config_options(parser)


def run(args: argparse.Namespace) -> int:
    """Examine the dataset.

    Returns:
        0 when the dataset can be trained on, else 1; with ``--strict`` 1 for warnings as well.
    """
    from rich.console import Console

    from xtuner.config.load import load
    from xtuner.config.override import override
    from xtuner.config.values import raw_dict
    from xtuner.doctor.examine import examine, with_few_steps
    from xtuner.doctor.page import report_page
    from xtuner.doctor.report import print_report
    from xtuner.doctor.show import print_sample
    from xtuner.tools.train_dataset import call_before_run, train_dataset_of
    from xtuner.utils.files import write_text

    document = override(load(args.config), args.cfg_options)
    cfg = document.config
    dataset = train_dataset_of(cfg, args.config)
    call_before_run(cfg)
    quiet = Console(stderr=True)
    with quiet.status(tr("reading the rows ...")):
        report, shown = examine(args.config, dataset, all_rows=args.all_rows)
    report = with_few_steps(report, raw_dict(cfg))
    if args.html:
        write_text(args.html, report_page(report, shown))
    if args.json:
        print_json(report.as_dict())
    else:
        console = Console(highlight=False)
        print_report(report, console)
        if shown:
            print_sample(shown, console)
        console.print(report.advice, style="bold", markup=False, soft_wrap=True)
        if args.html:
            print(tr("The report is in {html}", html=args.html))
    findings = report.scan.findings
    _say_where_to_paste(report, document, args.fix, sys.stderr if args.json else sys.stdout)
    return 1 if findings.has_errors or (args.strict and not findings.is_clean) else 0


def _say_where_to_paste(report: Report, document: ConfigDocument, fix: bool, out: TextIO) -> None:
    """Say which lines of the config the map functions that fit replace, or write them."""
    from xtuner.tools.config_writers.fix_map_fn import map_fn_line, with_map_fns
    from xtuner.tools.train_dataset import train_dataset_path
    from xtuner.utils.files import write_text

    if not document.is_python:
        return
    dataset = train_dataset_path(document.config)
    lines = {
        (*dataset, *part, "dataset_map_fn"): found[0] if len(found) == 1 else None
        for part, found in report.scan.map_fns.items()
    }
    fix = fix and Path(document.file).is_file()
    for path, paste in lines.items():
        if paste is None:
            continue
        place = f"{document.file}:{map_fn_line(document, path)}"
        setting = paste.splitlines()[-1]
        if not fix:
            said = tr(
                "{setting} replaces dataset_map_fn at {place}; --fix writes it.",
                setting=setting,
                place=place,
            )
        else:
            said = tr("{setting} replaces dataset_map_fn at {place}", setting=setting, place=place)
        print(said, file=out)
    if fix and any(lines.values()):
        backup = f"{document.file}.bak"
        text = with_map_fns(document, lines).text
        write_text(backup, document.original.text)
        write_text(document.file, text)
        print(
            tr(
                "Written to {file}; the old text is in {backup}.", file=document.file, backup=backup
            ),
            file=out,
        )

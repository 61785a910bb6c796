"""``xtuner check-custom-dataset``: examine a whole dataset and say what to fix, and where."""

from __future__ import annotations

import argparse
import json

from xtuner.tools.arguments import add_config_options
from xtuner.utils.lang import tr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", help=tr("name or path of a config"))
    parser.add_argument(
        "--html",
        metavar="FILE",
        help=tr("write the report as one HTML file"),
    )
    parser.add_argument("--json", action="store_true", help=tr("print the report as JSON"))
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

    from xtuner.config import load_config
    from xtuner.doctor.examine import examine
    from xtuner.doctor.page import report_page
    from xtuner.doctor.report import print_report
    from xtuner.doctor.show import print_sample
    from xtuner.tools.train_dataset import call_before_run, train_dataset_of
    from xtuner.utils.files import write_text

    cfg = load_config(args.config, args.cfg_options)
    dataset = train_dataset_of(cfg, args.config)
    call_before_run(cfg)
    quiet = Console(stderr=True)
    with quiet.status(tr("reading the rows ...")):
        report, shown = examine(args.config, dataset)
    if args.html:
        write_text(args.html, report_page(report, shown))
    if args.json:
        print(json.dumps(report.as_dict(), ensure_ascii=False, indent=2))
    else:
        console = Console(highlight=False)
        print_report(report, console)
        if shown:
            print_sample(shown, console)
        console.print(report.advice, style="bold", markup=False)
        if args.html:
            print(tr("The report is in {html}", html=args.html))
    findings = report.scan.findings
    return 1 if findings.has_errors or (args.strict and not findings.is_clean) else 0

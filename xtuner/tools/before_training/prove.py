"""``xtuner prove``: fast paths, packing, accumulation, ranks, resuming and exports, each proved."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from xtuner.tools.arguments import add_config_options
from xtuner.tools.json_output import print_json
from xtuner.utils.files import write_text
from xtuner.utils.lang import tr
from xtuner.utils.terminal import padded

if TYPE_CHECKING:
    from xtuner.proving.proof import Proof
    from xtuner.proving.prove import Report

DOES_NOT_HOLD = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", help=tr("name or path of a config"))
    parser.add_argument(
        "--full",
        action="store_true",
        help=tr("take the whole model with its weights, in float32, not a small one of its class"),
    )
    parser.add_argument(
        "--compile", action="store_true", help=tr("prove the compiled model, too (slow)")
    )
    parser.add_argument("--json", action="store_true", help=tr("print JSON"))
    parser.add_argument(
        "--page", metavar="FILE", help=tr("write a Markdown page, for a pull request")
    )
    parser.add_argument(
        "--keep", metavar="FOLDER", help=tr("keep what the proofs write: configs, logs, models")
    )
    add_config_options(parser)


def run(args: argparse.Namespace) -> int:
    """Prove the config.

    Returns:
        0; 1 where a proof fails.

    Raises:
        UserError: for a config with errors, a model or data that cannot be found.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: a CPU rounds least
    from xtuner.tools.before_training.checked import checked_document, output_folder

    document = checked_document(args.config, args.cfg_options)
    from xtuner.proving.prove import prove_config

    def show(proofs: Sequence[Proof]) -> None:
        if not args.json:
            print("\n".join(line for proof in proofs for line in lines_of(proof)), flush=True)

    with output_folder(args.keep) as folder:
        report = prove_config(document, folder, full=args.full, compile=args.compile, show=show)
    if args.json:
        print_json(_plain(report))
    else:
        print("\n".join(_last_lines(report)))
    if args.page:
        write_text(args.page, "\n".join(page(args.config, report)) + "\n")
        print(tr("written: {path}", path=args.page), file=sys.stderr)
    return 0 if report.holds else DOES_NOT_HOLD


def lines_of(proof: Proof) -> Iterator[str]:
    """A proof in the terminal: what is equal, how far apart, the bound, why that bound."""
    yield f"{padded(_word(proof), 8)} {proof.claim}"
    if proof.difference is not None:
        measured = tr(
            "difference {difference}, bound {bound} ({why})",
            difference=_figure(proof.difference),
            bound=_figure(proof.bound),
            why=proof.why,
        )
        yield f"         {measured}"
    if proof.detail:
        yield from (f"         {line}" for line in proof.detail.splitlines())


def _word(proof: Proof) -> str:
    words = {"passed": tr("holds"), "failed": tr("FAILS"), "skipped": tr("skipped")}
    return words[proof.state]


def _figure(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1e}"


def _last_lines(report: Report) -> Iterator[str]:
    from xtuner.proving.proof import summary

    yield ""
    yield from (str(model) for model in report.models)
    yield tr("computed with: {changes}", changes=tr("; ").join(report.changes))
    yield summary(report.proofs)


def _plain(report: Report) -> dict[str, object]:
    return {
        "holds": report.holds,
        "models": [str(model) for model in report.models],
        "changes": report.changes,
        "proofs": [proof.to_dict() for proof in report.proofs],
    }


def page(config: str, report: Report) -> Iterator[str]:
    """A Markdown page.

    Args:
        config: its name or path.
        report: what was proved.
    """
    from importlib.metadata import version

    from xtuner.proving.proof import summary
    from xtuner.version import __version__

    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    yield f"## xtuner prove {config}"
    yield ""
    yield summary(report.proofs) + f" (xtuner {__version__}, {libraries})"
    yield ""
    yield from (f"- {model}" for model in report.models)
    yield "- " + tr("computed with: {changes}", changes=tr("; ").join(report.changes))
    yield ""
    titles = tr("what is equal | difference | bound | why that bound, or what was found")
    yield f"| | {titles} |"
    yield "|---|---|---|---|---|"
    for proof in report.proofs:
        found = "" if proof.difference is None else _figure(proof.difference)
        why = proof.why if proof.state == "passed" else proof.detail
        cells = (_word(proof), proof.claim, found, _figure(proof.bound), why)
        yield "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

"""``xtuner rehearse``: the whole life of a run in a minute, with a small model of its class."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from xtuner.tools.arguments import add_config_options
from xtuner.tools.json_output import print_json
from xtuner.utils.lang import tr
from xtuner.utils.terminal import padded

if TYPE_CHECKING:
    from xtuner.proving.rehearsal import Rehearsal, Stage

FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", help=tr("name or path of a config"))
    parser.add_argument("--json", action="store_true", help=tr("print JSON"))
    parser.add_argument(
        "--keep", metavar="FOLDER", help=tr("keep what the rehearsal writes: runs, logs, models")
    )
    add_config_options(parser)


def run(args: argparse.Namespace) -> int:
    """Rehearse the config.

    Returns:
        0; 1 where a stage fails.

    Raises:
        UserError: for a config that cannot be loaded.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: rehearsals are on the CPU
    from xtuner.tools.before_training.checked import loaded_document, output_folder

    began = time.perf_counter()
    document = loaded_document(args.config, args.cfg_options)
    from xtuner.proving.rehearsal import Rehearsal

    stages: list[Stage] = []
    with output_folder(args.keep) as folder:
        rehearsal = Rehearsal(document, folder)
        for stage in rehearsal.run():
            stages.append(stage)
            if not args.json:
                print("\n".join(lines_of(stage)), flush=True)
        needs = rehearsal.needs
    failed = stages[-1].state == "failed"
    if args.json:
        found = {"ok": not failed, "stages": [asdict(stage) for stage in stages], "real_run": needs}
        print_json({**found, "changes": _changes(rehearsal)})
    else:
        print("\n".join(_last_lines(rehearsal, needs, failed, time.perf_counter() - began)))
    return FAILED if failed else 0


def lines_of(stage: Stage) -> Iterator[str]:
    """A stage in the terminal."""
    words = {"ok": tr("ok"), "failed": tr("FAILED"), "skipped": tr("skipped")}
    state, title = words[stage.state], stage.title
    head = f"{padded(state, 8)} {padded(title, 9)}"
    yield f"{head} {stage.seconds:5.1f} s  {stage.detail}".rstrip()
    if stage.state == "failed":
        yield f"         {tr('cause: {cause}', cause=_indented(stage.cause))}"
        if stage.remedy:
            yield f"         {tr('remedy: {remedy}', remedy=_indented(stage.remedy))}"


def _indented(text: str) -> str:
    return text.replace("\n", "\n         ")


def _changes(rehearsal: Rehearsal) -> list[str]:
    found: list[str] = rehearsal.built.get("changes", [])
    return found


def _last_lines(
    rehearsal: Rehearsal, needs: dict[str, Any], failed: bool, seconds: float
) -> Iterator[str]:
    yield ""
    if _changes(rehearsal):
        yield tr("rehearsed with: {changes}", changes=tr("; ").join(_changes(rehearsal)))
    if needs:
        yield tr(
            "the real run: {parameters:,} parameters, {trained:,} trained; {memory} of GPU memory; "
            "{disk} for each checkpoint, {kept} kept ('xtuner plan' has more)",
            parameters=needs["parameters"],
            trained=needs["trained"],
            memory=_size(needs["memory"]),
            disk=_size(needs["checkpoint"]),
            kept=needs["kept"],
        )
        if needs["steps"] is not None:
            yield tr("about {steps:,} optimizer steps in one process", steps=needs["steps"])
    if failed:
        yield tr("failed after {seconds:.0f} s", seconds=seconds)
    else:
        yield tr("every stage went well, in {seconds:.0f} s", seconds=seconds)


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"

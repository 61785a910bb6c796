"""``xtuner plan``: the memory, the steps and the disk of a run, before there is a GPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner.tools.arguments import add_config_options
from xtuner.tools.json_output import print_json
from xtuner.utils.errors import UserError, Where
from xtuner.utils.files import write_text
from xtuner.utils.lang import tr, translate
from xtuner.utils.terminal import padded, width

if TYPE_CHECKING:
    from xtuner.config.document import ConfigDocument
    from xtuner.planning.plan import Machine, Measured, Plan, Planner
    from xtuner.planning.remedies import Remedy

GIB = 2**30
DOES_NOT_FIT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", help=tr("name or path of a config"))
    parser.add_argument(
        "--gpu",
        metavar="CARD",
        help=tr("a card (RTX4090, A100, ...) or its memory (24GB); without it nothing is compared"),
    )
    parser.add_argument("--gpus", type=int, default=1, help=tr("GPUs of each machine (default: 1)"))
    parser.add_argument("--nodes", type=int, default=1, help=tr("machines (default: 1)"))
    parser.add_argument("--deepspeed", help=tr("as for train: a path or deepspeed_zero1|2|3"))
    parser.add_argument("--fsdp", action="store_true", help=tr("as for train"))
    parser.add_argument("--fsdp-offload", action="store_true", help=tr("as for train"))
    parser.add_argument(
        "--no-data",
        action="store_true",
        help=tr("do not prepare the data; steps and time are then not known"),
    )
    parser.add_argument(
        "--tflops", type=float, help=tr("peak of the card in bfloat16, in place of the table's")
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help=tr("train three real steps here, and correct the plan by what they needed"),
    )
    parser.add_argument("--json", action="store_true", help=tr("print JSON"))
    parser.add_argument(
        "--apply",
        metavar="FILE",
        help=tr("write the config, with the changes that make it fit, to a file"),
    )
    add_config_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan and, where the run does not fit, what to change.

    Returns:
        0; 1 where the run does not fit.

    Raises:
        UserError: for a config with errors, a model that cannot be found, an unknown card.
    """
    machine = _machine(args)
    from xtuner.config.check.checker import check_or_raise
    from xtuner.config.load import load
    from xtuner.config.override import override
    from xtuner.planning.plan import Planner
    from xtuner.planning.remedies import remedies
    from xtuner.tools.train_dataset import call_before_run

    document = override(load(args.config), args.cfg_options)
    check_or_raise(document)
    call_before_run(document.config)  # which may make the model's folder
    rows = None if args.no_data else _rows(document)
    print(tr("building the model without weights ..."), file=sys.stderr, flush=True)
    planner = Planner(rows)
    if args.calibrate:
        _calibrate(planner, document)
    plan = planner.plan(document, machine)
    found = remedies(planner, document, plan) if plan.fits is False else []
    if args.apply:
        _apply(args.apply, document, found)
    if args.json:
        changes = [
            {
                "what": each.change.what,
                "options": each.change.options,
                "train": each.change.words,
                **each.plan.to_dict(),
            }
            for each in found
        ]
        print_json({**plan.to_dict(), "changes": changes})
    else:
        print("\n".join(_lines(args, plan, found)))
    return DOES_NOT_FIT if plan.fits is False else 0


def _calibrate(planner: Planner, document: ConfigDocument) -> None:
    """Correct the planner by real steps in one process."""
    from xtuner.planning.plan import Machine
    from xtuner.proving.calibrate import STEPS, calibrate, in_one_process
    from xtuner.tools.before_training.checked import output_folder

    print(
        tr("training {count} steps to measure them ...", count=STEPS), file=sys.stderr, flush=True
    )
    with output_folder(None, cache=False) as folder:
        measured = calibrate(document, folder)
    planner.calibrate(measured, planner.plan(in_one_process(document), Machine()))


def _machine(args: argparse.Namespace) -> Machine:
    from dataclasses import replace

    from xtuner.planning.cards import card
    from xtuner.planning.plan import Machine

    if args.gpus < 1 or args.nodes < 1:
        raise UserError(tr("--gpus and --nodes are numbers of at least 1."))
    known = card(args.gpu) if args.gpu else None
    if known is not None and args.tflops:
        known = replace(known, tflops=args.tflops)
    return Machine(
        card=known,
        gpus=args.gpus,
        nodes=args.nodes,
        deepspeed=args.deepspeed,
        fsdp=args.fsdp or args.fsdp_offload,
        offload=args.fsdp_offload,
    )


def _rows(document: ConfigDocument) -> int | None:
    """Rows of the training data, packed where they are packed; None where they are not here."""
    from xtuner.tools.train_dataset import build, train_dataset_of

    try:
        dataset = build(train_dataset_of(document.config, document.file))
    except (UserError, ImportError) as error:
        print(
            tr(
                "the data cannot be prepared, so steps and time are not known: {error}",
                error=str(error).splitlines()[0],
            ),
            file=sys.stderr,
        )
        return None
    return len(dataset)


def _apply(name: str, document: ConfigDocument, found: Sequence[Remedy]) -> None:
    from xtuner.config.dump import write_config
    from xtuner.config.override import override
    from xtuner.planning.remedies import options_of

    path = Path(name)
    if path.exists():
        raise UserError(
            tr("this file is there already."),
            hint=tr("give another name to --apply"),
            where=Where(name),
        )
    write_config(override(document, options_of(found)), path)
    if found:
        made = [tr("Changed by 'xtuner plan':"), *(f"  {each.change.what}" for each in found)]
        text = "".join(f"# {line}\n" for line in made)
        write_text(path, f"{text}#\n{path.read_text('utf-8')}")
    print(tr("written: {path}", path=path), file=sys.stderr)


def _lines(args: argparse.Namespace, plan: Plan, found: Sequence[Remedy]) -> Iterator[str]:
    yield from _table(plan)
    yield ""
    yield from _run_length(plan)
    yield ""
    yield _verdict(plan)
    if plan.fits is not False:
        return
    for number, each in enumerate(found, 1):
        total = _size(each.plan.memory.total)
        yield "  " + tr("{n}. {what}: {size}", n=number, what=each.change.what, size=total)
        for word in (*each.change.words, *each.change.options):
            yield f"       {word}"
    if not found or not found[-1].plan.fits:
        yield tr("Nothing that is known here makes it fit.")
        return
    yield ""
    yield tr("All of these together:")
    yield f"  {_command(args, found)}"


def _table(plan: Plan) -> Iterator[str]:
    rows = [(translate(what), size) for what, size in plan.memory.parts() if size]
    rows.append((tr("in all"), plan.memory.total))
    widest = max(width(what) for what, _ in rows)
    yield tr("Memory of each GPU ({settings}):", settings=_settings(plan))
    for what, size in rows:
        yield f"  {padded(what, widest)}  {_size(size):>10}"
    if plan.memory.offloaded:
        yield tr("Main memory: {size} for each GPU.", size=_size(plan.memory.offloaded))
    if plan.images == "counted":
        yield tr("Weights for images are trained: activations are those of rows with images.")
    elif plan.images:
        yield tr("Weights for images are trained: what they keep of images is not counted.")


def _settings(plan: Plan) -> str:
    settings, sharding = plan.settings, plan.settings.sharding
    rows = f"{settings.batch_size} x {settings.sequences}"
    parts = [
        tr(
            "{rows} x {length:,} tokens",
            rows=rows if settings.sequences > 1 else settings.batch_size,
            length=settings.length,
        ),
        settings.optimizer,
        settings.dtype,
        tr("activations recomputed") if settings.checkpointing else tr("activations kept"),
    ]
    if sharding.ranks > 1:
        parts.append(f"{sharding.ranks} x {sharding.name}")
    if settings.sequence_parallel > 1:
        parts.append(tr("{count} GPUs share a row", count=settings.sequence_parallel))
    return ", ".join(parts)


def _run_length(plan: Plan) -> Iterator[str]:
    schedule = plan.schedule
    yield tr(
        "parameters: {count:,}, {trained:,} trained",
        count=plan.sizes.count,
        trained=plan.sizes.trained_count,
    )
    if schedule.steps is not None and schedule.tokens is not None:
        yield tr(
            "length: {steps:,} optimizer steps, at most {tokens:,} tokens",
            steps=schedule.steps,
            tokens=schedule.tokens,
        )
    if plan.measured is not None:
        yield _measured(plan.measured)
    if schedule.seconds is not None:
        hours = schedule.seconds / 3600
        if plan.measured is not None:
            yield tr("time: about {hours:.1f} hours, at the measured speed", hours=hours)
        else:
            yield tr("time: about {hours:.1f} hours, at 40 % of the card's peak", hours=hours)
    yield tr(
        "disk: {size} for each checkpoint, {count} kept: {total}",
        size=_size(schedule.checkpoint),
        count=schedule.checkpoints,
        total=_size(schedule.disk),
    )


def _measured(measured: Measured) -> str:
    rate = f"{measured.tokens_per_second:,.0f}"
    if measured.memory is None:
        return tr("measured on {device}: {rate} tokens/s", device=measured.device, rate=rate)
    return tr(
        "measured on {device}: {rate} tokens/s, tensors of {memory} on the GPU",
        device=measured.device,
        rate=rate,
        memory=_size(measured.memory),
    )


def _verdict(plan: Plan) -> str:
    card = plan.machine.card
    if card is None:
        return tr("With --gpu 24GB, or a card's name, this is compared with a card.")
    usable, total = _size(card.usable), _size(plan.memory.total)
    if plan.fits:
        return tr(
            "It fits: {total} of {usable} ({card}).",
            total=total,
            usable=usable,
            card=card.name,
        )
    return tr(
        "It does not fit: {total} of {usable} ({card}). What helps, in this order:",
        total=total,
        usable=usable,
        card=card.name,
    )


def _command(args: argparse.Namespace, found: Sequence[Remedy]) -> str:
    """The command that trains with all changes; what ``--apply`` writes needs no options."""
    import shlex

    from xtuner.planning.remedies import options_of

    last = found[-1].plan.machine
    command = ["xtuner", "train", args.apply or args.config]
    if last.offload:
        command.append("--fsdp-offload")
    elif last.fsdp:
        command.append("--fsdp")
    elif last.deepspeed:
        command += ["--deepspeed", last.deepspeed]
    options = [] if args.apply else options_of(found, args.cfg_options)
    if options:
        command += ["--cfg-options", *options]
    layout = f"NPROC_PER_NODE={last.gpus} " if last.ranks > 1 else ""
    if last.nodes > 1:  # each machine has a rank of its own
        layout += f"NNODES={last.nodes} NODE_RANK=0 ADDR=IP_OF_RANK_0 PORT=29600 "
    return layout + shlex.join(command)


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"

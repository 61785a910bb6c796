"""``xtuner doctor``: what of this machine, or of a config's needs, is missing.

The data of a config are examined by ``xtuner check-custom-dataset`` (``xtuner/doctor``).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner.tools.arguments import add_config_options
from xtuner.utils.lang import tr, translate
from xtuner.utils.terminal import padded

if TYPE_CHECKING:
    from xtuner.config.document import ConfigDocument
    from xtuner.reporting.environment_report import Item

NEEDS = (
    *("XT0001", "XT0002", "XT0101", "XT0107", "XT0315", "XT0316", "XT0317", "XT0318"),
    *("XT0328", "XT0340", "XT0341", "XT0343", "XT0344"),
)
"""Codes of check-cfg that say what is not on this machine."""
NAME_WIDTH = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "config", nargs="?", help=tr("path or name of a config: also check what it needs")
    )
    add_config_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print one line for each item.

    Returns:
        1 when something that is needed is missing, else 0.
    """
    from xtuner.reporting.environment_report import MISSING

    missing = 0
    for item in _items(args):
        print(_line(item), flush=True)
        missing += item.status == MISSING
    if missing:
        print(tr("{count} item(s) that are needed are missing", count=missing))
    return 1 if missing else 0


def _items(args: argparse.Namespace) -> Iterator[Item]:
    from xtuner.reporting import environment_report as report

    yield report.python_item()
    packages = list(report.package_items())
    yield from packages
    if any(item.status == report.MISSING for item in packages):
        return  # the rest needs them
    from xtuner.utils.hub import ask_hub

    hub = ask_hub()
    devices = list(report.device_items())
    yield from devices
    if not any(item.status == report.MISSING for item in devices):
        yield _bf16()
    yield report.memory_item()
    document = None
    if args.config:
        problems, document = _config_needs(args)
    work_dir = document.values.get("work_dir") if document else None
    yield report.disk_item(tr("work dir"), Path(str(work_dir or "work_dirs")))
    for name, folder in report.caches().items():
        yield report.cache_item(name, folder)
    yield _hub(hub())
    if args.config:
        yield from problems


def _bf16() -> Item:
    from xtuner.config.adapt.machine import supported_dtype
    from xtuner.reporting.environment_report import OK, WARNING, Item

    used = supported_dtype("bfloat16")
    if used == "bfloat16":
        return Item(OK, "bfloat16", tr("supported"))
    return Item(WARNING, "bfloat16", tr("not supported by the device: {dtype} is used", dtype=used))


def _hub(error: str | None) -> Item:
    from huggingface_hub import constants

    from xtuner.reporting.environment_report import OK, WARNING, Item

    if constants.HF_HUB_OFFLINE:
        return Item(OK, "hub", tr("not asked: HF_HUB_OFFLINE is set"))
    if error is None:
        return Item(OK, "hub", tr("{endpoint} answers", endpoint=constants.ENDPOINT))
    return Item(
        WARNING,
        "hub",
        tr("{endpoint} cannot be reached: {error}", endpoint=constants.ENDPOINT, error=error),
        tr("set HF_ENDPOINT to a mirror, or give folders of models and data."),
    )


def _config_needs(args: argparse.Namespace) -> tuple[list[Item], ConfigDocument | None]:
    """What a config needs and is not here; the config, where it can be loaded."""
    from xtuner.config.check import ERROR, check
    from xtuner.config.load import load
    from xtuner.config.override import override
    from xtuner.reporting.environment_report import MISSING, OK, WARNING, Item
    from xtuner.utils.errors import UserError

    name = str(args.config)
    items = [
        Item(
            MISSING if p.severity == ERROR else WARNING,
            p.code,
            f"{p.message} [{p.where.key}]" if p.where.key else p.message,
            p.hint or "",
        )
        for p in check(name, args.cfg_options)
        if p.code in NEEDS
    ]
    try:
        document = override(load(name), args.cfg_options)
    except UserError:
        return items, None  # XT0001 or XT0002 says why
    items += [*_base_model(document), *_flash_attention(document)]
    if all(item.status == OK for item in items):
        items.append(Item(OK, tr("config"), tr("{config}: nothing is missing", config=name)))
    return items, document


def _base_model(document: ConfigDocument) -> Iterator[Item]:
    """The base model: a folder, cached, or on the hub."""
    from xtuner.config.check.problem import Context
    from xtuner.config.check.training import base_path
    from xtuner.config.check.values import looks_local
    from xtuner.reporting.environment_report import MISSING, OK, Item
    from xtuner.utils.errors import UserError, Where
    from xtuner.utils.hub import require_available

    path = base_path(Context(document))
    if not path or looks_local(path):  # XT0316
        return
    try:
        require_available(path, Where(document.file))
    except UserError as error:
        yield Item(MISSING, tr("model"), error.message, error.hint or "")
    else:
        yield Item(OK, tr("model"), path)


def _flash_attention(document: ConfigDocument) -> Iterator[Item]:
    from xtuner.config.adapt.machine import has_flash_attention
    from xtuner.config.values import iter_dicts
    from xtuner.reporting.environment_report import WARNING, Item

    wanted = any(
        dict.get(part, "attn_implementation") == "flash_attention_2"
        for _, part in iter_dicts(document.values.get("model"), "model")
    )
    if wanted and not has_flash_attention():
        yield Item(
            WARNING,
            "flash-attn",
            tr(
                "flash_attention_2 is not available here: attention is computed by torch, "
                "with the same result."
            ),
            tr("on a GPU: pip install flash-attn"),
        )


def _line(item: Item) -> str:
    status = padded(translate(item.status), 9)
    advice = f"\n{'':9}{'':{NAME_WIDTH}}{item.advice}" if item.advice else ""
    return f"{status}{padded(item.name, NAME_WIDTH)}{item.found}{advice}"

"""``xtuner copy-cfg``: write a config into a folder, to be edited there."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from xtuner.configs import UnknownConfig, render
from xtuner.tools.config_writers.comments import in_users_language
from xtuner.utils.errors import UserError
from xtuner.utils.files import write_text
from xtuner.utils.lang import tr, translate

_WEIGHTS = ("full", "lora", "qlora")
_OF_PAIRS = ("dpo", "orpo", "reward")
METHODS = (*_WEIGHTS, *(f"{kind}_{weights}" for kind in _OF_PAIRS for weights in _WEIGHTS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    indent = "\n" + " " * len(tr("usage: "))
    parser.usage = (
        f"%(prog)s NAME DIR{indent}%(prog)s --model FOLDER_OR_HUB_ID"
        f"{indent}    [--method METHOD] (--data FILE | --dataset NAME) DIR"
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="[NAME] DIR",
        help=tr("a name (<model>_<method>_<dataset>_e<epochs>) and the folder to write to"),
    )
    parser.add_argument("--model", help=tr("any model: its folder or its name on the hub"))
    parser.add_argument(
        "--method",
        choices=METHODS,
        metavar="METHOD",
        help=tr(
            "how to train it: full, lora (default) or qlora; pairs of answers by DPO, or, with "
            "orpo_lora or reward_lora, likewise for full and qlora, by ORPO or as a reward model"
        ),
    )
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument(
        "--data", help=tr("a file of your own rows; a folder or a pattern for several")
    )
    rows.add_argument("--dataset", help=tr("a dataset of the catalogue, for example alpaca"))
    parser.add_argument(
        "--force",
        action="store_true",
        help=tr("replace a file that is there already"),
    )


def run(args: argparse.Namespace) -> int:
    """Write ``<folder>/<name>_copy.py``, or the ``.py`` file that is named.

    Raises:
        UserError: for a name that is none, or when the file is there already.
    """
    name, text, folder = _config(args)
    given = Path(folder)
    path = given if given.suffix == ".py" and not given.is_dir() else given / f"{name}_copy.py"
    if path.exists() and not args.force:
        raise UserError(
            tr("{path} is there already.", path=path),
            hint=tr("--force replaces it; or name another folder."),
        )
    try:
        write_text(path, in_users_language(text))
    except OSError as error:
        raise UserError(
            tr("cannot write {path}: {strerror}", path=path, strerror=error.strerror)
        ) from None
    print(tr("Copy to {path}", path=path))
    # a config of one's own data is complete; one of the catalogue has the paths of its data to set
    print(tr("Its settings are in PART 1. Then:") if args.data else tr("Edit its PART 1, then:"))
    print(f"  {shlex.join(['xtuner', 'train', str(path)])}")
    return 0


def _config(args: argparse.Namespace) -> tuple[str, str, str]:
    """Name, text and folder of the config."""
    wanted = 1 if args.model else 2
    if len(args.words) != wanted:
        raise UserError(
            tr("expected {wanted} argument(s), got {count}.", wanted=wanted, count=len(args.words)),
            hint="xtuner copy-cfg NAME DIR; xtuner copy-cfg --model MODEL --data FILE DIR",
            status=2,
        )
    if args.model:
        if not (args.data or args.dataset):
            raise UserError(
                tr("on which rows?"),
                hint=tr("--data my.jsonl, or --dataset alpaca."),
                status=2,
            )
        from xtuner.tools.config_writers.own_config import write_own_config

        data = [args.data] if args.data else []
        method = args.method or "lora"
        return (*write_own_config(args.model, method, data, args.dataset), args.words[0])
    if args.method or args.data or args.dataset:
        raise UserError(
            tr("--method, --data and --dataset go with --model."),
            hint=tr("for a name of the catalogue, edit the copy."),
            status=2,
        )
    try:
        return args.words[0], render(args.words[0]), args.words[1]
    except UnknownConfig as error:
        raise unknown(error) from None


def unknown(error: UnknownConfig) -> UserError:
    """The message for a name that is none."""
    near = "".join(f"\n  {name}" for name in error.suggestions)
    listing = tr("'xtuner list-cfg -p TEXT' searches the names.")
    hint = tr("did you mean{near}\n{listing}", near=near, listing=listing) if near else listing
    return UserError(
        tr(
            "there is no config {name!r}: {reason}.",
            name=error.name,
            reason=translate(error.message, **error.values),
        ),
        hint=hint,
    )

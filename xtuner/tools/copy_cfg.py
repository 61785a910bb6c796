"""``xtuner copy-cfg``: write a config into a folder, to be edited there."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from xtuner.configs import UnknownConfig, render
from xtuner.utils.errors import UserError
from xtuner.utils.files import write_text
from xtuner.utils.lang import tr, translate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "config_name",
        help=tr("a name: <model>_<method>_<dataset>_e<epochs>"),
    )
    parser.add_argument("save_dir", help=tr("the folder to write to"))
    parser.add_argument(
        "--force",
        action="store_true",
        help=tr("replace a file that is there already"),
    )


def run(args: argparse.Namespace) -> int:
    """Write ``<save_dir>/<config_name>_copy.py``.

    Raises:
        UserError: for a name that is none, or when the file is there already.
    """
    name = args.config_name
    try:
        text = render(name)
    except UnknownConfig as error:
        raise unknown(error) from None
    path = Path(args.save_dir) / f"{name}_copy.py"
    if path.exists() and not args.force:
        raise UserError(
            tr("{path} is there already.", path=path),
            hint=tr("--force replaces it; or name another folder."),
        )
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(
            tr("cannot write {path}: {strerror}", path=path, strerror=error.strerror)
        ) from None
    print(tr("Copy to {path}", path=path))
    print(tr("Edit its PART 1, then:"))
    print(f"  {shlex.join(['xtuner', 'train', str(path)])}")
    return 0


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

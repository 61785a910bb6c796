"""The files of a folder in a fixed order: alphabetical, or as a file lists them."""

from __future__ import annotations

import os
from pathlib import Path

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr


def find_by_suffix(folder: str | os.PathLike[str], suffix: str) -> list[Path]:
    """The files of a folder and its subfolders whose names end in a suffix, sorted.

    Raises:
        UserError: when there are none.
    """
    base = Path(folder)
    files = sorted(base.rglob(f"*{suffix}")) if base.is_dir() else []
    if not files:
        raise UserError(
            tr("there is no file *{suffix} in {folder}", suffix=suffix, folder=base),
            hint=tr("check the folder and the suffix of its files."),
        )
    return files


def files_in_order(
    folder: str | os.PathLike[str],
    suffix: str,
    order: str | os.PathLike[str] | None = None,
    *,
    all_listed: bool = False,
) -> list[Path]:
    """The files of a folder, sorted or as listed.

    Args:
        folder: searched with its subfolders.
        suffix: how the names of the files end.
        order: a file with the files' paths relative to ``folder``, a line each; None: sorted.
        all_listed: whether ``order`` must list all of them.

    Raises:
        UserError: when there are none, when a listed one is missing, or when one is not listed.
    """
    if order is None:
        return find_by_suffix(folder, suffix)
    base = Path(folder)
    try:
        names = [line.strip() for line in Path(order).read_text("utf-8").split("\n")]
    except OSError as error:
        raise UserError(
            tr("the order cannot be read: {error}", error=error), where=Where(str(order))
        ) from error
    names = [name for name in names if name]
    missing = [name for name in names if not (base / name).is_file()]
    left_out = len(find_by_suffix(base, suffix)) - len(set(names)) if all_listed else 0
    if missing or left_out > 0 or not names:
        raise UserError(
            tr(
                "of the files it names {missing} are missing ({examples}), and {left_out} of the "
                "folder are not named",
                missing=len(missing),
                examples=", ".join(missing[:3]),
                left_out=max(0, left_out),
            ),
            hint=tr("'xtuner preprocess data-order' writes it."),
            where=Where(str(order)),
        )
    return [base / name for name in names]

"""Whether a checkpoint is intact: compared with its manifest, or loaded where it has none.

With several processes each of them hashes a share of the files, so that each file is read once.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from mmengine.dist import all_gather_object, get_rank, get_world_size

from xtuner.checkpoint.folder import is_sharded_folder
from xtuner.checkpoint.io import READ_ERRORS, first_line, read_torch_file
from xtuner.checkpoint.manifest import find_mismatch, read_manifest
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr


def find_corruption(path: Path, *, rank: int = 0, world_size: int = 1) -> str | None:
    """Return what is wrong with a checkpoint, or None for an intact one.

    Args:
        path: a file or a folder; it is read from end to end.
        rank: of ``world_size`` processes that share the work, this one's number; its answer is
            about its share of the files.
        world_size: how many processes share the work.
    """
    try:
        return _find_corruption(path, rank, world_size)
    except OSError as error:
        return tr("it cannot be read ({strerror})", strerror=error.strerror)


def find_corruption_together(path: Path) -> str | None:
    """The same, called on every rank: each hashes a share of the files, all get one answer."""
    found = find_corruption(path, rank=get_rank(), world_size=get_world_size())
    return next((each for each in all_gather_object(found) if each is not None), None)


def require_intact(path: Path, check: Callable[[Path], str | None] = find_corruption) -> None:
    """Raise for a damaged checkpoint.

    Args:
        path: a file or a folder.
        check: ``find_corruption``, or ``find_corruption_together`` when all ranks call this.

    Raises:
        UserError: with what is wrong.
    """
    found = check(path)
    if found:
        raise unusable(path, found)


def unusable(path: Path, reason: str) -> UserError:
    """The error for a checkpoint that cannot be loaded."""
    return UserError(
        tr("this checkpoint cannot be used: {why}.", why=reason),
        hint=tr(
            "take another iter_N.pth of the same folder; '--resume' without a path finds the "
            "newest good one."
        ),
        where=Where(str(path)),
    )


def _find_corruption(path: Path, rank: int, world_size: int) -> str | None:
    if not path.exists():
        return tr("it does not exist")
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        manifest = None
        if rank == 0:
            ignored = tr(
                "the manifest of {path} cannot be used ({error}): the checkpoint itself is read",
                path=path,
                error=error,
            )
            print(ignored, file=sys.stderr)
    if manifest is not None:
        return find_mismatch(path, manifest, rank=rank, world_size=world_size)
    if rank != 0:
        return None
    return _try_to_load_folder(path) if path.is_dir() else _try_to_load(path)


def _try_to_load_folder(folder: Path) -> str | None:
    """What is wrong with a folder without a manifest: the first of its files that does not load."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        return tr("it is no checkpoint: empty")
    for file in files:
        problem = _try_to_load(file) if file.suffix in (".pt", ".pth") else None
        if problem is not None:
            return f"{file.name}: {problem}"
    if is_sharded_folder(folder) or any(file.suffix == ".distcp" for file in files):
        from xtuner.checkpoint import sharded  # uses private parts of torch: only where needed

        return sharded.find_damage(folder)
    return None


def _try_to_load(file: Path) -> str | None:
    """What is wrong with a file without a manifest: its own checksums, then its content."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                broken = archive.testzip()
            if broken:
                return tr("its part {broken} is damaged", broken=broken)
        read_torch_file(file, mapped=True)
    except UserError as error:
        return error.message.rstrip(".\u3002")
    except READ_ERRORS as error:
        return first_line(error)
    return None

"""Atomic writing of files and folders: to a temporary path, flushed, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from xtuner.utils.lang import tr
from xtuner.utils.process_identity import ProcessIdentity

_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What a stream fails with that does not know its file."""
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.h5", "*.msgpack", "*.gguf", "*.onnx")


@contextlib.contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success flush it to disk and rename it there.

    Works for a file or a folder: write to the path that is given. Nothing is left behind when
    the block raises, no folder made for it either, and what a killed process has left is removed by
    the next one that writes there. An existing file at ``path`` is replaced; an existing folder is
    replaced only after the new one is complete.

    Raises:
        OSError: when ``path`` is a device or a pipe.
    """
    target = Path(path)
    if _is_special(target):
        why = tr("this is a device or a pipe, not a file")
        raise OSError(errno.EINVAL, why, str(target))
    with _parents_of(target):
        with _named(target):
            restore_killed(target)
            prefix = f".{target.name}.{ProcessIdentity.this().name()}."
            aside = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent)) / target.name
        try:
            with _named(target, aside):
                yield aside
            flush(aside)
            if aside.is_dir() and target.exists():
                _replace_folder(aside, target)
            else:
                aside.replace(target)
            _fsync(target.parent)
        finally:
            shutil.rmtree(aside.parent, ignore_errors=True)


@contextlib.contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """Make the folders that a path lies in; those that were not there go when the block fails."""
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # not empty: others write there
            for folder in made:
                folder.rmdir()
        raise


def _is_special(path: Path) -> bool:
    return path.is_char_device() or path.is_block_device() or path.is_fifo()


def restore_killed(target: Path) -> None:
    """Remove the temporary folders that ended processes have left beside a target.

    A folder that was complete and only lacked its name gets it, and a note says so; the one that it
    was about to replace is removed only by a later call. Whether a process of another container or
    machine runs cannot be known here: its folder stays, and a warning names it.
    """
    if not target.parent.is_dir():
        return
    prefix = f".{target.name}."
    for entry in target.parent.iterdir():
        name = entry.name.removeprefix(prefix) if entry.name.startswith(prefix) else ""
        writer = ProcessIdentity.of_name(name.rpartition(".")[0])
        if writer is not None and not writer.is_here():
            _name_leftover(entry, target)
        if writer is None or not writer.is_here() or not writer.has_ended():
            continue  # of one that runs, or that runs elsewhere
        complete, replaced = entry / target.name, entry / "replaced"
        if replaced.exists() and complete.exists() and not target.exists():
            with contextlib.suppress(OSError):  # another process was faster
                complete.rename(target)
                _name_restored(target, replaced)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def _name_restored(target: Path, replaced: Path) -> None:
    print(
        tr(
            "note: the process that wrote {target} was killed after its last file: it is whole and "
            "in its place now. The one before it is {replaced} until {target} is written again.",
            target=target,
            replaced=replaced,
        ),
        file=sys.stderr,
    )


def _name_leftover(folder: Path, target: Path) -> None:
    """Say who may delete a temporary folder: its writer may run where it cannot be looked up."""
    status = []
    for entry in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):  # that process has just removed it
            status.append(entry.stat())
    if not status:
        return
    written = datetime.fromtimestamp(max(entry.st_mtime for entry in status))
    print(
        tr(
            "warning: {folder} ({size:.1f} MB, last written {written}) belongs to a process of "
            "another container or machine. If none there writes {target} any more, delete it.",
            folder=folder,
            size=sum(entry.st_size for entry in status) / 1e6,
            written=f"{written:%Y-%m-%d %H:%M}",
            target=target,
        ),
        file=sys.stderr,
    )


@contextlib.contextmanager
def _named(target: Path, aside: Path | None = None) -> Iterator[None]:
    """Let errors of the system in the block name what is written, not the path beside it.

    Args:
        target: the file or folder.
        aside: the path beside it.
    """
    try:
        yield
    except OSError as error:
        name = error.filename
        if aside is None or (name is None and error.errno in _OF_WRITING):
            error.filename = str(target)
        elif isinstance(name, str | os.PathLike):
            error.filename = os.fspath(name).replace(str(aside), str(target))
        raise


def _replace_folder(aside: Path, target: Path) -> None:
    """Two renames, as a folder cannot replace another; the old one is put back when one fails."""
    replaced = aside.parent / "replaced"
    target.rename(replaced)
    try:
        aside.rename(target)
    except BaseException:
        replaced.rename(target)
        raise


def flush(path: Path, *, recursive: bool = True) -> None:
    """Make the operating system put a file or a folder on disk now.

    Args:
        path: the file or folder.
        recursive: with all files in a folder; else only its list of names.
    """
    if recursive and path.is_dir():
        for child in path.rglob("*"):
            if child.is_file():
                _fsync(child)
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file (UTF-8) atomically; a device or a pipe is written to, not replaced."""
    if _is_special(Path(path)):
        Path(path).write_text(text, encoding="utf-8")
        return
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def copy_side_files(source: Path, target: Path, *, replace: bool = True) -> None:
    """Copy the files of a model folder that are not weights: config, tokenizer, code and so on.

    Args:
        source: the model's folder.
        target: a folder.
        replace: overwrite files that ``target`` has.
    """
    for file in source.iterdir():
        is_weights = any(file.match(pattern) for pattern in _WEIGHTS)
        if not file.is_file() or is_weights or file.name.endswith(".index.json"):
            continue
        if replace or not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)

"""Reading and writing files of ``torch.save``: as data only, and with clear messages for errors."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xtuner.checkpoint.serialize import SavedHistory
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

NEARLY_FULL = 16 << 20
"""Bytes: a checkpoint that failed may have left so many free."""
READ_ERRORS = (RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile)


def read_torch_file(file: Path, *, mapped: bool) -> dict[str, Any]:
    """Read a file of ``torch.save`` with ``weights_only``.

    Args:
        file: the file.
        mapped: map the tensors from the file, so that memory is taken only for those that are used
            (the file must stay as it is); else read them.

    Raises:
        UserError: when it is damaged or asks for code.
    """
    mapped = mapped and zipfile.is_zipfile(file)
    try:
        with torch.serialization.safe_globals(_harmless_globals() + _deepspeed_globals(file)):
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise _refusal(file, error) from error
    except READ_ERRORS as error:
        raise UserError(
            tr("this checkpoint is damaged: {error}", error=first_line(error)),
            where=Where(str(file)),
        ) from error
    if not isinstance(state, dict):
        raise UserError(
            tr("a checkpoint is a dict; this file holds a {type}.", type=type(state).__name__),
            where=Where(str(file)),
        )
    return state


@contextlib.contextmanager
def explained_write_failure(target: Path) -> Iterator[None]:
    """Turn the operating system's errors while ``target`` is written into a clear message."""
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is no Exception
        cause = _system_error(error, target.parent)
        if cause is None:
            raise
        raise UserError(
            tr("the checkpoint could not be written: {cause}.", cause=cause.strerror or cause),
            hint=_write_hint(cause, target),
            where=Where(str(target)),
        ) from error


def _system_error(error: BaseException, folder: Path) -> OSError | None:
    """The operating system's error that a writing library's error stands for; None for others.

    Args:
        error: of torch, DeepSpeed, or the system itself.
        folder: where was written.
    """
    failures = getattr(error, "failures", None)  # by rank, of torch.distributed.checkpoint
    if isinstance(failures, dict):
        found = (_system_error(failure[0], folder) for failure in failures.values())
        return next((each for each in found if each is not None), None)
    if not isinstance(error, OSError | RuntimeError):
        return None
    for each in (error, error.__cause__, error.__context__):
        if isinstance(each, OSError):
            return each
    if "inline_container" not in str(error):  # torch's writer of archives gives no other reason
        return None
    number = errno.ENOSPC if _free(folder) < NEARLY_FULL else errno.EIO
    return OSError(number, os.strerror(number))


def _free(folder: Path) -> int:
    """Bytes that are free on the disk of a folder; 0 where that cannot be told."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _write_hint(cause: OSError, target: Path) -> str:
    kept = tr("Earlier checkpoints are untouched; resume with 'xtuner train CONFIG --resume'.")
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        free = _free(target.parent)
        if free > NEARLY_FULL:  # no inodes, or a quota
            say = tr("no more files can be made there ('df -i', 'quota'): ")
        else:
            say = tr("{free:,.0f} MB are free there: ", free=free / 1e6)
        return say + tr("make room, or choose another folder with '--work-dir'. ") + kept
    return tr("make the folder writable, or choose another one with '--work-dir'. ") + kept


def _refusal(file: Path, error: pickle.UnpicklingError) -> UserError:
    """The message for a file that asks for objects which are not data."""
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (pickle.UnpicklingError, *READ_ERRORS):
        asked = []
    named = ", ".join(asked) or tr("objects")  # torch's text advises to trust the file
    return UserError(
        tr(
            "this checkpoint holds more than data: it asks to run {named}. It was not loaded and "
            "nothing from it was run.",
            named=named,
        ),
        hint=tr("use a checkpoint from a source you trust, best of all as safetensors."),
        where=Where(str(file)),
    )


def _harmless_globals() -> list[Any]:
    """Stand-ins for what checkpoints of XTuner v0.1 hold beside tensors: logged numbers.

    mmengine pickled its ``HistoryBuffer`` together with its methods, as calls of ``getattr``. Both
    names are given something inert here, so neither mmengine's class nor ``getattr`` is reached.
    """
    kinds = [np.float64, np.float32, np.int64, np.int32, np.bool_]
    rebuilt = [
        (getattr(_multiarray(), name), f"numpy.{core}.multiarray.{name}")
        for name in ("_reconstruct", "scalar")
        for core in ("core", "_core")
    ]
    return [
        (SavedHistory, "mmengine.logging.history_buffer.HistoryBuffer"),
        (_nothing, "builtins.getattr"),
        *(np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in kinds}),
        *rebuilt,
    ]


def _deepspeed_globals(file: Path) -> list[Any]:
    """Inert classes by the names of the DeepSpeed classes (loss scalers, enums) that a file has."""
    if "_states.pt" not in file.name:
        return []
    asked = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    return [
        (type(name.rpartition(".")[2], (_Inert,), {}), name)
        for name in asked
        if name.startswith("deepspeed.")
    ]


class _Inert:
    """Takes any arguments and does nothing with them."""

    def __init__(self, *_: object) -> None: ...


def _multiarray() -> Any:
    """The module of NumPy that rebuilds arrays; NumPy 1 and 2 name it differently."""
    name = "numpy._core" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "numpy.core"
    return importlib.import_module(f"{name}.multiarray")


def _nothing(*_: object) -> None:
    """What a checkpoint gets that asks for an attribute of something."""

"""Checkpoints: written so that a killed run always leaves a good one, read so that no code runs.

A checkpoint is ``work_dir/iter_N.pth`` with its manifest ``iter_N.pth.json`` (see
``manifest.py``). It holds plain data and tensors only (see ``serialize.py``).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from xtuner.checkpoint.manifest import (
    find_mismatch,
    manifest_path,
    read_manifest,
    sha256,
    write_manifest,
)
from xtuner.checkpoint.serialize import SavedHistory, to_serializable
from xtuner.registry import READERS
from xtuner.utils.errors import UserError, Where
from xtuner.utils.files import written_aside
from xtuner.utils.lang import tr

NAME = re.compile(r"(iter|epoch)_\d+\.pth")
READ_ERRORS = (RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile)


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a checkpoint and its manifest; a crash at any moment leaves the old or the new one.

    Args:
        path: where it goes, for example ``work_dir/iter_100.pth``.
        state: nested plain data and tensors; ``state['meta']`` gives the manifest its ``iter`` and
            ``epoch``.

    Raises:
        UserError: when it cannot be written (no space, no permission, an unreliable disk).
        TypeError: when ``state`` holds something that is neither data nor a tensor.
    """
    target = Path(path)
    plain = to_serializable(state)
    meta = plain.get("meta", {})
    facts = {key: meta[key] for key in ("iter", "epoch") if key in meta}
    with explained_write_failure(target):
        with written_aside(target) as aside:
            with aside.open("wb") as stream:
                hashing = _HashingWriter(stream)
                torch.save(plain, cast(IO[bytes], hashing))
            if sha256(aside) != hashing.digest:
                raise OSError(errno.EIO, "what was read back is not what was written")
            # The manifest of an older checkpoint of this name must not judge the new one.
            manifest_path(target).unlink(missing_ok=True)
        write_manifest(target, facts, digests={target.name: hashing.digest})


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint file onto the CPU as plain data and tensors; no code in it can run.

    Args:
        path: a ``.pth`` of this version or of XTuner v0.1. It is compared with its manifest. Of a
            folder (DeepSpeed, FSDP) all but weights and optimizer, and ``folder``, its path.

    Raises:
        UserError: when it is missing, damaged, or holds something that is not data.
    """
    if Path(path).is_dir():
        return _checked_folder(Path(path))
    state = _checked(Path(path), mapped=False)
    if "message_hub" in state:
        state["message_hub"] = to_serializable(state["message_hub"])
    return state


@READERS.register_module(name="weights")
def load_state_dict(path: str | Path) -> Mapping[str, torch.Tensor]:
    """Load only the model's weights from a checkpoint.

    Args:
        path: a ``.pth`` file, a DeepSpeed folder (ZeRO 1, 2 or 3) or a folder of torch's
            distributed checkpoints (FSDP). Neither DeepSpeed nor several processes are needed.

    Returns:
        Name of the parameter -> tensor on the CPU. Tensors are mapped from the files, or put
        together when they are read, so that memory is taken only for those that are used.
    """
    source = Path(path)
    if source.is_dir():
        return _load_folder(source)
    state = _checked(source, mapped=True)
    weights = state.get("state_dict", state)
    if not isinstance(weights, Mapping):
        raise _unusable(source, tr("its state_dict is no dict"))
    return {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}


def find_latest(work_dir: str | Path, complain: Callable[[str], None] | None = None) -> Path | None:
    """Find the newest good checkpoint of a run, the one written last.

    Args:
        work_dir: the folder of the run.
        complain: told, in one line each, which newer checkpoints are damaged; stderr by default.

    Returns:
        The checkpoint (a file or a folder), or None when there is no good one.
    """
    say = complain or (lambda line: print(line, file=sys.stderr))
    folder = Path(work_dir)
    if not folder.is_dir():
        return None
    candidates = [entry for entry in folder.iterdir() if NAME.fullmatch(entry.name)]
    for candidate in sorted(candidates, key=_saved_at, reverse=True):
        problem = find_corruption(candidate)
        if problem is None:
            return candidate
        say(
            tr(
                "{candidate} is damaged and is passed over: {problem}",
                candidate=candidate,
                problem=problem,
            )
        )
    return None


def config_beside(path: str | Path) -> Path | None:
    """The config that a checkpoint was trained with: the newest ``*.py`` in its folder, if any."""
    configs = sorted(
        Path(path).resolve().parent.glob("*.py"), key=lambda file: file.stat().st_mtime
    )
    return configs[-1] if configs else None


def find_corruption(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None for a good one. Reads it once, from end to end."""
    try:
        return _damage(path)
    except OSError as error:
        return tr("it cannot be read ({strerror})", strerror=error.strerror)


def remove(path: Path) -> None:
    """Delete a checkpoint, a file or a folder, and its manifest."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    manifest_path(path).unlink(missing_ok=True)


def remove_leftovers(work_dir: str | Path) -> None:
    """Delete what a run that was killed while it saved has left half-written."""
    for entry in Path(work_dir).glob(".*.pth.*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)


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
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            tr("the checkpoint could not be written: {cause}.", cause=cause.strerror or cause),
            hint=_write_hint(cause, target),
            where=Where(str(target)),
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _write_hint(cause: OSError, target: Path) -> str:
    kept = tr("Earlier checkpoints are untouched; go on with 'xtuner train CONFIG --resume'.")
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(target.parent).free
            return (
                tr(
                    "{free:,.0f} MB are free there: make room, or choose another folder "
                    "with '--work-dir'. ",
                    free=free / 1e6,
                )
                + kept
            )
    return tr("make the folder writable, or choose another one with '--work-dir'. ") + kept


def _saved_at(path: Path) -> float:
    try:
        manifest = read_manifest(path) or {}
    except ValueError:
        manifest = {}
    return float(manifest.get("saved_at", path.stat().st_mtime))


def _load_folder(folder: Path) -> Mapping[str, torch.Tensor]:
    """The weights of a folder, by what wrote it."""
    from xtuner.checkpoint import deepspeed as checkpoint_deepspeed
    from xtuner.checkpoint import sharded

    found = find_corruption(folder)
    if found:
        raise _unusable(folder, found)
    if sharded.is_sharded_folder(folder):
        return sharded.load_sharded(folder)
    if checkpoint_deepspeed.is_deepspeed_folder(folder):
        return checkpoint_deepspeed.load_deepspeed(folder)
    raise UserError(
        tr(
            "this folder is no checkpoint: neither DeepSpeed's files (*model_states.pt) nor "
            "those of torch (.metadata) are in it."
        ),
        where=Where(str(folder)),
    )


def _checked(file: Path, *, mapped: bool) -> dict[str, Any]:
    """Read a checkpoint file that is not damaged."""
    if file.is_dir():
        raise UserError(
            tr("this is a folder; a checkpoint file was expected."),
            where=Where(str(file)),
        )
    found = find_corruption(file)
    if found:
        raise _unusable(file, found)
    return read_torch_file(file, mapped=mapped)


def _checked_folder(folder: Path) -> dict[str, Any]:
    """What lies beside weights and optimizer in a checkpoint folder that is not damaged."""
    from xtuner.checkpoint.folder import RUN_FILE

    found = find_corruption(folder)
    if found:
        raise _unusable(folder, found)
    if not (folder / RUN_FILE).is_file():
        raise UserError(
            tr(
                "this folder holds weights only (there is no {run_file} in it): a run cannot go "
                "on from it.",
                run_file=RUN_FILE,
            ),
            hint=f"--cfg-options load_from={folder}",
            where=Where(str(folder)),
        )
    return {**read_torch_file(folder / RUN_FILE, mapped=False), "folder": str(folder)}


def _unusable(path: Path, why: str) -> UserError:
    return UserError(
        tr("this checkpoint cannot be used: {why}.", why=why),
        hint=tr(
            "take another iter_N.pth of the same folder; '--resume' without a path finds the "
            "newest good one."
        ),
        where=Where(str(path)),
    )


def _damage(path: Path) -> str | None:
    if not path.exists():
        return tr("it does not exist")
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return tr("its manifest cannot be read ({error})", error=error)
    if manifest is not None:
        return find_mismatch(path, manifest)
    if path.is_dir():
        return None if any(path.iterdir()) else tr("it is no checkpoint: empty")
    return _load_test(path)


def _load_test(file: Path) -> str | None:
    """Whether a file without a manifest is whole: its own checksums agree and it loads."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                broken = archive.testzip()
            if broken:
                return tr("its part {broken} is damaged", broken=broken)
        read_torch_file(file, mapped=True)
    except UserError as error:
        return error.message.rstrip(".。")
    except READ_ERRORS as error:
        return first_line(error)
    return None


def _refusal(file: Path, error: pickle.UnpicklingError) -> UserError:
    """The message for a file that asks for objects which are not data."""
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (pickle.UnpicklingError, *READ_ERRORS):
        asked = []
    named = ", ".join(asked) or first_line(error)
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

    def __init__(self, *_: Any) -> None: ...


def _multiarray() -> Any:
    """The module of NumPy that rebuilds arrays; NumPy 1 and 2 name it differently."""
    name = "numpy._core" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "numpy.core"
    return importlib.import_module(f"{name}.multiarray")


def _nothing(*_: Any) -> None:
    """What a checkpoint gets that asks for an attribute of something."""


class _HashingWriter:
    """A stream that hashes what goes through it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Pass the bytes on."""
        self._hash.update(data)
        return self._stream.write(data)

    def flush(self) -> None:
        """Flush the stream behind it."""
        self._stream.flush()

    @property
    def digest(self) -> str:
        """The SHA-256 of all that was written."""
        return self._hash.hexdigest()

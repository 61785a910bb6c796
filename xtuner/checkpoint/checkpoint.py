"""Checkpoints: written so that a killed run always leaves an intact one, read without running code.

A checkpoint is ``work_dir/iter_N.pth`` with its manifest ``iter_N.pth.json`` (see
``manifest.py``). It holds plain data and tensors only (see ``serialize.py``).
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch

from xtuner.checkpoint import deepspeed, folder
from xtuner.checkpoint.io import explained_write_failure, read_torch_file
from xtuner.checkpoint.manifest import (
    iterations_of,
    manifest_path,
    saved_at,
    sha256,
    write_manifest,
)
from xtuner.checkpoint.serialize import to_serializable
from xtuner.checkpoint.verify import find_corruption, require_intact, unusable
from xtuner.registry import READERS
from xtuner.utils.constants import RUN_RECORD
from xtuner.utils.errors import UserError, Where
from xtuner.utils.files import written_aside
from xtuner.utils.lang import tr

NAME = re.compile(r"(iter|epoch)_\d+\.pth")


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
    progress = {key: meta[key] for key in ("iter", "epoch") if key in meta}
    with explained_write_failure(target):
        with written_aside(target) as aside:
            with aside.open("wb") as stream:
                hashing = _HashingWriter(stream)
                torch.save(plain, cast(IO[bytes], hashing))
            if sha256(aside) != hashing.digest:
                raise OSError(errno.EIO, "what was read back is not what was written")
            # The manifest of an older checkpoint of this name does not describe the new one.
            manifest_path(target).unlink(missing_ok=True)
            if target.is_dir() and not target.is_symlink():  # of a run with several processes
                target.rename(aside.parent / "replaced")
        write_manifest(target, progress, digests={target.name: hashing.digest})


def load_checkpoint(path: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """Load a checkpoint onto the CPU as plain data and tensors; no code in it can run.

    Args:
        path: a ``.pth`` of this version or of XTuner v0.1, or a folder (DeepSpeed, FSDP). Of a
            folder all but weights and optimizer is loaded, and ``folder``, its path.
        verify: compare it with its manifest first; False where that has been done.

    Raises:
        UserError: when it is missing, damaged, or holds something that is not data.
    """
    source = Path(path)
    if verify:
        require_intact(source)
    if source.is_dir():
        return folder.load_run_file(source)
    state = read_torch_file(source, mapped=False)
    if "message_hub" in state:
        state["message_hub"] = to_serializable(state["message_hub"])
    return state


@READERS.register_module(name="weights")
def load_state_dict(path: str | Path, *, verify: bool = True) -> Mapping[str, torch.Tensor]:
    """Load only the model's weights from a checkpoint.

    Args:
        path: a ``.pth`` file, a DeepSpeed folder (ZeRO 1, 2 or 3) or a folder of torch's
            distributed checkpoints (FSDP). Neither DeepSpeed nor several processes are needed.
        verify: compare it with its manifest first; False where that has been done.

    Returns:
        Name of the parameter -> tensor on the CPU. Tensors are mapped from the files, or assembled
        when they are read, so that memory is taken only for those that are used.

    Raises:
        UserError: when it is missing, damaged, no checkpoint, or holds something that is not data.
    """
    source = Path(path)
    if verify:
        require_intact(source)
    if source.is_dir():
        return _load_folder(source)
    state = read_torch_file(source, mapped=True)
    weights = state.get("state_dict", state)
    if not isinstance(weights, Mapping):
        raise unusable(source, tr("its state_dict is no dict"))
    return {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}


def find_latest(work_dir: str | Path, report: Callable[[str], None] | None = None) -> Path | None:
    """Find the newest intact checkpoint of a run, the one with the most iterations.

    Args:
        work_dir: the folder of the run.
        report: called with a line for each newer checkpoint that is damaged; stderr by default.

    Returns:
        The checkpoint (a file or a folder), or None when there is no intact one.
    """
    return first_intact(checkpoints_of(work_dir), find_corruption, report)


def first_intact(
    candidates: Sequence[Path],
    check: Callable[[Path], str | None],
    report: Callable[[str], None] | None = None,
) -> Path | None:
    """The first checkpoint of a list that is not damaged.

    Args:
        candidates: files and folders.
        check: ``find_corruption``; ``find_corruption_together`` when every rank calls this function
            with the same list.
        report: as for ``find_latest``.
    """
    say = report or (lambda line: print(line, file=sys.stderr))
    for candidate in candidates:
        problem = check(candidate)
        if problem is None:
            return candidate
        say(
            tr(
                "{candidate} is damaged and is skipped: {problem}",
                candidate=candidate,
                problem=problem,
            )
        )
    return None


def checkpoints_of(work_dir: str | Path) -> list[Path]:
    """All checkpoints of a run, intact or not, the one with the most iterations first.

    Where another one was written later (a clock was set back, or a longer run has left its own
    here), a line on stderr says so.
    """
    parent = Path(work_dir)
    entries = parent.iterdir() if parent.is_dir() else ()
    found = [entry for entry in entries if NAME.fullmatch(entry.name)]
    times = {path: saved_at(path) for path in found}
    found.sort(key=lambda path: (iterations_of(path), _number_in(path), times[path]), reverse=True)
    later = max(found, key=lambda path: times[path], default=None)
    if later is not None and times[later] > times[found[0]]:
        line = tr(
            "{newest} has the most iterations, although {later} was written later by the clock",
            newest=found[0].name,
            later=later.name,
        )
        print(line, file=sys.stderr)
    return found


def config_beside(path: str | Path) -> Path | None:
    """The config that a checkpoint was trained with.

    The run has noted its name beside it. In the folder of a run that has not (of v0.1) it is the
    newest file that sets ``model``.
    """
    beside = Path(path).resolve().parent
    if (beside / RUN_RECORD).is_file():
        name = _config_of(beside / RUN_RECORD)
        if name and (beside / name).is_file():
            return beside / name
    files = sorted(beside.glob("*.py"), key=lambda file: file.stat().st_mtime)
    configs = [file for file in files if re.search(r"^model\b", file.read_text("utf-8"), re.M)]
    return configs[-1] if configs else None


def _config_of(record: Path) -> str | None:
    """The name of the config in a run's record; None where there is no name of a file."""
    try:
        name = json.loads(record.read_text("utf-8"))["config"]
    except (ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) and Path(name).name == name else None


def remove(path: Path) -> None:
    """Delete a checkpoint, a file or a folder, and its manifest; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    manifest_path(path).unlink(missing_ok=True)


def remove_leftovers(work_dir: str | Path) -> None:
    """Clean up after a run that was killed while it saved.

    What was written completely is put in its place, what is half-written is deleted.
    """
    for entry in Path(work_dir).glob(".*.pth.*"):
        if entry.is_dir():
            folder.finish_interrupted(entry)
            shutil.rmtree(entry, ignore_errors=True)


def _number_in(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _load_folder(source: Path) -> Mapping[str, torch.Tensor]:
    """The weights of a folder, by what wrote it."""
    if folder.is_sharded_folder(source):
        from xtuner.checkpoint import sharded  # uses private parts of torch: only where needed

        return sharded.load_sharded(source)
    if deepspeed.is_deepspeed_folder(source):
        return deepspeed.load_deepspeed(source)
    raise UserError(
        tr(
            "this folder is no checkpoint: neither DeepSpeed's files (*model_states.pt) nor "
            "those of torch (.metadata) are in it."
        ),
        where=Where(str(source)),
    )


class _HashingWriter:
    """A stream that hashes what goes through it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
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

"""A checkpoint that all processes write together: a folder, complete or not there at all.

Beside what DeepSpeed or torch write lies ``run.pth``: progress, schedules, random states, logged
numbers, all but weights and optimizer. The manifest is beside the folder, as it is beside a file.

Folder and manifest are written into a hidden folder beside the target and then renamed, the
manifest last. Once the hidden folder has the manifest, what is in it is complete, and
``finish_interrupted`` completes the renames of a run that was killed between them.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, barrier, get_rank, get_world_size

from xtuner.checkpoint.io import explained_write_failure, read_torch_file
from xtuner.checkpoint.manifest import manifest_path, sha256, write_manifest
from xtuner.checkpoint.serialize import to_serializable
from xtuner.utils.errors import UserError, Where
from xtuner.utils.files import flush
from xtuner.utils.lang import tr

RUN_FILE = "run.pth"


def is_sharded_folder(folder: Path) -> bool:
    """Whether a folder was written by ``torch.distributed.checkpoint``."""
    return (folder / ".metadata").is_file()


def load_run_file(folder: Path) -> dict[str, Any]:
    """Load what lies beside weights and optimizer in a checkpoint folder.

    Returns:
        The state, with the folder's path as ``folder``.

    Raises:
        UserError: when the folder holds weights only.
    """
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


def save_folder(
    target: Path, state: Mapping[str, Any], write_shard: Callable[[Path], None]
) -> None:
    """Write a checkpoint folder; called on every rank, on a file system that all of them share.

    Args:
        target: ``work_dir/iter_N.pth``; replaced, when it is there, after the new one is complete.
        state: plain data for ``run.pth``; ``meta`` gives the manifest its ``iter`` and ``epoch``.
        write_shard: writes this rank's files into the folder it is given.

    Raises:
        UserError: when something cannot be written.
    """
    hidden = target.with_name(f".{target.name}.writing")
    aside = hidden / target.name
    first = get_rank() == 0
    with explained_write_failure(target), _removed_when_incomplete(hidden):
        if first:
            shutil.rmtree(hidden, ignore_errors=True)
            aside.mkdir(parents=True)
            with (aside / RUN_FILE).open("wb") as stream:  # by its path, torch hides the reason
                torch.save(to_serializable(state), stream)
        barrier()
        write_shard(aside)
        barrier()
        digests = _digests(aside)
        if first:
            flush(aside)
            meta = {key: state["meta"][key] for key in ("iter", "epoch") if key in state["meta"]}
            write_manifest(aside, meta, digests=digests)
            finish_interrupted(hidden)
    barrier()


@contextlib.contextmanager
def _removed_when_incomplete(hidden: Path) -> Iterator[None]:
    """Remove what was written when the block raises, unless it is complete: a disk may be full."""
    try:
        yield
    except BaseException:
        if get_rank() == 0 and not manifest_path(hidden / _name_in(hidden)).is_file():
            shutil.rmtree(hidden, ignore_errors=True)
        raise


def _name_in(hidden: Path) -> str:
    """The name of the checkpoint that a hidden folder is for."""
    return hidden.name[1:].rpartition(".")[0]


def finish_interrupted(hidden: Path) -> None:
    """Put a checkpoint that is complete in its hidden folder in its place.

    Args:
        hidden: ``.iter_N.pth.writing``. Nothing is done when what is in it is not complete.
    """
    target = hidden.parent / _name_in(hidden)
    aside, replaced = hidden / target.name, hidden / "replaced"
    if not manifest_path(aside).is_file():
        return
    # The manifest of an older checkpoint of this name does not describe the new one.
    manifest_path(target).unlink(missing_ok=True)
    if aside.is_dir():
        if target.is_dir():
            target.rename(replaced)
        else:
            target.unlink(missing_ok=True)
        aside.rename(target)
    manifest_path(aside).replace(manifest_path(target))
    flush(target.parent, recursive=False)
    shutil.rmtree(hidden, ignore_errors=True)


def _digests(folder: Path) -> dict[str, str]:
    """The checksum of each file, computed by the ranks together; the files are flushed."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    own = {}
    for file in files[get_rank() :: get_world_size()]:
        flush(file)
        own[file.relative_to(folder.parent).as_posix()] = sha256(file)
    return {name: digest for part in all_gather_object(own) for name, digest in part.items()}

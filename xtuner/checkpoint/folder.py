"""A checkpoint that all processes write together: a folder, complete or not there at all.

Beside what DeepSpeed or torch write lies ``run.pth``: progress, schedules, random states, logged
numbers, all but weights and optimizer. The manifest is beside the folder, as it is beside a file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, barrier, get_rank, get_world_size

from xtuner.checkpoint.checkpoint import explained_write_failure
from xtuner.checkpoint.manifest import manifest_path, sha256, write_manifest
from xtuner.checkpoint.serialize import to_serializable
from xtuner.utils.files import flush

RUN_FILE = "run.pth"


def save_folder(
    target: Path, state: Mapping[str, Any], write_parts: Callable[[Path], None]
) -> None:
    """Write a checkpoint folder; called on every rank, on a file system that all of them share.

    Args:
        target: ``work_dir/iter_N.pth``; replaced, when it is there, after the new one is complete.
        state: plain data for ``run.pth``; ``meta`` gives the manifest its ``iter`` and ``epoch``.
        write_parts: writes this rank's part into the folder it is given.

    Raises:
        UserError: when something cannot be written.
    """
    parent = target.with_name(f".{target.name}.writing")
    aside = parent / target.name
    first = get_rank() == 0
    with explained_write_failure(target):
        if first:
            shutil.rmtree(parent, ignore_errors=True)
            aside.mkdir(parents=True)
            torch.save(to_serializable(state), aside / RUN_FILE)
        barrier()
        write_parts(aside)
        barrier()
        digests = _digests(aside)
        if first:
            _put_in_place(aside, target)
            facts = {key: state["meta"][key] for key in ("iter", "epoch") if key in state["meta"]}
            write_manifest(target, facts, digests=digests)
    barrier()


def _digests(folder: Path) -> dict[str, str]:
    """The checksum of each file, the work shared out over the ranks; and the files flushed."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    mine = {}
    for file in files[get_rank() :: get_world_size()]:
        flush(file)
        mine[file.relative_to(folder.parent).as_posix()] = sha256(file)
    return {name: digest for part in all_gather_object(mine) for name, digest in part.items()}


def _put_in_place(aside: Path, target: Path) -> None:
    # The manifest of an older checkpoint of this name must not judge the new one.
    manifest_path(target).unlink(missing_ok=True)
    flush(aside)
    if target.is_dir():
        target.rename(aside.parent / "replaced")
    else:
        target.unlink(missing_ok=True)
    aside.rename(target)
    shutil.rmtree(aside.parent, ignore_errors=True)

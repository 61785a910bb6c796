"""Which folder a training writes to: an earlier run's files stay unless the user says otherwise."""

from __future__ import annotations

import contextlib
import itertools
import time
from pathlib import Path

from xtuner.checkpoint.checkpoint import checkpoints_of, remove
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

LATEST = "latest"
"""In the default work dir: a link to the folder of the newest run."""


def run_folder(name: str, *, chosen: bool, resume: bool, overwrite: bool, alone: bool) -> str:
    """The folder of this run.

    A default work dir with checkpoints of an earlier run gets a folder for this one, named by the
    time, and a link ``latest`` to it.

    Args:
        name: the work dir, from the command line, the config, or ``work_dirs/<config name>``.
        chosen: whether the user named it.
        resume: whether the newest run is resumed.
        overwrite: whether the checkpoints that are there are replaced.
        alone: whether this is the only process.

    Raises:
        UserError: when a folder that the user named holds a run, or one that several processes
            would have to agree on.
    """
    work_dir = Path(name)
    if resume:
        newest = work_dir / LATEST
        return str(work_dir / newest.readlink()) if newest.is_symlink() and not chosen else name
    earlier = checkpoints_of(work_dir)
    if not earlier:
        return name
    if overwrite:
        for checkpoint in earlier:
            remove(checkpoint)
        return name
    if chosen or not alone:
        raise UserError(
            tr("this work dir holds a run already ({name}).", name=earlier[0].name),
            hint=tr(
                "--resume continues it, --overwrite replaces it; or name another folder with "
                "--work-dir."
            ),
            where=Where(name),
        )
    folder = _make_folder(work_dir)
    with contextlib.suppress(OSError):  # a file system without links
        link = work_dir / LATEST
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name, target_is_directory=True)
    print(
        tr(
            "{work_dir} holds a run already: this one goes to {folder}",
            work_dir=name,
            folder=folder,
        )
    )
    return str(folder)


def _make_folder(work_dir: Path) -> Path:
    """A new folder named by the time, which a folder of mmengine's logs may have taken already."""
    started = time.strftime("%Y%m%d_%H%M%S")
    folder = work_dir / started
    for number in itertools.count(2):
        try:
            folder.mkdir()
            break
        except FileExistsError:
            folder = work_dir / f"{started}_{number}"
    return folder

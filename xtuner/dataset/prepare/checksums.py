"""Checksums of a folder of files, and a check that is cheap where nothing has changed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from xtuner.utils.lang import tr

CHECKSUMS = "checksums.json"
BLOCK = 1 << 22
SAMPLES, SAMPLE = 16, 1 << 16
"""How many blocks of how many bytes of a file are read where its size and time are as written."""


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files of a folder beside them."""
    sums = {file.name: _record(file) for file in sorted(folder.iterdir()) if file.is_file()}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", "utf-8")


def find_damage(folder: Path, *, whole: bool = False) -> str | None:
    """What is wrong with a folder by its checksums.

    A file whose size and time of change are as they were written is read in samples, which takes
    milliseconds for any size; another one is read whole.

    Args:
        folder: with ``checksums.json``.
        whole: read every file whole.

    Returns:
        None where all is well, or the folder has no checksums.
    """
    try:
        sums = json.loads((folder / CHECKSUMS).read_text("utf-8"))
        wrong = [name for name, known in sums.items() if _differs(folder / name, known, whole)]
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        return None if missing == CHECKSUMS else tr("{name} is missing", name=missing)
    except (ValueError, AttributeError, KeyError, TypeError):
        return tr("{name} differs", name=CHECKSUMS)
    return tr("{name} differs", name=wrong[0]) if wrong else None


def _record(file: Path) -> dict[str, Any]:
    state = file.stat()
    return {
        "size": state.st_size,
        "mtime_ns": state.st_mtime_ns,
        "sha256": _whole(file),
        "samples": _samples(file),
    }


def _differs(file: Path, known: dict[str, Any], whole: bool) -> bool:
    state = file.stat()
    if state.st_size != known["size"]:
        return True
    if whole or state.st_mtime_ns != known["mtime_ns"]:
        return _whole(file) != known["sha256"]
    return _samples(file) != known["samples"]


def _whole(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _samples(file: Path) -> str:
    """The digest of evenly spread blocks, the first and the last among them."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        last = max(0, stream.seek(0, os.SEEK_END) - SAMPLE)
        for number in range(SAMPLES):
            stream.seek(last * number // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE))
    return digest.hexdigest()

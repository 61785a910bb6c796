"""The manifest beside a checkpoint: sizes and checksums that tell a whole one from a damaged one.

``iter_4.pth`` (a file, or a folder from DeepSpeed or FSDP) has its manifest in ``iter_4.pth.json``.
A checkpoint is good when it is there and agrees with its manifest, or has no manifest (written by
XTuner v0.1, or the run was killed in the moment between the two renames), or one that is damaged or
of other files, and passes a load test.
Both are renamed into place only after they are flushed to disk, the manifest last.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xtuner.utils.files import write_text
from xtuner.utils.lang import tr
from xtuner.version import __version__

FORMAT = 1
CHUNK = 1 << 22


def manifest_path(checkpoint: Path) -> Path:
    """Where the manifest of a checkpoint is."""
    return checkpoint.with_name(checkpoint.name + ".json")


def write_manifest(
    checkpoint: Path,
    meta: Mapping[str, Any],
    digests: Mapping[str, str] | None = None,
) -> None:
    """Write the manifest beside a checkpoint.

    Args:
        checkpoint: the file or folder.
        meta: what else to note, such as ``iter`` and ``epoch``.
        digests: the SHA-256 of each file, where known already (path relative to the checkpoint's
            parent); the others are read and hashed.
    """
    known = digests or {}
    files = {}
    for file in _files(checkpoint):
        name = file.relative_to(checkpoint.parent).as_posix()
        files[name] = {"size": file.stat().st_size, "sha256": known.get(name) or sha256(file)}
    manifest = {
        "format": FORMAT,
        "xtuner": __version__,
        "saved_at": time.time(),
        **meta,
        "files": files,
    }
    write_text(manifest_path(checkpoint), json.dumps(manifest, indent=1) + "\n")


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """Read the manifest of a checkpoint; None when it has none.

    Raises:
        ValueError: when there is one that cannot be read, is damaged, or is of other files.
    """
    path = manifest_path(checkpoint)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError("it is no manifest")
    files: dict[str, Any] = manifest["files"]
    if not all(map(_is_entry, files.values())):
        raise ValueError("it lacks sizes or checksums")
    own = {file.relative_to(checkpoint.parent).as_posix() for file in _files(checkpoint)}
    beginning = f"{checkpoint.name}/" if checkpoint.is_dir() else checkpoint.name
    if own - files.keys() or not all(name.startswith(beginning) for name in files):
        raise ValueError("it does not list the files of this checkpoint")
    return manifest


def _is_entry(entry: object) -> bool:
    """Whether this is what a manifest says of a file."""
    if not isinstance(entry, dict):
        return False
    return isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)


def saved_at(checkpoint: Path) -> float:
    """When a checkpoint was written, by its manifest or else by the file system."""
    return _number(checkpoint, "saved_at", checkpoint.lstat().st_mtime)


def iterations_of(checkpoint: Path) -> int:
    """Micro-batches that were done, by its manifest or its name (``iter_4.pth``); -1 if unknown."""
    kind, _, number = checkpoint.stem.rpartition("_")
    named = int(number) if kind == "iter" and number.isdigit() else -1
    return int(_number(checkpoint, "iter", named))


def _number(checkpoint: Path, key: str, default: float) -> float:
    try:
        value = (read_manifest(checkpoint) or {}).get(key)
    except ValueError:
        return default
    return value if isinstance(value, int | float) and math.isfinite(value) else default


def find_mismatch(
    checkpoint: Path, manifest: Mapping[str, Any], *, rank: int = 0, world_size: int = 1
) -> str | None:
    """Compare a checkpoint with its manifest.

    Args:
        checkpoint: the file or folder.
        manifest: from ``read_manifest``.
        rank: of ``world_size`` processes that share the work, this one's number. Each looks at the
            sizes of all files and hashes its share of them.
        world_size: how many processes share the work.

    Returns:
        None when they agree, else what is wrong.
    """
    files: Mapping[str, Mapping[str, Any]] = manifest["files"]
    for name, expected in files.items():
        file = checkpoint.parent / name
        if not file.is_file():
            return tr("the file {name} is missing", name=name)
        size = file.stat().st_size
        if size != expected["size"]:
            return tr(
                "{name} has {size:,} bytes, its manifest says {expected_size:,}",
                name=name,
                size=size,
                expected_size=expected["size"],
            )
    by_size = sorted(files, key=lambda name: files[name]["size"], reverse=True)
    for name in by_size[rank::world_size]:
        if sha256(checkpoint.parent / name) != files[name]["sha256"]:
            return tr(
                "the content of {name} has changed (its checksum is not the manifest's)", name=name
            )
    return None


def sha256(file: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _files(checkpoint: Path) -> list[Path]:
    if checkpoint.is_dir():
        return sorted(file for file in checkpoint.rglob("*") if file.is_file())
    return [checkpoint]

"""Sizes of image files by their headers, remembered between runs."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from xtuner.dataset.images import READERS, Size, read_size
from xtuner.dataset.prepare.cache import cache_folder

logger = logging.getLogger(__name__)
FILE = "image_sizes.sqlite"
AT_ONCE = 900
"""Paths of one question to the database."""
SECONDS = 60
"""How long another process may hold the database."""


@dataclass(frozen=True)
class Measured:
    """A file's size in pixels, and the state of the file in which it was read."""

    changed: int
    count: int
    size: Size


def measure_files(
    files: Iterable[Path],
) -> tuple[dict[Path, Size], dict[Path, str], dict[Path, Measured]]:
    """The sizes of image files, read from their headers where the cache does not know them.

    Args:
        files: in any order.

    Returns:
        The sizes; for the other files what is wrong with them; what the cache did not know.
    """
    files = list(dict.fromkeys(files))
    known = _known(files)
    with ThreadPoolExecutor(READERS) as pool:
        found = dict(zip(files, pool.map(_measure, files, map(known.get, files)), strict=True))
    sizes = {file: each.size for file, each in found.items() if isinstance(each, Measured)}
    problems = {file: each for file, each in found.items() if isinstance(each, str)}
    new = {
        file: each
        for file, each in found.items()
        if isinstance(each, Measured) and known.get(file) != each
    }
    return sizes, problems, new


def remember(measured: Mapping[Path, Measured]) -> None:
    """Write sizes to the cache; where that fails they are read again the next time."""
    if not measured:
        return
    rows = [(str(file), m.changed, m.count, *m.size) for file, m in measured.items()]
    file = cache_folder() / FILE
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _opened(file) as database, database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS sizes (path TEXT PRIMARY KEY, changed INTEGER, "
                "bytes INTEGER, width INTEGER, height INTEGER) WITHOUT ROWID"
            )
            database.executemany("INSERT OR REPLACE INTO sizes VALUES (?, ?, ?, ?, ?)", rows)
    except (sqlite3.Error, OSError, UnicodeEncodeError) as error:
        logger.debug("%s: %s", file, error)
        if type(error) is sqlite3.DatabaseError:  # it is no database, or a damaged one
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(file, timeout=SECONDS)) as database:
        yield database


def _known(files: Iterable[Path]) -> dict[Path, Measured]:
    """What the cache has of some files."""
    file = cache_folder() / FILE
    known: dict[Path, Measured] = {}
    if not file.exists():
        return known
    try:
        with _opened(file) as database:
            paths_left = list(map(str, files))
            while paths_left:
                paths, paths_left = paths_left[:AT_ONCE], paths_left[AT_ONCE:]
                marks = ", ".join("?" * len(paths))
                question = f"SELECT * FROM sizes WHERE path IN ({marks})"
                for path, changed, count, width, height in database.execute(question, paths):
                    known[Path(path)] = Measured(changed, count, (width, height))
    except (sqlite3.Error, UnicodeEncodeError) as error:
        logger.debug("%s: %s", file, error)
    return known


def _measure(file: Path, known: Measured | None) -> Measured | str:
    """A file's size, from its header where it is not as the cache has it; or what is wrong."""
    try:
        state = file.stat()
        if known and (known.changed, known.count) == (state.st_mtime_ns, state.st_size):
            return known
        return Measured(state.st_mtime_ns, state.st_size, read_size(file))
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        return getattr(error, "strerror", None) or str(error)

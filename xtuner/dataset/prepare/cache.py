"""The cache of prepared datasets: named by what they depend on, made once a machine."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import inspect
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from xtuner.dataset.prepare.checksums import find_damage, write_checksums
from xtuner.utils.environment import dataset_timeout
from xtuner.utils.errors import UserError, Where
from xtuner.utils.files import written_aside
from xtuner.utils.lang import tr
from xtuner.utils.types import Tokenizer
from xtuner.version import __version__

if TYPE_CHECKING:
    from datasets import Dataset


_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def content_key(
    rows: Dataset,
    tokenizer: Tokenizer,
    functions: Sequence[Callable[..., Any] | None],
    settings: object,
    modules: Sequence[ModuleType],
) -> str:
    """What a prepared dataset depends on, as one name.

    Args:
        rows: the ``datasets.Dataset`` it is made of.
        tokenizer: of transformers.
        functions: what is called for each row.
        settings: all else, as plain values.
        modules: our own code that makes it.
    """
    parts = [
        __version__,
        str(rows._fingerprint),
        _tokenizer_text(tokenizer),
        *(_function_text(function) for function in functions),
        json.dumps(settings, sort_keys=True),
        *(inspect.getsource(module) for module in modules),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def cache_folder() -> Path:
    """The folder of the prepared datasets: ``XTUNER_CACHE``, else the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("XTUNER_CACHE") or Path(base) / "xtuner") / "datasets"


def _tokenizer_text(tokenizer: Tokenizer) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = (
        backend.to_str()
        if backend is not None
        else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    return f"{vocabulary}{tokenizer.special_tokens_map}{tokenizer.chat_template}"


def _function_text(function: Callable[..., Any] | None) -> str:
    """What a row function depends on: its module's source, and what it holds.

    The source of the function alone is not enough: two closures or partials of one function, or a
    constant beside it that was edited, would get each other's rows from the cache.
    """
    from datasets.fingerprint import Hasher

    if function is None:
        return ""
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    module = inspect.getmodule(inner if inspect.isroutine(inner) else type(inner))
    try:
        source = inspect.getsource(module) if module else ""
    except (OSError, TypeError):
        source = ""
    return f"{source}{Hasher.hash(function)}"


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Without the progress bars of datasets: ours tells how far the preparation is."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def prepared_once(key: str, write: Callable[[Path], None]) -> Dataset:
    """Map the prepared dataset from the cache; the first process of the machine prepares it.

    A damaged entry is made again, and that is said.

    Args:
        key: of ``content_key``.
        write: makes the dataset and writes it to a folder, as ``save_to_disk`` does.

    Raises:
        UserError: when another process does not finish in ``XTUNER_DATASET_TIMEOUT`` minutes, or
            the cache cannot be written.
    """
    import filelock

    home = cache_folder() / key
    minutes = dataset_timeout()
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{home}.lock", timeout=minutes * 60):
            found = _loaded(home)
            if found is not None:
                return found
            with written_aside(home) as aside, _without_bars():
                write(aside)
                write_checksums(aside)
    except filelock.Timeout as error:
        raise UserError(
            tr(
                "another process has been preparing this dataset for {minutes:g} minutes",
                minutes=minutes,
            ),
            hint=tr(
                "set XTUNER_DATASET_TIMEOUT (minutes) higher, or prepare ahead with "
                "'xtuner preprocess sft'."
            ),
        ) from error
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise UserError(
            tr("the cache of prepared data cannot be written: {why}", why=error.strerror),
            hint=tr("XTUNER_CACHE=/another/folder, or make room with 'xtuner cache prune'."),
            where=Where(str(home.parent)),
        ) from error
    found = _loaded(home)
    assert found is not None
    return found


def find(key: str) -> Dataset | None:
    """A prepared dataset that is in the cache and not damaged; None for any other.

    Args:
        key: of ``content_key``.
    """
    home = cache_folder() / key
    return _loaded(home) if home.exists() and find_damage(home) is None else None


def _loaded(home: Path) -> Dataset | None:
    """An entry of the cache; None where there is none, or it was damaged and is removed."""
    from datasets import load_from_disk

    if not home.exists():
        return None
    damage = find_damage(home) if os.environ.get("LOCAL_RANK", "0") == "0" else None
    if damage is None:
        try:
            dataset = load_from_disk(str(home))
        except (OSError, ValueError, KeyError) as error:  # an entry without checksums
            damage = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            with contextlib.suppress(OSError):  # when it was used last
                os.utime(home)
            return dataset
    print(
        tr(
            "{home}: this cached dataset is damaged ({damage}); made again",
            home=home,
            damage=damage,
        ),
        file=sys.stderr,
    )
    shutil.rmtree(home)
    return None


@dataclass(frozen=True)
class Entry:
    """A prepared dataset in the cache: its folder, bytes, and the days since its last use."""

    folder: Path
    size: int
    days: float


def entries() -> list[Entry]:
    """What the cache holds, the least recently used first."""
    home = cache_folder()
    folders = [each for each in home.iterdir() if each.is_dir()] if home.is_dir() else []
    found = [
        Entry(
            folder,
            sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            (time.time() - folder.stat().st_mtime) / 86400,
        )
        for folder in folders
    ]
    return sorted(found, key=lambda entry: -entry.days)


def remove(entry: Entry) -> bool:
    """Delete an entry; gives False where a process is preparing it."""
    import filelock

    lock = filelock.FileLock(f"{entry.folder}.lock", timeout=0)
    try:
        with lock:
            shutil.rmtree(entry.folder)
    except filelock.Timeout:
        return False
    return True

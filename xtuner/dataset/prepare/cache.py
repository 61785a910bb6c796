"""The cache of prepared datasets: named by what they depend on, made once a machine."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from xtuner.utils.environment import dataset_timeout
from xtuner.utils.errors import UserError
from xtuner.utils.files import written_aside
from xtuner.utils.lang import tr
from xtuner.utils.types import Tokenizer
from xtuner.version import __version__

if TYPE_CHECKING:
    from datasets import Dataset


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


def _home() -> Path:
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

    Args:
        key: of ``content_key``.
        write: makes the dataset and writes it to a folder, as ``save_to_disk`` does.

    Raises:
        UserError: when another process does not finish in ``XTUNER_DATASET_TIMEOUT`` minutes.
    """
    import filelock
    from datasets import load_from_disk

    home = _home() / key
    minutes = dataset_timeout()
    home.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(f"{home}.lock", timeout=minutes * 60):
            if not home.exists():
                with written_aside(home) as aside, _without_bars():
                    write(aside)
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
    return load_from_disk(str(home))

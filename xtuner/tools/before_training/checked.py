"""What ``prove`` and ``rehearse`` begin with: a checked config, a folder for what they write."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from xtuner.config.document import ConfigDocument


def loaded_document(config: str, options: Sequence[str]) -> ConfigDocument:
    """Load a config, apply overrides, and call its ``before_run``.

    Args:
        config: name or path.
        options: the words of ``--cfg-options``.

    Raises:
        UserError: when it cannot be loaded.
    """
    from xtuner.config.load import load
    from xtuner.config.override import override
    from xtuner.tools.train_dataset import call_before_run

    document = override(load(config), options)
    call_before_run(document.config)  # which may make the model's folder
    return document


def checked_document(config: str, options: Sequence[str]) -> ConfigDocument:
    """Load a config, apply overrides, check it, and call its ``before_run``.

    Args:
        config: name or path.
        options: the words of ``--cfg-options``.

    Raises:
        UserError: for everything that a user can fix.
    """
    from xtuner.config.check.checker import check_or_raise
    from xtuner.config.check.data_files import require_data_files
    from xtuner.config.check.problem import Context

    document = loaded_document(config, options)
    check_or_raise(document)
    require_data_files(Context(document), document.file)
    return document


@contextlib.contextmanager
def output_folder(keep: str | None, *, cache: bool = True) -> Iterator[Path]:
    """A folder for what a command writes, and for the data that it prepares.

    Args:
        keep: a folder that does not exist yet and stays; None for one that is removed.
        cache: whether prepared data go into it, and not into the user's cache.

    Raises:
        UserError: when ``keep`` exists.
    """
    with contextlib.ExitStack() as held:
        if keep is None:
            folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="xtuner_")))
        else:
            folder = Path(keep).resolve()
            if folder.exists():
                raise UserError(
                    tr("this folder is there already."),
                    hint=tr("give another name to --keep"),
                    where=Where(str(folder)),
                )
            folder.mkdir(parents=True)
        if cache:
            held.enter_context(_environment(XTUNER_CACHE=str(folder / "cache")))
        yield folder


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

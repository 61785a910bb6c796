"""Finding all problems of a config at once, without building or downloading anything.

A rule is a small generator that is registered with its code, in ``calls.py`` (XT01xx: names and
calls), ``sections.py`` (XT02xx: sections), ``values.py`` or ``training.py`` (XT03xx: values and
combinations of them).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from mmengine.config import Config

from xtuner.config.check import (  # noqa: F401 (they register)
    calls,
    data_files,
    datasets,
    packages,
    registered,
    resources,
    sections,
    training,
    values,
)
from xtuner.config.check.code import ERROR, NOT_FOUND, NOT_LOADED, WARNING, Code
from xtuner.config.check.problem import RULES, Context, Problem
from xtuner.config.document import ConfigDocument, document_of
from xtuner.config.load import DATA_FORMATS, load, load_source, load_text, read_source
from xtuner.config.override import override
from xtuner.config.source import ConfigSource
from xtuner.config.undefined import Undefined, undefined_names, with_meant_names
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

SAID_BY_THE_RUN = ("XT0317", "XT0342", "XT0343")
"""Warnings that a run itself says, by what it then knows for certain."""


def codes() -> list[Code]:
    """All codes of problems, in order."""
    return [NOT_LOADED, NOT_FOUND, *(RULES[code] for code in sorted(RULES))]


def check(config: str | os.PathLike[str] | Config, options: Sequence[str] = ()) -> list[Problem]:
    """Find all problems of a config.

    Args:
        config: a path, a name of the catalogue, or a loaded config.
        options: ``--cfg-options`` words, for a path or a name.

    Returns:
        The problems, by line. A config that cannot be loaded has one problem, or one for each
        name that it does not define.
    """
    if isinstance(config, Config):
        return check_document(document_of(config))
    try:
        if str(config).endswith(DATA_FORMATS):
            document = load(config)
        else:
            source = read_source(config)
            undefined = undefined_names(source)
            if undefined:
                return _undefined(source, undefined)
            document = load_text(source)
        document = override(document, options)
    except UserError as error:
        where = error.where or Where(os.fspath(config))
        code = (NOT_LOADED if where.line else NOT_FOUND).code
        return [Problem(code, ERROR, where, 1 if where.line else None, error.message, error.hint)]
    return check_document(document)


def check_document(document: ConfigDocument) -> list[Problem]:
    """Find all problems of a loaded config, by line; the same place and message only once."""
    context = Context(document)
    problems: dict[tuple[object, ...], Problem] = {}
    for each in RULES.values():
        for finding in each.find(context):
            line, column = context.place(finding.key, finding.at_key) or (None, None)
            where = Where(document.file, line, finding.key)
            problem = Problem(
                each.code, each.severity, where, column, finding.message, finding.hint
            )
            problems.setdefault((each.code, line, column, finding.message), problem)
    return sorted(problems.values(), key=lambda p: (p.where.line or 0, p.column or 0, p.code))


def check_or_raise(document: ConfigDocument) -> None:
    """Check a loaded config before a run: warnings are printed, errors stop it.

    Raises:
        UserError: when sections are missing without which there is no run, or listing every error.
    """
    _require_sections(document)
    problems = check_document(document)
    for problem in problems:
        if problem.severity == WARNING and problem.code not in SAID_BY_THE_RUN:
            print(problem, file=sys.stderr)
    errors = [problem for problem in problems if problem.severity == ERROR]
    if errors:
        listed = "\n".join(str(problem) for problem in errors)
        raise UserError(
            tr("the config has {count} error(s):\n{listed}", count=len(errors), listed=listed),
            hint=tr("fix these lines and start again."),
        )


def _require_sections(document: ConfigDocument) -> None:
    """Refuse a config without the sections that every run needs, all at once."""
    if document.values.get("framework") == "huggingface":
        needed = ("model", "train_dataset", "trainer", "training_args")
    else:
        needed = ("model", "train_dataloader", "optim_wrapper", "train_cfg")
    missing = [key for key in needed if document.values.get(key) is None]
    if missing:
        raise UserError(
            tr("this config sets no {missing}.", missing=", ".join(missing)),
            hint=tr("'xtuner list-cfg' shows whole configs; 'xtuner copy-cfg NAME .' copies one."),
            where=Where(document.file),
        )


def _undefined(source: ConfigSource, found: list[Undefined]) -> list[Problem]:
    """The names that are not defined, and the problems of the text with the meant ones instead."""
    problems = [
        Problem(
            NOT_LOADED.code,
            ERROR,
            Where(source.file, use.node.lineno),
            use.node.col_offset + 1,
            tr("{name!r} is not defined", name=use.node.id),
            tr("did you mean {meant!r}?", meant=use.meant) if use.meant else None,
        )
        for use in found
    ]
    fixed = with_meant_names(source, found)
    if fixed is not None:
        with contextlib.suppress(UserError):
            config = load_source(fixed)
            problems += check_document(ConfigDocument(fixed, config, source, config))
    return sorted(problems, key=lambda problem: problem.where.line or 0)

"""Finding all problems of a config at once, without building or downloading anything.

A rule is a small generator, registered with its code in ``calls.py`` (XT01xx: names and calls),
``sections.py`` (XT02xx: sections), ``values.py`` or ``training.py`` (XT03xx: values and how they
fit together).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config

from xtuner.config.check import calls, sections, training, values  # noqa: F401 (they register)
from xtuner.config.check.names import Undefined, undefined_names, with_meant_names
from xtuner.config.check.problem import ERROR, RULES, WARNING, Context, Problem
from xtuner.config.load import load_source, override, read_source
from xtuner.config.source import Source
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr


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
        text = config._text if str(config.filename or "").endswith(".py") else ""
        return _problems(Context(config, Source(text, config.filename or "config")))
    try:
        source = read_source(config)
        undefined = undefined_names(source)
        if undefined:
            return _undefined(source, undefined)
        cfg = load_source(source)
        if options:
            source, cfg = override(source, cfg, options)
    except UserError as error:
        where = error.where or Where(os.fspath(config))
        code = "XT0001" if where.line else "XT0002"
        return [Problem(code, ERROR, where, 1 if where.line else None, error.message, error.hint)]
    return _problems(Context(cfg, source))


def _undefined(source: Source, found: list[Undefined]) -> list[Problem]:
    """The names that are not defined, and what else is wrong if the meant ones are put there."""
    problems = [
        Problem(
            "XT0001",
            ERROR,
            Where(source.file, use.node.lineno),
            use.node.col_offset + 1,
            tr("{name!r} is not defined", name=use.node.id),
            tr("did you mean {meant!r}?", meant=use.meant) if use.meant else None,
        )
        for use in found
    ]
    mended = with_meant_names(source, found)
    if mended is not None:
        with contextlib.suppress(UserError):
            problems += _problems(Context(load_source(mended), mended))
    return sorted(problems, key=lambda problem: problem.where.line or 0)


def _problems(context: Context) -> list[Problem]:
    problems: dict[tuple[Any, ...], Problem] = {}
    for each in RULES.values():
        for finding in each.find(context):
            line, column = context.place(finding.key, finding.at_key) or (None, None)
            where = Where(context.source.file, line, finding.key)
            problem = Problem(
                each.code, each.severity, where, column, finding.message, finding.hint
            )
            problems.setdefault((each.code, line, column, finding.message), problem)
    return sorted(problems.values(), key=lambda p: (p.where.line or 0, p.column or 0, p.code))


def check_or_raise(config: Config) -> None:
    """Check a loaded config before a run: warnings are printed, errors stop it.

    Raises:
        UserError: listing every error.
    """
    problems = check(config)
    for problem in problems:
        if problem.severity == WARNING:
            print(problem, file=sys.stderr)
    errors = [problem for problem in problems if problem.severity == ERROR]
    if errors:
        listed = "\n".join(str(problem) for problem in errors)
        raise UserError(
            tr("the config has {count} error(s):\n{listed}", count=len(errors), listed=listed),
            hint=tr("mend these lines and start again."),
        )

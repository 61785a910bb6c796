"""Finding all mistakes of a config at once, without building or downloading anything.

A rule is one small generator, registered with its code in ``check_calls.py`` (XT01xx: names and
calls), ``check_sections.py`` (XT02xx: sections) or ``check_values.py`` and ``check_training.py``
(XT03xx: values and how they fit together).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject

from xtuner.engine.check_names import Undefined, undefined_names, with_meant_names
from xtuner.engine.config_dump import dotted_name, own_values
from xtuner.engine.config_load import load_source, override, read_source
from xtuner.engine.config_source import Source, value_at
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Problem:
    """One mistake: a code such as ``XT0302``, how bad it is, where, what, and what to do."""

    code: str
    severity: str
    where: Where
    column: int | None
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        place = f"{self.where.file}:{self.where.line or 1}:{self.column or 1}"
        key = f" [{self.where.key}]" if self.where.key else ""
        hint = f"\n    {self.hint}" if self.hint else ""
        severity = tr(self.severity, "错误" if self.severity == ERROR else "警告")
        return f"{place}: {severity} {self.code}: {self.message}{key}{hint}"

    def as_json(self) -> dict[str, Any]:
        """Flat, for editors and CI."""
        place = asdict(self.where)
        return {
            "code": self.code,
            "severity": self.severity,
            **place,
            "column": self.column,
            "message": self.message,
            "hint": self.hint,
        }


@dataclass(frozen=True)
class Finding:
    """What a rule yields: the key at fault, what is wrong with it, and what to do.

    ``at_key`` says that the key itself is wrong, not its value, which may be written elsewhere.
    """

    key: str
    message: str
    hint: str | None = None
    at_key: bool = False


class Context:
    """A config as rules see it: values by dotted key, imported names by what they are called."""

    def __init__(self, cfg: Config, source: Source) -> None:
        self.source = source
        self.values = own_values(cfg)
        self._dicts = [pair for key, value in self.values.items() for pair in _dicts(key, value)]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key; imported names stay lazy."""
        try:
            return value_at(self.values, key.split("."))
        except KeyError:
            return default

    def kind(self, key: str) -> str:
        """The last word of what ``type`` names at a key, '' if there is none."""
        return name_of(self.get(f"{key}.type"))

    def typed(self, *kinds: str) -> Iterator[str]:
        """The keys of all dicts whose ``type`` is one of these, each shared dict once."""
        seen = set()
        for key, value in self.dicts():
            if name_of(dict.get(value, "type")) in kinds:
                place = self.place(key)
                if place is None or place not in seen:
                    seen.add(place)
                    yield key

    def dicts(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """All dicts inside the sections, with their keys."""
        return iter(self._dicts)

    def place(self, key: str, at_key: bool = False) -> tuple[int, int] | None:
        """Line and column of where a key's value is written, or of the key itself."""
        path = key.split(".")
        return self.source.key_place(path) if at_key else self.source.place(path)


def _dicts(key: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield key, value
        for name in dict.keys(value):
            yield from _dicts(f"{key}.{name}", dict.__getitem__(value, name))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _dicts(f"{key}.{number}", item)


def name_of(kind: Any) -> str:
    """What an imported name, a class or a registered name is called, without its module."""
    if isinstance(kind, str):
        return kind.rpartition(".")[2]
    named = dotted_name(kind) if kind is not None else None
    return ".".join(part for part in named[1:] if part) if named else ""


def imported_at(value: Any) -> bool:
    """Whether a value is an imported name."""
    return isinstance(value, LazyAttr | LazyObject)


RuleFunction = Callable[[Context], Iterator[Finding]]


@dataclass(frozen=True)
class Rule:
    """A rule with its code and what it means for the run."""

    code: str
    severity: str
    find: RuleFunction


RULES: dict[str, Rule] = {}


def rule(code: str, severity: str) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule under its code."""

    def register(function: RuleFunction) -> RuleFunction:
        assert code not in RULES, f"{code} is taken"
        RULES[code] = Rule(code, severity, function)
        return function

    return register


def _load_rules() -> None:
    from xtuner.engine import (  # noqa: F401
        check_calls,
        check_sections,
        check_training,
        check_values,
    )


def check(config: str | os.PathLike[str] | Config, options: Sequence[str] = ()) -> list[Problem]:
    """Find all problems of a config.

    Args:
        config: a path, a name of the catalogue, or a loaded config.
        options: ``--cfg-options`` words, for a path or a name.

    Returns:
        The problems, by line. A config that cannot be loaded has one problem, or one for each
        name that it does not define.
    """
    _load_rules()
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
            tr(f"{use.node.id!r} is not defined", f"{use.node.id!r} 没有定义"),
            tr(f"did you mean {use.meant!r}?", f"是不是 {use.meant!r}？") if use.meant else None,
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
            tr(
                f"the config has {len(errors)} error(s):\n{listed}",
                f"配置里有 {len(errors)} 个错误：\n{listed}",
            ),
            hint=tr("mend these lines and start again.", "请修改这些行后重新开始。"),
        )

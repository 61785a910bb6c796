"""Published arguments that today's libraries no longer take, and what replaces them.

Configs written for v0.1.23 keep loading unchanged; ``adapt_published`` replaces these arguments
before a run. The table is complete: one row for each argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config
from mmengine.config.lazy import LazyObject

from xtuner.config.values import iter_dicts, last_name, own_values
from xtuner.utils.lang import tr


@dataclass(frozen=True)
class DeprecatedArgument:
    """A keyword that callables of one name no longer take.

    Attributes:
        callee: the last part of the callable's name, for example ``load_dataset``.
        old: the published keyword.
        new: given the old value, the keywords that replace it.
        since: the release without it; '' where only the keyword has another name.
    """

    callee: str
    old: str
    new: Callable[[Any], dict[str, Any]]
    since: str


def _verification(ignored: object) -> dict[str, Any]:
    return {"verification_mode": "no_checks" if ignored else "basic_checks"}


def _quantization(argument: str) -> Callable[[object], dict[str, Any]]:
    def replacement(wanted: object) -> dict[str, Any]:
        if not wanted:
            return {}
        kind = LazyObject("transformers", "BitsAndBytesConfig")
        return {"quantization_config": {"type": kind, argument: True}}

    return replacement


DEPRECATED = (
    DeprecatedArgument("from_pretrained", "torch_dtype", lambda dtype: {"dtype": dtype}, ""),
    *(
        DeprecatedArgument("from_pretrained", name, _quantization(name), "transformers 5")
        for name in ("load_in_8bit", "load_in_4bit")
    ),
    DeprecatedArgument("load_dataset", "ignore_verifications", _verification, "datasets 3"),
    DeprecatedArgument("load_dataset", "trust_remote_code", lambda _: {}, "datasets 4"),
)


def _deprecated(kind: object) -> Iterator[DeprecatedArgument]:
    name = "" if isinstance(kind, str) else last_name(kind)
    yield from (argument for argument in DEPRECATED if argument.callee == name)


def adapted_keys(kind: object) -> set[str]:
    """The published keywords of a callable that are replaced before it is called."""
    return {argument.old for argument in _deprecated(kind)}


def adapt_published(config: Config) -> list[str]:
    """Replace published arguments by today's, in place.

    Returns:
        What was changed, a sentence each.
    """
    found = [
        (holder, argument)
        for key, value in own_values(config).items()
        for _, holder in iter_dicts(value, key)
        for argument in _deprecated(dict.get(holder, "type"))
        if argument.old in holder
    ]
    for holder, argument in found:
        _replace(holder, argument)
    return list(dict.fromkeys(_note(argument) for _, argument in found if argument.since))


def _replace(holder: dict[str, Any], argument: DeprecatedArgument) -> None:
    if argument.old not in holder:  # the same dict at two keys
        return
    old = dict.pop(holder, argument.old)
    for key, value in argument.new(old).items():
        if key not in holder:
            holder[key] = value


def _note(argument: DeprecatedArgument) -> str:
    return tr(
        "{callee}({old}=...) was replaced by its form of today ({why})",
        callee=argument.callee,
        old=argument.old,
        why=argument.since,
    )

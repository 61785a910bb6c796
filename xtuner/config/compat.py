"""Published spellings that today's libraries no longer take, and what they became.

Configs written for v0.1.23 keep loading unchanged; ``adapt_published`` turns these spellings into
today's before a run. The table is the whole of it: one row a spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config
from mmengine.config.lazy import LazyObject

from xtuner.config.dump import dotted_name, own_values
from xtuner.utils.lang import tr


@dataclass(frozen=True)
class DeprecatedArgument:
    """A keyword that callables of one name no longer take.

    Attributes:
        callee: the end of the callable's name, for example ``load_dataset``.
        old: the published keyword.
        new: given the old value, the keywords of today.
        why: for people: what changed; '' where only the keyword has another name.
    """

    callee: str
    old: str
    new: Callable[[Any], dict[str, Any]]
    why: str


def _verification(ignored: Any) -> dict[str, Any]:
    return {"verification_mode": "no_checks" if ignored else "basic_checks"}


def _eight_bits(wanted: Any) -> dict[str, Any]:
    if not wanted:
        return {}
    kind = LazyObject("transformers", "BitsAndBytesConfig")
    return {"quantization_config": {"type": kind, "load_in_8bit": True}}


def _four_bits(wanted: Any) -> dict[str, Any]:
    if not wanted:
        return {}
    kind = LazyObject("transformers", "BitsAndBytesConfig")
    return {"quantization_config": {"type": kind, "load_in_4bit": True}}


SPELLINGS = (
    DeprecatedArgument("from_pretrained", "torch_dtype", lambda dtype: {"dtype": dtype}, ""),
    DeprecatedArgument("from_pretrained", "load_in_8bit", _eight_bits, "transformers 5"),
    DeprecatedArgument("from_pretrained", "load_in_4bit", _four_bits, "transformers 5"),
    DeprecatedArgument("load_dataset", "ignore_verifications", _verification, "datasets 3"),
    DeprecatedArgument("load_dataset", "trust_remote_code", lambda _: {}, "datasets 4"),
)


def _spellings(kind: Any) -> Iterator[DeprecatedArgument]:
    named = dotted_name(kind) if kind is not None else None
    if named:
        last = ".".join(part for part in named if part).rpartition(".")[2]
        yield from (spelling for spelling in SPELLINGS if spelling.callee == last)


def adapted_keys(kind: Any) -> set[str]:
    """The published keywords of a callable that are turned into others before it is called."""
    return {spelling.old for spelling in _spellings(kind)}


def adapt_published(cfg: Config) -> list[str]:
    """Turn published spellings into today's, in place.

    Returns:
        What was changed, a sentence each.
    """
    seen: set[int] = set()
    holders = [holder for value in own_values(cfg).values() for holder in _dicts(value, seen)]
    found = [
        (holder, spelling)
        for holder in holders
        for spelling in _spellings(dict.get(holder, "type"))
        if spelling.old in holder
    ]
    for holder, spelling in found:
        _replace(holder, spelling)
    return list(dict.fromkeys(_sentence(spelling) for _, spelling in found if spelling.why))


def _replace(holder: dict[str, Any], spelling: DeprecatedArgument) -> None:
    old = dict.pop(holder, spelling.old)
    for key, value in spelling.new(old).items():
        if key not in holder:
            holder[key] = value


def _sentence(spelling: DeprecatedArgument) -> str:
    callee, old = spelling.callee, spelling.old
    return tr(
        "{callee}({old}=...) was replaced by its form of today ({why})",
        callee=callee,
        old=old,
        why=spelling.why,
    )


def _dicts(value: Any, seen: set[int]) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict | list | tuple):
        if id(value) in seen:
            return
        seen.add(id(value))
    if isinstance(value, dict):
        yield value
        for key in list(dict.keys(value)):
            if key in value:
                yield from _dicts(dict.__getitem__(value, key), seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _dicts(item, seen)

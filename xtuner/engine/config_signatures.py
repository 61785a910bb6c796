"""What the callables named in a config take, by their real signatures."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Parameters:
    """The keyword parameters of a callable."""

    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    any_keyword: bool = False
    positional_only: Mapping[str, bool] = field(default_factory=dict)

    def takes(self, name: str) -> bool:
        return self.any_keyword or name in self.required or name in self.optional


def parameters_of(kind: Any) -> Parameters | None:
    """The parameters of what ``type=`` names; None when they cannot be known.

    Args:
        kind: a lazy object of mmengine, a callable, or a registered name.
    """
    try:
        target = kind.build() if hasattr(kind, "build") else kind
    except Exception:
        return None
    if not callable(target):
        return None
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return None
    required, optional, any_keyword = set(), set(), False
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            any_keyword = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            (required if parameter.default is parameter.empty else optional).add(name)
    return Parameters(frozenset(required), frozenset(optional), any_keyword)

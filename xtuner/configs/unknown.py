"""The error for a name that no config has, and the names to suggest instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnknownConfig(Exception):
    """No config has this name.

    Attributes:
        name: what was asked for.
        reason: why there is none, in English.
        message: the reason with placeholders, as in the message catalogue.
        values: what the placeholders stand for.
        suggestions: the nearest names that there are.
    """

    def __init__(
        self, name: str, message: str, suggestions: Iterable[str], /, **values: object
    ) -> None:
        self.name = name
        self.message = message
        self.values = values
        self.reason = message.format(**values) if values else message
        self.suggestions = list(suggestions)
        super().__init__(f"there is no config {name!r}: {self.reason}")


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most similar to ``name``: first those that begin with it.

    A name that begins with ``name`` is a better suggestion than a misspelling.
    """
    known = list(known)
    longer = sorted((other for other in known if other.startswith(name)), key=_plainness)
    alike = difflib.get_close_matches(name, known, n=count, cutoff=0.6)
    return list(dict.fromkeys(longer[:count] + alike))[:count]


def _plainness(name: str) -> tuple[bool, int, str]:
    """Order in which longer names are suggested: alpaca first, then the shorter ones."""
    return "_alpaca_e3" not in name, len(name), name

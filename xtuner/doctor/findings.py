"""Findings by kind: how often, and where first. Their size does not grow with the data.

But for rows that are left out: each is counted once, named by the scan, the encoding or both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from xtuner.doctor.rules import ERROR, NOTE, RULES, WARNING, Rule

PLACES = 5
"""How many places of each kind are kept."""


@dataclass(frozen=True)
class Place:
    """Where a mistake is, and its detail in a few words."""

    file: str
    line: int
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass
class Finding:
    """One kind of mistake in the whole dataset."""

    code: str
    count: int = 0
    places: list[Place] = field(default_factory=list)
    paste: str = ""
    """Lines to put into the config, if there are any."""

    @property
    def rule(self) -> Rule:
        return RULES[self.code]


class Findings:
    """All findings, those with the highest level and count first."""

    def __init__(self) -> None:
        self._by_code: dict[str, Finding] = {}
        self._left_out: set[tuple[str, int]] = set()

    def add(self, code: str, place: Place, count: int = 1, paste: str = "") -> None:
        """Note a mistake. ``code`` must be in ``RULES``."""
        assert code in RULES, code
        if code == "left-out":
            row = (place.file, place.line)
            if row in self._left_out:
                return
            self._left_out.add(row)
        finding = self._by_code.setdefault(code, Finding(code))
        finding.count += count
        if len(finding.places) < PLACES:
            finding.places.append(place)
        if paste and paste not in finding.paste:
            finding.paste += paste

    def extend(self, later: Findings) -> None:
        """Note the mistakes of rows that come after those seen so far."""
        self._left_out |= later._left_out
        for code, finding in later._by_code.items():
            known = self._by_code.setdefault(code, Finding(code, paste=finding.paste))
            known.count += finding.count
            known.places += finding.places[: PLACES - len(known.places)]

    def __iter__(self) -> Iterator[Finding]:
        levels = (ERROR, WARNING, NOTE)
        order = sorted(
            self._by_code.values(), key=lambda one: (levels.index(one.rule.level), -one.count)
        )
        return iter(order)

    def __contains__(self, code: str) -> bool:
        return code in self._by_code

    @property
    def has_errors(self) -> bool:
        """Whether something stops or spoils the training."""
        return any(finding.rule.level == ERROR for finding in self)

    @property
    def is_clean(self) -> bool:
        """Whether there is nothing but notes."""
        return all(finding.rule.level == NOTE for finding in self)

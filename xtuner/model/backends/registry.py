"""Backends: implementations of one computation, of which the first that supports the case is used.

A ``Case`` says what is computed and where, a ``Backend`` declares which cases it supports, and
``choose`` takes the first of a list that does and says why the ones before it were passed over.
Nothing here looks at the machine (see ``environment``): every choice can be tested anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from xtuner.model.backends.case import Case
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

Built = TypeVar("Built")


@dataclass(frozen=True)
class Backend(Generic[Built]):
    """One implementation of a computation.

    Args:
        name: how it is called in reports.
        supports: None if it computes a case exactly, otherwise the reason why not.
        build: what computes such a case.
        device: type of the device that it is for; None for all.
    """

    name: str
    supports: Callable[[Case], str | None]
    build: Callable[[Case], Built]
    device: str | None = None


@dataclass(frozen=True)
class Choice(Generic[Built]):
    """The backend chosen for a case.

    Args:
        backend: the first that supports the case.
        case: the case.
        passed_over: those for this device that are listed before it, with the reason of each.
    """

    backend: Backend[Built]
    case: Case
    passed_over: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def reason(self) -> str:
        """Why it is not one of those listed before it; empty for the first."""
        return "; ".join(f"{name}: {why}" for name, why in self.passed_over)

    def build(self) -> Built:
        return self.backend.build(self.case)


def choose(
    backends: Sequence[Backend[Built]],
    case: Case,
    trial: Callable[[Backend[Built], Case], str | None] | None = None,
) -> Choice[Built]:
    """Choose the first backend that supports a case.

    Args:
        backends: the best first.
        case: what is computed.
        trial: tries a backend that supports the case on this machine: None if it works, otherwise
            the reason why not.

    Raises:
        UserError: when there is none.
    """
    passed_over: list[tuple[str, str]] = []
    for backend in backends:
        if backend.device not in (None, case.device):
            continue
        why = backend.supports(case)
        if why is None and trial is not None:
            why = trial(backend, case)
        if why is None:
            return Choice(backend, case, tuple(passed_over))
        passed_over.append((backend.name, why))
    reasons = "; ".join(f"{name}: {why}" for name, why in passed_over)
    raise UserError(tr("nothing here computes this model: {reasons}", reasons=reasons))

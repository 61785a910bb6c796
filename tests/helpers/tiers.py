"""The two tiers of the suite: ``make test`` and ``make test-all``.

A test or a value marked ``slow`` shows for more families, sizes or ways of sharing the work what
a fast one shows already. ``make test`` leaves it out, ``make test-all`` runs it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow(*values: Any, **how: Any) -> Any:
    """``pytest.param`` of a value that only ``make test-all`` takes."""
    return pytest.param(*values, marks=pytest.mark.slow, **how)


def few_fast(values: Iterable[Any], fast: Container[Any]) -> list[Any]:
    """All values as parameters of a test; those that are not in ``fast`` are slow.

    A tuple is several arguments.
    """
    return [
        value if value in fast else slow(*value) if isinstance(value, tuple) else slow(value)
        for value in values
    ]

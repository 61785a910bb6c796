"""Numbers that people set in the environment."""

from __future__ import annotations

import os

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr


def positive(name: str, default: float) -> float:
    """Read a number above 0.

    Args:
        name: of the environment variable.
        default: where it is not set or empty.

    Raises:
        UserError: when it is something else.
    """
    text = os.environ.get(name) or str(default)
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UserError(
            tr("{name}={text} is not a number above 0.", name=name, text=text),
            hint=f"{name}={default:g}",
        )
    return number


def dataset_timeout() -> float:
    """Minutes that a process waits for data which another one prepares."""
    return positive("XTUNER_DATASET_TIMEOUT", 60.0)

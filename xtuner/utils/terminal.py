"""Text of models, data and libraries, made safe to print: it may hold escape codes."""

from __future__ import annotations

_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """A text without control characters, which could move the cursor or change the terminal.

    Args:
        text: any; line breaks and tabs stay.
    """
    return text.translate(_CONTROL)


def visible(text: str, keep: str = "\n\t") -> str:
    """A text whose characters that cannot be printed are written as ``\\u001b``.

    Args:
        text: any.
        keep: characters that stay.
    """
    return "".join(
        char if char.isprintable() or char in keep else f"\\u{ord(char):04x}" for char in text
    )

"""Text for a terminal: safe to print, and aligned where Chinese characters take two columns."""

from __future__ import annotations

import re
import unicodedata

_WIDE = "\u2e80-\u9fff\uff00-\uffef"
_OPENING = "\uff08\u300a\u201c"
_CLOSING = "\uff0c\u3002\uff1b\uff1a\u3001\uff01\uff1f\uff09\u300b\u201d"
_PIECE = re.compile(rf"\s+|[{_OPENING}]*(?:[^\s,{_WIDE}]+,*|,+|[{_WIDE}])[{_CLOSING}]*")
"""What stays on one line: a word, or a Chinese character, with the punctuation that belongs to it.

Brackets and commas are the full-width ones."""
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


def width(text: str) -> int:
    """Columns that a text takes; Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def padded(text: str, columns: int) -> str:
    """A text filled up with spaces to a number of columns."""
    return text + " " * (columns - width(text))


def wrapped(text: str, columns: int) -> list[str]:
    """Lines of at most so many columns, broken between words or Chinese characters."""
    lines = [""]
    for piece in _PIECE.findall(" ".join(text.split())):
        if width(lines[-1] + piece.rstrip()) > columns and lines[-1]:
            lines[-1] = lines[-1].rstrip()
            lines.append("")
        lines[-1] += piece if lines[-1] else piece.lstrip()
    return lines

"""The values of a JSON text one after the other, with their lines: lines, an array, or a sequence.

A value that is broken is reported, and reading continues with the next one. Memory is bounded by
the longest value. Only ``\\n`` ends a line: JSON strings may hold U+2028, U+2029, U+0085 and the
other characters at which ``str.splitlines`` splits.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TextIO

from xtuner.utils.lang import tr

CHUNK = 1 << 18
"""Characters that are read at a time."""
LONGEST = 64 << 20
"""Characters of a value, at most."""
_SPACE = re.compile(r"[ \t\n\r]*")
_BETWEEN = re.compile(r"[ \t\n\r,]*")
_MARGIN = 64
"""A mistake this far before the end of the window does not come from missing text."""
_UNDECODED = re.compile("[\udc80-\udcff]")
_COMMON = frozenset(
    "\u7684\u4e00\u662f\u4e0d\u4e86\u5728\u4eba\u6709\u6211\u4ed6\u4e2d\u4e0a\u5927\u548c"
    "\u5730\u5230\u4ee5\u8981\u5c31\u51fa\u53ef\u4e5f\u4f60\u751f\u80fd\u800c\u5b50\u90a3"
    "\u5f97\u4e0b\u81ea\u4e4b\u5e74\u4f5c"
    "\u8fd9\u4e2a\u4eec\u6765\u4e3a\u56fd\u8bf4\u65f6\u4f1a\u5bf9\u4e8e\u8fc7\u53d1\u540e"
    "\u91cc"
    "\u9019\u500b\u5011\u4f86\u70ba\u570b\u8aaa\u6642\u6703\u5c0d\u65bc\u904e\u767c\u5f8c"
    "\u88e1"
)
"""Frequent characters of Chinese: in both scripts, simplified ones, traditional ones."""
_DECODER = json.JSONDecoder()
_OF_LONG_NUMBERS = json.JSONDecoder(parse_int=float)
"""Reads integers of any number of digits, which ``int`` refuses."""


class Found(NamedTuple):
    """A value and the line on which it begins; or, with ``why``, the line of a mistake."""

    line: int
    value: Any
    why: str = ""


def read_values(
    stream: TextIO, *, field: str | None = None, lines: bool | None = None, is_jsonl: bool = False
) -> Iterator[Found]:
    """Read the values of a JSON text.

    Args:
        stream: can be rewound. Bytes that are not UTF-8 are lone surrogates in it
            (``errors="surrogateescape"``), and its lines end at ``\\n``.
        field: the key that holds the array, where the text is one object.
        lines: whether there is one value a line; None finds out.
        is_jsonl: what the name of the file promises; decides where the text does not.
    """
    if lines is None:
        lines = field is None and has_lines(stream, is_jsonl)
    if lines:
        yield from _read_lines(stream)
    else:
        yield from _read_sequence(_Window(stream), field)


def has_lines(stream: TextIO, is_jsonl: bool) -> bool:
    """Whether there is one value a line, by the beginning of the text."""
    text = stream.read(CHUNK).lstrip(" \t\n\r")
    stream.seek(0)
    first, _, rest = text.partition("\n")
    try:
        _, end = _raw_decode(text, 0)
    except (ValueError, RecursionError):
        if not text.startswith("{"):
            return not text.startswith("[")
        if is_jsonl:  # one broken line, or objects over several lines
            return not rest.strip() or rest.lstrip().startswith("{")
        return first.rstrip().endswith("}")
    if text.startswith("["):
        return end <= len(first) and text[end:].lstrip(" \t\n\r").startswith("[")
    return end <= len(first)


class _Lines:
    """The lines of a stream, some of which may be put back."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.number = 0
        """Of the line that was given last."""
        self._next: list[str] = []

    def take(self) -> str:
        """The next line, or its first ``LONGEST`` characters; empty at the end."""
        line = self._next.pop() if self._next else self.stream.readline(LONGEST)
        self.number += bool(line)
        return line

    def put_back(self, lines: Sequence[str]) -> None:
        self._next += reversed(lines)
        self.number -= len(lines)

    def skip_rest(self) -> None:
        """Skip the rest of a line of more than ``LONGEST`` characters."""
        while (rest := self.stream.readline(CHUNK)) and not rest.endswith("\n"):
            pass


def _is_whole(line: str) -> bool:
    return len(line) < LONGEST or line.endswith("\n")


def _read_lines(stream: TextIO) -> Iterator[Found]:
    lines = _Lines(stream)
    while line := lines.take():
        if not _is_whole(line):
            yield Found(lines.number, None, too_long())
            lines.skip_rest()
        elif not line.isspace():
            yield from _values_of_line(lines, line)


def _values_of_line(lines: _Lines, text: str) -> Iterator[Found]:
    """The value of a line, or several that follow each other on it; the last may end later."""
    number, end = lines.number, 0
    why = encoding_problem(text)
    if why:
        yield Found(number, None, why)
        return
    while end < len(text):
        start = _skipped(text, end)
        is_longer = lines.number > number
        line = number + text.count("\n", 0, start) if is_longer else number
        try:
            value, end = _raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError) as error:
            whole = _with_next_lines(lines, text, start) if _is_cut(error, text) else None
            if whole is None:
                yield Found(line, None, _reason(error))
                return
            text = whole
            continue
        why = encoding_problem(text[start:end]) if is_longer else ""
        yield Found(line, value, why or _surrogate_problem(text, value))
        end = _skipped(text, end)


def _is_cut(error: json.JSONDecodeError | RecursionError, text: str) -> bool:
    """Whether a value lacks nothing but its end; a string does not go on in the next line."""
    if isinstance(error, RecursionError) or error.msg.startswith(("Invalid control", "Untermin")):
        return False
    return not text[error.pos :].strip(" \t\r\n")


def _with_next_lines(lines: _Lines, text: str, start: int) -> str | None:
    """A text with the lines up to the end of the value that begins in it at ``start``.

    Returns:
        None where the next lines do not complete the value; they are put back.
    """
    taken: list[str] = []
    size = len(text)
    while True:
        for _ in range(max(1, len(taken))):  # twice as many each time: decoding takes linear time
            taken.append(lines.take())
            size += len(taken[-1])
            if not taken[-1] or size > LONGEST:
                break
        whole = text + "".join(taken)
        try:
            _, end = _raw_decode(whole, start)
        except (json.JSONDecodeError, RecursionError) as error:
            if taken[-1] and size <= LONGEST and _is_cut(error, whole):
                continue
            lines.put_back([line for line in taken if line])
            return None
        count = whole.count("\n", len(text), end)
        lines.put_back([line for line in taken[count + 1 :] if line])
        return text + "".join(taken[: count + 1])


def _raw_decode(text: str, start: int) -> tuple[Any, int]:
    """The value that begins at a place of a text, and its end."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _OF_LONG_NUMBERS.raw_decode(text, start)


def _skipped(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    assert match is not None  # the pattern matches the empty text
    return match.end()


def encoding_problem(text: str) -> str:
    """What is wrong with a text that was decoded with ``surrogateescape``; empty for nothing."""
    if text.isascii() or not (match := _UNDECODED.search(text)):
        return ""
    name, codec = _east_asian_encoding(text.encode("utf-8", "surrogateescape"))
    if name:
        return tr(
            "this is not UTF-8 but {name}; convert the file: iconv -f {codec} -t UTF-8",
            name=name,
            codec=codec,
        )
    return tr("byte 0x{byte:02x} is not UTF-8", byte=ord(match.group()) - 0xDC00)


def _east_asian_encoding(raw: bytes) -> tuple[str, str]:
    """The name of the encoding that bytes are most likely in, and what iconv calls it.

    Bytes of one encoding are often valid in another, too, as rare characters: kana tell Japanese,
    a longer text of nothing but Hangul tells Korean, common characters tell Chinese.
    """
    texts = {}
    for codec in ("cp932", "cp949", "gb18030", "big5"):
        with contextlib.suppress(UnicodeDecodeError):
            texts[codec] = "".join(char for char in raw.decode(codec) if not char.isascii())
    if re.search("[\u3041-\u30fa]", texts.get("cp932", "")):
        return "Shift-JIS", "CP932"
    letters = [char for char in texts.get("cp949", "") if char.isalpha()]
    if len(letters) >= 10 and all("\uac00" <= char <= "\ud7a3" for char in letters):
        return "EUC-KR", "CP949"
    common = {codec: sum(char in _COMMON for char in text) for codec, text in texts.items()}
    if common.get("big5", 0) > common.get("gb18030", 0):
        return "Big5", "BIG5"
    is_chinese = re.search("[\u4e00-\u9fff]", texts.get("gb18030", ""))
    return ("GBK", "GB18030") if is_chinese else ("", "")


def _surrogate_problem(text: str, value: object) -> str:
    r"""Half of a surrogate pair, written ``\ud83d``, is no character: Arrow refuses it."""
    if "\\ud" not in text and "\\uD" not in text:
        return ""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        return tr("\\u{code:04x} is half of a surrogate pair, not a character", code=code)
    return ""


def _reason(error: json.JSONDecodeError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return tr("lists or objects are nested too deeply")
    if error.doc.startswith("\ufeff", error.pos):
        return tr("a byte order mark (U+FEFF) inside the file; delete it")
    said = tr("{message} (column {column})", message=error.msg, column=error.colno)
    if error.msg.startswith("Invalid control character"):
        return said + tr(
            "; a quotation mark is missing, or a line break inside a text is not written as \\n"
        )
    return f"{said}{_hint_at(error.doc, error.pos)}"


def _hint_at(text: str, place: int) -> str:
    """What is probably wrong where JSON ends, to be added to what the decoder says."""
    here = text[place : place + 40].lower()
    if here.startswith("version https://git-lfs"):
        return tr("; this is a pointer of Git LFS, not the data: git lfs pull")
    if here.startswith(("<!doctype", "<html", "<head")):
        return tr("; this is a web page, not data: download the raw file")
    if here.startswith("\0"):
        return tr("; zero bytes: the file was not written whole")
    if here.startswith("'"):
        return tr("; JSON has double quotes")
    if here.startswith(("//", "#", "/*")):
        return tr("; JSON has no comments")
    if here.strip() == ",":
        return tr("; delete the comma at the end of the line")
    if here.startswith(("]", "}")) and text[:place].rstrip().endswith(","):
        return tr("; delete the comma before it")
    if here.startswith(("true", "false", "none")):
        return tr("; JSON has true, false and null")
    if here.startswith("\\"):
        return tr("; a backslash inside a text is written twice")
    return ""


def too_long() -> str:
    """Why a row of more than ``LONGEST`` characters is not read."""
    return tr("this row is longer than {count:,} characters", count=LONGEST)


class _Window:
    """The part of a stream that is being decoded, from ``start`` on, and the line of its start."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.text, self.start = "", 0
        self.line = 1
        self.ended = False
        self.indent = 0
        """How far the row that is being read is indented."""
        self.is_stuck = False
        """Whether the last value could not be decoded, so that ``start`` is still before it."""

    def more(self) -> bool:
        """Read on; at least doubles the window, so that long values are not decoded too often."""
        left = self.text[self.start :]
        piece = self.stream.read(max(CHUNK, len(left)))
        self.ended = not piece
        self.text, self.start = left + piece, 0
        return bool(piece)

    def advance(self, end: int) -> None:
        """Go on at another place of ``text``."""
        self.line += self.text.count("\n", self.start, end)
        self.start = end

    def skip(self, pattern: re.Pattern[str]) -> str:
        """Skip what matches at the start (never more than there is); gives what was skipped."""
        skipped = ""
        while True:
            match = pattern.match(self.text, self.start)
            assert match is not None  # the patterns match the empty text
            skipped += match.group()
            self.advance(match.end())
            if self.start < len(self.text) or not self.more():
                return skipped

    def at(self, character: str) -> bool:
        return self.text.startswith(character, self.start)

    def decode(self) -> Found:
        """The next value; stays in front of one that is broken."""
        line = self.line
        self.is_stuck = True
        while True:
            try:
                value, end = _raw_decode(self.text, self.start)
            except json.JSONDecodeError as error:
                near_end = error.pos > len(self.text) - _MARGIN
                if (near_end or error.msg.startswith("Unterminated")) and not self.ended:
                    if len(self.text) - self.start >= LONGEST:
                        return Found(line, None, too_long())
                    self.more()
                    continue
                wrong = line + self.text.count("\n", self.start, error.pos)
                return Found(wrong, None, _reason(error))
            except RecursionError as error:
                return Found(line, None, _reason(error))
            if end == len(self.text) and self.more():
                continue  # a number may be longer
            raw = self.text[self.start : end]
            self.advance(end)
            self.is_stuck = False
            return Found(line, value, encoding_problem(raw) or _surrogate_problem(raw, value))

    def skip_broken(self) -> None:
        """Go to the next line that starts an object, ``{`` no deeper than the broken one."""
        next_row = re.compile(rf"\n[ \t]{{0,{self.indent}}}(?=\{{)")
        while not (match := next_row.search(self.text, self.start)):
            # What may be the beginning of a match stays.
            self.advance(max(self.start, len(self.text) - self.indent - 2))
            if not self.more():
                self.advance(len(self.text))
                return
        self.advance(match.end())


def _read_sequence(window: _Window, field: str | None) -> Iterator[Found]:
    """The elements of ``[...]``, or values one after the other."""
    window.skip(_SPACE)
    if field is not None and not _enter(window, field):
        yield Found(window.line, None, tr("this is not an object with {field!r}", field=field))
        return
    inside = window.at("[")
    if inside:
        window.advance(window.start + 1)
    needs_comma = False
    while True:
        line = window.line
        between = window.skip(_BETWEEN)
        if window.start == len(window.text) or (inside and window.at("]")):
            break
        if needs_comma and "," not in between:
            yield Found(line, None, tr("a comma is missing before this row"))
        window.indent = len(between) - between.rfind("\n") - 1 if "\n" in between else 0
        yield window.decode()
        needs_comma = inside and not window.is_stuck
        if window.is_stuck:
            window.skip_broken()
    if inside and not window.at("]"):
        if not window.is_stuck:
            yield Found(window.line, None, tr("the list is not closed by ]"))
    elif inside and field is None:
        window.advance(window.start + 1)
        window.skip(_SPACE)
        if window.start < len(window.text):
            yield Found(window.line, None, tr("there is more text after the end of the list"))


def _enter(window: _Window, field: str) -> bool:
    """Go to the value of a key of the object that the text is."""
    if not window.at("{"):
        return False
    window.advance(window.start + 1)
    while True:
        window.skip(_BETWEEN)
        key = window.decode()
        window.skip(_SPACE)
        if key.why or not isinstance(key.value, str) or not window.at(":"):
            return False
        window.advance(window.start + 1)
        window.skip(_SPACE)
        if key.value == field:
            return True
        if window.decode().why:
            return False

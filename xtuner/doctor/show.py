"""One sample as the model sees it: trained tokens coloured, samples of packed rows marked.

``Shown`` holds the pieces; ``print_sample`` shows them in a terminal, ``sample_html`` in a page.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from xtuner.doctor.pictures import Picture
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.lang import tr
from xtuner.utils.terminal import visible

PACK_BORDER = "─"
TRAINED = "bold green"
UNTRAINED = "dim"
IMAGE = "<image>"
REPEATED = 4
"""Tokens that are alike, one after the other, of which one is shown, with how many there are."""


@dataclass(frozen=True)
class Piece:
    """A span of tokens that are all trained, or all not."""

    text: str
    trained: bool


@dataclass(frozen=True)
class ShownRow:
    """One row of a sample; ``source`` is its ``file:line``, empty when unknown."""

    source: str
    segments: Sequence[Piece]
    tokens: int
    trained: int
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Shown:
    """A sample or pack that can be shown."""

    title: str
    rows: Sequence[ShownRow] = field(default_factory=list)


def show_sample(
    title: str,
    input_ids: Sequence[int],
    labels: Sequence[int],
    decode: Callable[[list[int]], str],
    cu_seqlens: Sequence[int] | None = None,
    sources: Sequence[str] = (),
    pictures: Sequence[Sequence[Picture]] = (),
) -> Shown:
    """Cut a sample into rows and stretches.

    Args:
        title: what to call it.
        input_ids, labels: of equal length.
        decode: turns ids into text without leaving special tokens out.
        cu_seqlens: of a packed row, from 0 to its length; None for a single sample.
        sources: the ``file:line`` of each row, as far as known.
        pictures: of each row, where there are any.
    """
    cu_seqlens = list(cu_seqlens) if cu_seqlens is not None else [0, len(input_ids)]
    rows = []
    for number, (start, stop) in enumerate(itertools.pairwise(cu_seqlens)):
        ids, wanted = input_ids[start:stop], labels[start:stop]
        rows.append(
            ShownRow(
                source=sources[number] if number < len(sources) else "",
                segments=list(_pieces(ids, wanted, decode)),
                tokens=len(ids),
                trained=sum(label != IGNORE_INDEX for label in wanted),
                pictures=pictures[number] if number < len(pictures) else (),
            )
        )
    return Shown(title, rows)


def _pieces(
    ids: Sequence[int], labels: Sequence[int], decode: Callable[[list[int]], str]
) -> list[Piece]:
    segments, start = [], 0
    for index in range(1, len(ids) + 1):
        here = index < len(ids) and labels[index] != IGNORE_INDEX
        if index == len(ids) or here != (labels[start] != IGNORE_INDEX):
            text = decode_tokens(ids[start:index], decode)
            segments.append(Piece(text, labels[start] != IGNORE_INDEX))
            start = index
    return segments


def decode_tokens(ids: Sequence[int], decode: Callable[[list[int]], str]) -> str:
    """Text of ids, where ids below zero (places of images) become ``<image>``.

    Of many equal tokens, as an image has them, one is shown with their number.
    """
    text, known = "", []
    for token, run in itertools.groupby(map(int, ids)):
        count = sum(1 for _ in run)
        if token >= 0 and count < REPEATED:
            known += [token] * count
            continue
        text += decode(known) if known else ""
        text += IMAGE * count if token < 0 else f"{decode([token])}×{count}"
        known = []
    return text + (decode(known) if known else "")


def print_sample(shown: Shown, console: Console) -> None:
    """Show a sample in a terminal; without colours the trained text stands in ``[[ ]]``."""
    console.print(Text(shown.title, style="bold"))
    console.print(_legend(console.no_color or not console.is_terminal))
    for number, row in enumerate(shown.rows):
        if len(shown.rows) > 1 or row.source:
            label = _label(row, number, len(shown.rows))
            console.rule(Text(label, style="cyan"), characters=PACK_BORDER, align="left")
        if row.pictures:
            console.print(_images(row), style="cyan", soft_wrap=True)
        text = Text()
        for piece in row.segments:
            plain = console.no_color or not console.is_terminal
            words = f"[[{piece.text}]]" if piece.trained and plain else piece.text
            text.append(visible(words), style=TRAINED if piece.trained else UNTRAINED)
        console.print(text, soft_wrap=True)
    console.rule(characters=PACK_BORDER, style="cyan")


def _legend(plain: bool) -> Text:
    if plain:
        return Text(tr("[[ ]]: trained"))
    return Text.assemble((tr("trained"), TRAINED), "  ", (tr("not trained"), UNTRAINED))


def _images(row: ShownRow) -> str:
    sizes = ", ".join(map(str, row.pictures))
    videos = sum(bool(each.frames) for each in row.pictures)
    images = len(row.pictures) - videos
    if not videos:
        return tr("{count} images: {sizes}", count=images, sizes=sizes)
    if not images:
        return tr("{count} videos: {sizes}", count=videos, sizes=sizes)
    return tr(
        "{images} images, {videos} videos: {sizes}", images=images, videos=videos, sizes=sizes
    )


def _label(row: ShownRow, number: int, total: int) -> str:
    counts = tr("{tokens} tokens, {trained} trained", tokens=row.tokens, trained=row.trained)
    place = f"{number + 1}/{total} " if total > 1 else ""
    return f"{place}{visible(row.source) + ' · ' if row.source else ''}{counts}"


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c1e21; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
code, pre { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .9em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .6rem .8rem; border-radius: 6px;
  background: #f3f4f6; margin: .3rem 0 1rem; }
.trained { background: #c9f0d3; color: #0b5c26; border-radius: 3px; }
.untrained { color: #6b7280; }
.row { border-top: 2px dashed #7aa7c7; padding-top: .3rem; color: #2b6a8f; font-size: .85rem; }
"""


def sample_html(shown: Shown) -> str:
    """A sample as a piece of HTML, to stand in a page that has ``STYLE``."""
    legend = (
        f'<span class="trained">{tr("trained")}</span> '
        f'<span class="untrained">{tr("not trained")}</span>'
    )
    parts = [f"<h2>{html.escape(shown.title)}</h2>", f"<p>{legend}</p>"]
    for number, row in enumerate(shown.rows):
        label = html.escape(_label(row, number, len(shown.rows)))
        parts.append(f'<div class="row">{label}</div>')
        parts += [f'<div class="row">{_images(row)}</div>'] if row.pictures else []
        parts += [f'<img src="{each.uri}" alt="{each}" title="{each}">' for each in row.pictures]
        spans = (
            f'<span class="{"trained" if piece.trained else "untrained"}">'
            f"{html.escape(visible(piece.text))}</span>"
            for piece in row.segments
        )
        parts.append(f"<pre>{''.join(spans)}</pre>")
    return "\n".join(parts)


def html_page(title: str, body: str) -> str:
    """A whole page that needs no other file."""
    language = tr("en")
    return (
        f'<!doctype html>\n<html lang="{language}">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )

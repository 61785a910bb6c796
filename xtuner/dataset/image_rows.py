"""Rows about images as conversations with their files; rows that cannot be used are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.dataset.json_file import BrokenRow
from xtuner.utils.errors import BadRowError
from xtuner.utils.lang import tr
from xtuner.utils.types import RowFunction

EMPTY: dict[str, Any] = {"conversation": [], "image": []}
"""In the place of a row that is left out, so that the others keep their numbers."""


def map_rows(
    rows: Sequence[Any], function: RowFunction | None
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Map rows, and find those that cannot be.

    Args:
        rows: with ``image`` (a file, several, or none) and what ``function`` reads.
        function: row → ``{'conversation': [...]}``; None when rows are so already.

    Returns:
        A row for each: ``conversation`` (or ``input_ids`` and ``labels``) and ``image``, a list of
        files; ``EMPTY`` for those that cannot be used. Their numbers, and what is wrong with them.
    """
    mapped, wrong = [], {}
    for number, row in enumerate(rows):
        try:
            mapped.append(_mapped(row, function))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            wrong[number] = _why(error, function)
            mapped.append(EMPTY)
    return mapped, wrong


def _why(error: Exception, function: RowFunction | None) -> str:
    if isinstance(error, BadRowError):
        return str(error)
    if isinstance(error, KeyError):
        return tr("it has no {error}", error=error)
    name = getattr(function, "__name__", "dataset_map_fn")
    return tr("{name} cannot read it ({error})", name=name, error=error)


def _mapped(row: object, function: RowFunction | None) -> dict[str, Any]:
    if isinstance(row, BrokenRow):
        raise BadRowError(row.why)
    if not isinstance(row, Mapping):
        kind = type(row).__name__
        raise BadRowError(tr("it is a {kind}, not an object", kind=kind))
    files = listed_files(row.get("image"))
    made = row if function is None else {**row, **function(row)}
    if "conversation" not in made and "input_ids" in made:
        kept = {name: made[name] for name in ("input_ids", "labels") if name in made}
        return {**kept, "image": files}
    turns = list(made["conversation"])
    if not turns:
        raise BadRowError(tr("its conversation is empty"))
    for turn in turns:
        _check_turn(turn)
    return {"conversation": turns, "image": files}


def _check_turn(turn: Mapping[str, Any]) -> None:
    for name in ("input", "output"):
        text = turn[name]
        if not isinstance(text, str):
            raise BadRowError(tr("the {name} of a turn is {text!r}, no text", name=name, text=text))
        text.encode()  # half of a pair of surrogates is no text that a tokenizer takes


def listed_files(image: object) -> list[str]:
    """The files of a row's ``image``: one, several or none.

    Raises:
        BadRowError: when it is something else.
    """
    if not image:
        return []
    files = [image] if isinstance(image, str) else image
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise BadRowError(
            tr(
                "its image is {image!r}, neither the name of a file nor a list of names",
                image=image,
            )
        )
    return list(files)

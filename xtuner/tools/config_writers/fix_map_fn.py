"""Where a config sets the map functions of its dataset, and the config with others."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

from xtuner.config.document import ConfigDocument
from xtuner.config.edit import with_expressions, with_imports, with_value
from xtuner.config.source import ConfigSource
from xtuner.config.values import KeyPath, item_of

KEY = "dataset_map_fn"


def map_fn_line(document: ConfigDocument, path: KeyPath) -> int:
    """The line that sets a map function, or the dict that a pasted one goes into.

    Args:
        document: the loaded config.
        path: the keys to the map function, the last one ``dataset_map_fn``.
    """
    place = document.original.place(path)
    return place[0] if place else 1


def with_map_fns(
    document: ConfigDocument, lines: Mapping[tuple[str, ...], str | None]
) -> ConfigSource:
    """The text of a config with other map functions; overrides are not written.

    Args:
        document: the loaded config.
        lines: by the path of each map function of the dataset, an import, where one is needed,
            and ``dataset_map_fn=NAME``; None where the map function stays.
    """
    source = document.original
    edits, added = {}, {}
    for path, text in lines.items():
        if text is None:
            continue
        code = text.splitlines()[-1].partition("=")[2]
        others = {
            node
            for other, other_text in lines.items()
            if other_text != text
            for node in _expressions(source, other)
        }
        own = [node for node in _expressions(source, path) if node not in others]
        if own:
            edits[own[-1]] = code
        else:
            added[path] = code
    in_order = sorted(edits.items(), key=lambda edit: (edit[0].lineno, edit[0].col_offset))
    source = with_expressions(source, in_order)
    for path, code in added.items():
        source = with_value(source, path, code, item_of(document.raw, path[0]))
    imports = [line for text in lines.values() if text for line in text.splitlines()[:-1]]
    return with_imports(source, list(dict.fromkeys(imports)))


def _expressions(source: ConfigSource, path: KeyPath) -> Iterator[ast.expr]:
    """The expressions that give a key its whole value: its own, then those of names in it."""
    written = False
    for step in source.trace(path):
        written = written or step.key.rpartition(".")[2] == KEY
        if written:
            yield step.node

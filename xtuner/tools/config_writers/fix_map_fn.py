"""Where a config sets the map function of its dataset, and the config with another one."""

from __future__ import annotations

import ast

from xtuner.config.document import ConfigDocument
from xtuner.config.edit import with_expressions, with_imports, with_value
from xtuner.config.source import ConfigSource
from xtuner.config.values import item_of

PATH = ("train_dataloader", "dataset", "dataset_map_fn")


def map_fn_line(document: ConfigDocument) -> int | None:
    """The line whose map function a pasted one replaces; None where there is not just one."""
    place = document.source.place(PATH) if document.is_python else None
    return place[0] if place else None


def with_map_fn(document: ConfigDocument, paste: str) -> ConfigSource:
    """The text of a config with the lines of a report in place.

    Args:
        document: the loaded config.
        paste: an import, where one is needed, and ``dataset_map_fn=NAME``.
    """
    *imports, setting = paste.splitlines()
    code = setting.partition("=")[2]
    steps = document.source.trace(PATH)
    node = steps[-1].node if steps else None
    if isinstance(node, ast.Name | ast.Constant):  # the one place where it is written
        return with_imports(with_expressions(document.source, [(node, code)]), imports)
    current = item_of(document.raw, PATH[0])
    return with_imports(with_value(document.source, PATH, code, current), imports)

"""Writing a config as a Python file that trains the same run again.

The file is the config's own text with the later changes put into it, so comments stay and an
override of ``lr`` still reaches everything computed from it. Where that would give another config,
every value is written out.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmengine.config import Config

from xtuner.config.definitions import definitions_text
from xtuner.config.document import ConfigDocument, document_of
from xtuner.config.edit import with_imports, with_value
from xtuner.config.load import load_source
from xtuner.config.local_modules import write_local_files
from xtuner.config.names import NotThere, find
from xtuner.config.source import ConfigSource
from xtuner.config.values import dotted_name, iter_dicts, own_values
from xtuner.config.writer import Writer
from xtuner.utils.errors import UserError
from xtuner.utils.files import write_text

_REMOVED = object()


def dump_config(config: Config) -> str:
    """The text of a config file; loading it gives an equal config.

    Args:
        config: a config of ``load_config``, changed since or not.
    """
    document = document_of(config)
    try:
        return dump(replace(document, loaded=load_source(document.source)))
    except UserError:  # the text cannot be loaded again, for example without its base file
        return spelled_out(config)


def dump(document: ConfigDocument) -> str:
    """The text of a config file; loading it gives the values of the document."""
    return _edited_text(document) or spelled_out(document.config)


def write_config(config: Config | ConfigDocument, path: Path) -> None:
    """Write a config, and beside it the modules of its folder that it imports.

    Args:
        config: the config.
        path: the file to write.
    """
    is_document = isinstance(config, ConfigDocument)
    source = config.source if is_document else document_of(config).source
    text = dump(config) if is_document else dump_config(config)
    write_text(path, write_local_files(source.tree, source.file, text, path.parent))


def spelled_out(config: Config) -> str:
    """The config with every value written out: imports, then one assignment per key."""
    values = own_values(config)
    writer = Writer(taken=set(values))
    definitions = _definitions_used(values)
    body = ""
    for key, value in values.items():
        text = f"{key} = {writer.lines(value)}\n"
        body += f"\n{text}" if text.count("\n") > 1 else text
    parts = ["\n".join(writer.imports()), *definitions, body.strip()]
    return "\n\n".join(part for part in parts if part) + "\n"


def same_config(one: Config, other: Config) -> bool:
    """Whether two configs hold the same values, imported names compared by what they name."""
    return _canonical(own_values(one)) == _canonical(own_values(other))


def _canonical(value: object) -> str:
    if isinstance(value, dict):
        pairs = sorted((repr(key), _canonical(item)) for key, item in dict.items(value))
        return "{" + ", ".join(f"{key}: {item}" for key, item in pairs) + "}"
    if isinstance(value, list | tuple):
        return type(value).__name__ + "(" + ", ".join(map(_canonical, value)) + ")"
    named = dotted_name(value)
    return ".".join(_definition(named)) if named else repr(value)


def _definition(named: tuple[str, ...]) -> tuple[str, ...]:
    """A name by the module that defines it, whichever module it was imported from."""
    module, name, *rest = named
    with contextlib.suppress(NotThere):
        found = find(module, name) if name else None
        if found and isinstance(found.node, ast.ClassDef | ast.FunctionDef):
            return (found.module, found.node.name, *rest)
    return named


def _definitions_used(values: dict[str, Any]) -> list[str]:
    """The source of the functions and classes in the values that configs define themselves."""
    modules: dict[str, None] = {}
    for _, holder in iter_dicts(values):
        for value in dict.values(holder):
            for item in value if isinstance(value, list | tuple) else (value,):
                named = dotted_name(item)
                if named:
                    modules[named[0]] = None
    texts = map(definitions_text, modules)
    return [text for text in texts if text is not None]


def _edited_text(document: ConfigDocument) -> str | None:
    """The document's text with the changes put in; None where that gives other values."""
    if not document.is_python or not document.source.text:
        return None
    try:
        edited = _with_changes(document)
        values = own_values(load_source(edited))
    except (UserError, ValueError):
        return None
    return edited.text if _canonical(values) == _canonical(document.values) else None


def _with_changes(document: ConfigDocument) -> ConfigSource:
    source, old, new = document.source, own_values(document.loaded), document.values
    known = {(module, name or ""): alias for alias, module, name in source.imports()}
    writer = Writer(taken={*new, *source.imported()}, known=known)
    for path, value in changes(old, new):
        if value is _REMOVED:
            inner = "".join(f"[{int(k) if k.isdigit() else repr(k)}]" for k in path[1:])
            source = ConfigSource(f"{source.text.rstrip()}\ndel {path[0]}{inner}\n", source.file)
        else:
            source = with_value(source, path, writer.line(value), old.get(path[0]))
    statements = writer.imports()
    return with_imports(source, statements) if statements else source


def changes(
    old: object, new: object, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The keys whose values differ, with the new value (``_REMOVED`` where there is none)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in dict.items(new):
            if key in old:
                yield from changes(dict.__getitem__(old, key), value, (*path, str(key)))
            else:
                yield (*path, str(key)), value
        yield from (((*path, str(key)), _REMOVED) for key in old.keys() - new.keys())
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from changes(one, other, (*path, str(number)))
    elif _canonical(old) != _canonical(new):
        yield path, new

"""``--cfg-options``: overrides go into the source text, so what is computed from them follows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmengine.config import Config

from xtuner.config.document import ConfigDocument
from xtuner.config.edit import with_settings, with_statement, with_value
from xtuner.config.load import load, load_source
from xtuner.config.options import Option, parse_options
from xtuner.config.values import KeyPath, copy_config, item_of, raw_dict, value_at


def load_config(name_or_path: str | os.PathLike[str], options: Sequence[str] = ()) -> Config:
    """Load a config and apply overrides.

    Args:
        name_or_path: a file, or a name of the catalogue.
        options: ``key=value`` words as of ``--cfg-options``.

    Returns:
        The config; imported names in it are lazy. ``filename`` is the file, or ``<name>.py``.

    Raises:
        UserError: when there is no such config, it is not Python, it fails while loading, or an
            override names no key of it.
    """
    return override(load(name_or_path), options).config


def override(document: ConfigDocument, options: Sequence[str]) -> ConfigDocument:
    """Apply overrides to a loaded config.

    Settings at the top of the file come first, so that a dotted key wins over them.

    Args:
        document: a loaded config.
        options: ``key=value`` words as of ``--cfg-options``.

    Raises:
        UserError: when a word is malformed or names no key of the config.
    """
    if not options:
        return document
    parsed = parse_options(options, document)
    document = replace(document, overrides=(*document.overrides, *options))
    if not document.is_python:
        return _override_data(document, parsed)
    edits = [(path, option) for option in parsed for path in option.paths]
    settings = {path[0]: option.code for path, option in edits if len(path) == 1}
    source = with_settings(document.source, settings)
    document = document.with_text(source, load_source(source))
    for path, option in edits:
        if len(path) == 1:
            continue
        current = item_of(document.raw, path[0])
        source = with_value(document.source, path, option.code, current)
        config = load_source(source)
        if not _has_value(raw_dict(config), path, option):  # the file sets it again: at its end
            source = with_statement(document.source, path, option.code, current)
            config = load_source(source)
        document = document.with_text(source, config)
    return document


def _has_value(loaded: dict[str, Any], path: tuple[str, ...], option: Option) -> bool:
    try:
        return bool(option.is_code or value_at(loaded, path) == option.value)
    except KeyError:
        return False


def _override_data(document: ConfigDocument, parsed: Sequence[Option]) -> ConfigDocument:
    """Override keys of a config in YAML or JSON, where nothing depends on anything."""
    config = copy_config(document.config)
    for option in parsed:
        for path in option.paths:
            _set_value(raw_dict(config), path, option.value)
    return document.with_text(document.source, config)


def _set_value(holder: dict[str, Any] | list[Any], path: KeyPath, value: object) -> None:
    """Set a key in nested dicts and lists, in place; what is missing on the way is a new dict."""
    for key in path[:-1]:
        inner = item_of(holder, key)
        if not isinstance(inner, dict | list):
            inner = {}
            _set_item(holder, key, inner)
            inner = item_of(holder, key)  # the config keeps a copy of its own kind
        holder = inner
    _set_item(holder, path[-1], value)


def _set_item(holder: dict[str, Any] | list[Any], key: str, value: object) -> None:
    if isinstance(holder, list):
        holder[int(key)] = value
    else:
        holder[key] = value

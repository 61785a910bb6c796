"""Reading a config by name or path, and overriding it so that the override reaches.

Imported names stay lazy: neither torch nor transformers is needed. Overrides are put into the
source text (see ``source.py``), so whatever is computed from them follows.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject

from xtuner import configs
from xtuner.config.check.names import undefined_names
from xtuner.config.options import Option, parse_options
from xtuner.config.source import Source, value_at
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr, translate

OTHER_FORMATS = (".yaml", ".yml", ".json")


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
    if str(name_or_path).endswith(OTHER_FORMATS):
        return _load_plain(str(name_or_path), options)
    source = read_source(name_or_path)
    cfg = load_source(source)
    if options:
        _, cfg = override(source, cfg, options)
    return cfg


def read_source(name_or_path: str | os.PathLike[str]) -> Source:
    """The text of a config, by path or by name of the catalogue.

    Raises:
        UserError: when there is neither, with the nearest names; or when it is not Python.
    """
    name = os.fspath(name_or_path)
    path = Path(name)
    if path.is_file():
        try:
            return Source(path.read_text("utf-8"), name)
        except UnicodeDecodeError as error:
            raise UserError(tr("this file is not UTF-8 text"), where=Where(name)) from error
    if path.suffix == ".py" or path.name != name:
        raise _no_file(path)
    try:
        return Source(configs.render(name), f"{name}.py")
    except configs.UnknownConfig as error:
        raise UserError(
            tr(
                "there is no config {name!r}: {reason}",
                name=name,
                reason=translate(error.message, **error.values),
            ),
            hint=_did_you_mean(list(error.suggestions)),
        ) from error


def override(source: Source, cfg: Config, options: Sequence[str]) -> tuple[Source, Config]:
    """Put overrides into the text of a loaded config and load it again."""
    parsed = parse_options(options, source, raw_dict(cfg))
    edits = [(path, option) for option in parsed for path in option.paths]
    for path, option in edits:  # settings first, so that a dotted key has the last word
        if len(path) == 1:
            source = source.with_value(path, option.code, None)
    cfg = load_source(source)
    for path, option in edits:
        if len(path) > 1:
            source, cfg = _override_inside(source, raw_dict(cfg), path, option)
    return source, cfg


def _override_inside(
    source: Source, raw: dict[str, Any], path: tuple[str, ...], option: Option
) -> tuple[Source, Config]:
    current = dict.get(raw, path[0])
    edited = source.with_value(path, option.code, current)
    cfg = load_source(edited)
    if not _reached(raw_dict(cfg), path, option):  # set anew further down the file
        edited = source.appended(path, option.code, current)
        cfg = load_source(edited)
    return edited, cfg


def _reached(loaded: dict[str, Any], path: tuple[str, ...], option: Option) -> bool:
    with contextlib.suppress(KeyError):
        return option.is_code or value_at(loaded, path) == option.value
    return False


def raw_dict(cfg: Config) -> dict[str, Any]:
    """The config's own dict, in which lazy objects stay lazy."""
    raw: dict[str, Any] = cfg._cfg_dict
    return raw


def load_source(source: Source) -> Config:
    """Run the text of a config, imported names staying lazy.

    Raises:
        UserError: when it raises, with file and line.
    """
    with _as_file(source) as path:
        try:
            cfg = Config.fromfile(path, format_python_code=False)
        except (Exception, SystemExit) as error:
            raise _failed(error, source, path) from error
        _relocate(raw_dict(cfg), path, source.file)
    object.__setattr__(cfg, "_filename", source.file)
    object.__setattr__(cfg, "_text", source.text)
    return cfg


def _relocate(value: Any, path: str, file: str) -> None:
    """Let imported names say that they come from the config, not from a copy of it."""
    if isinstance(value, LazyObject | LazyAttr):
        if value.location:
            value.location = value.location.replace(path, file)
    elif isinstance(value, dict):
        for key in dict.keys(value):
            _relocate(dict.__getitem__(value, key), path, file)
    elif isinstance(value, list | tuple):
        for item in value:
            _relocate(item, path, file)


@contextlib.contextmanager
def _as_file(source: Source) -> Iterator[str]:
    """A file with the text, for mmengine: the one it came from if that is unchanged."""
    original = Path(source.file)
    if original.is_file() and original.read_text("utf-8") == source.text:
        yield source.file
        return
    beside = any(word in source.text for word in ("read_base", "_base_", "__file__"))
    with tempfile.TemporaryDirectory(
        prefix=".xtuner-", dir=original.parent.resolve() if beside else None
    ) as folder:
        path = Path(folder) / original.name
        if beside:  # paths in it are relative to its folder
            path = original.resolve().parent / f"{Path(folder).name}{original.suffix}"
        try:
            path.write_text(source.text, "utf-8")
            yield str(path)
        finally:
            path.unlink(missing_ok=True)


def _failed(error: BaseException, source: Source, path: str) -> UserError:
    """What to tell when a config raises while it is loaded."""
    frames = traceback.extract_tb(error.__traceback__)
    line = next((frame.lineno for frame in reversed(frames) if frame.filename == path), None)
    lines = source.text.splitlines()
    shown = f"\n    {lines[line - 1].strip()}" if line and line <= len(lines) else ""
    what = f"{type(error).__name__}: {error}".replace(path, source.file)
    return UserError(
        tr("this config fails while loading: {what}{shown}", what=what, shown=shown),
        hint=_meant(error, source),
        where=Where(source.file, line),
    )


def _meant(error: BaseException, source: Source) -> str | None:
    """The name that was meant where one is not defined."""
    if not isinstance(error, NameError):
        return None
    meant = [use.meant for use in undefined_names(source) if use.node.id == error.name]
    return _did_you_mean([meant[0]]) if meant and meant[0] else None


def _load_plain(path: str, options: Sequence[str]) -> Config:
    """A config in YAML or JSON: data only, so nothing is computed from anything."""
    if not Path(path).is_file():
        raise _no_file(Path(path))
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        raise UserError(
            tr("this file cannot be read: {error}", error=error),
            where=Where(path),
        ) from error
    for option in parse_options(options, Source("", path), raw_dict(cfg)):
        cfg.merge_from_dict({".".join(keys): option.value for keys in option.paths})
    return cfg


def _no_file(path: Path) -> UserError:
    folder = path.parent
    there = [str(folder / p.name) for p in folder.glob("*.py")] if folder.is_dir() else []
    near = difflib.get_close_matches(str(path), there, n=3)
    name = path.name.removesuffix(".py")
    if not near:
        near = difflib.get_close_matches(name, configs.names(), n=3)
    return UserError(
        tr("this is a folder, not a config")
        if path.is_dir()
        else tr("there is no such config file"),
        hint=_did_you_mean(near),
        where=Where(str(path)),
    )


def _did_you_mean(names: Sequence[str]) -> str:
    if names:
        shown = ", ".join(names[:3])
        return tr("did you mean {shown}?", shown=shown)
    return tr("'xtuner list-cfg' lists the names.")

"""Loading a config by path or by name: its text is read, then run with imported names lazy.

Neither torch nor transformers is imported for it.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml
from mmengine.config import Config
from mmengine.config import config as mmengine_config
from mmengine.config import utils as mmengine_utils
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.config.utils import ConfigParsingError
from mmengine.fileio import load as load_data
from mmengine.fileio.handlers import YamlHandler, file_handlers

from xtuner import configs
from xtuner.config.definitions import (
    forget_definitions,
    has_definitions,
    with_lazy_definitions,
    with_lazy_values,
)
from xtuner.config.document import ConfigDocument
from xtuner.config.local_modules import make_importable
from xtuner.config.source import ConfigSource
from xtuner.config.undefined import undefined_names
from xtuner.config.values import raw_dict
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr, translate

DATA_FORMATS = (".yaml", ".yml", ".json")
OWN_CONFIG = "xtuner copy-cfg --model FOLDER_OR_HUB_ID --data FILE DIR"


def load(name_or_path: str | os.PathLike[str]) -> ConfigDocument:
    """Load a config.

    Args:
        name_or_path: a file (Python, YAML or JSON), or a name of the catalogue.

    Raises:
        UserError: when there is no such config, it cannot be parsed, or it fails while loading.
    """
    if str(name_or_path).endswith(DATA_FORMATS):
        source, config = ConfigSource("", str(name_or_path)), _load_data(Path(name_or_path))
    else:
        return load_text(read_source(name_or_path))
    return ConfigDocument(source, config, original=source, loaded=config)


def load_text(source: ConfigSource) -> ConfigDocument:
    """Load a config in Python whose text is read already.

    Raises:
        UserError: when it fails while loading.
    """
    forget_definitions(source.file)
    config = load_source(source)
    return ConfigDocument(source, config, original=source, loaded=config)


def read_source(name_or_path: str | os.PathLike[str]) -> ConfigSource:
    """Read the text of a config in Python, by path or by name of the catalogue.

    Raises:
        UserError: when there is neither, with the nearest names; or when it is not Python.
    """
    name = os.fspath(name_or_path)
    path = Path(name)
    if path.is_file() and path.suffix != ".py":
        raise UserError(
            tr("this is no config: a config is a file of Python"),
            hint=tr("rows or a model: {command} writes a config for them.", command=OWN_CONFIG),
            where=Where(name),
        )
    if path.is_file():
        try:
            return ConfigSource(path.read_text("utf-8").removeprefix("\ufeff"), name)
        except UnicodeDecodeError as error:
            raise UserError(
                tr("this file is not UTF-8 text"),
                hint=tr("save it as UTF-8 in your editor, or convert it with iconv."),
                where=Where(name),
            ) from error
    beside = Path(f"{name}.py")
    if beside.is_file() and not path.is_dir():
        raise UserError(
            tr("there is no such config file"), hint=_did_you_mean([str(beside)]), where=Where(name)
        )
    if path.suffix == ".py" or path.name != name:
        raise _no_file(path)
    try:
        return ConfigSource(configs.render(name), f"{name}.py")
    except configs.UnknownConfig as error:
        if path.is_dir():
            raise _no_file(path) from error
        there = [file.name for file in path.absolute().parent.glob("*.py")]
        near = difflib.get_close_matches(name, there, n=3)
        raise UserError(
            tr(
                "there is no config {name!r}: {reason}",
                name=name,
                reason=translate(error.message, **error.values),
            ),
            hint=_did_you_mean([*near, *error.suggestions]),
        ) from error


def load_source(source: ConfigSource) -> Config:
    """Run the text of a config, imported names staying lazy.

    Raises:
        UserError: when it raises, with file and line.
    """
    make_importable(source.tree, source.file)
    text = with_lazy_definitions(source.text, source.tree, source.file)
    lazily = (has_definitions(source.tree) and not source.assignments("_base_")) or None
    with _as_file(source, text) as path:
        try:
            with _standard_library_runs(), _yaml_is_data():
                config = Config.fromfile(path, lazy_import=lazily, format_python_code=False)
        except (Exception, SystemExit) as error:
            raise _failed(error, source, path) from error
        functions = with_lazy_values(raw_dict(config), source, path)
        _relocate(raw_dict(config), path, source.file)
    _expand_home(raw_dict(config))
    imported: set[str] = getattr(config, "_imported_names", set())
    imported.update(functions)
    imported.update(name for name in source.imported() if not source.assignments(name))
    object.__setattr__(config, "_filename", source.file)
    object.__setattr__(config, "_text", source.text)
    return config


def _is_standard_library(module: str) -> bool:
    root = module.partition(".")[0]
    return root in sys.stdlib_module_names or module.startswith("mmengine.config")


@contextlib.contextmanager
def _standard_library_runs() -> Iterator[None]:
    """Let a config call the standard library at its top level: only other imports are lazy.

    mmengine tells it by the folder of a module's file and takes it for a third party's where a
    virtual environment's Python lies elsewhere (pyenv, uv, conda).
    """
    places = (mmengine_config, mmengine_utils)
    before = mmengine_utils._is_builtin_module
    for module in places:
        module._is_builtin_module = _is_standard_library
    try:
        yield
    finally:
        for module in places:
            module._is_builtin_module = before


def _relocate(value: object, path: str, file: str) -> None:
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


def _expand_home(value: object) -> object:
    """Replace ``~`` at the beginning of paths, in place: no loader of models or data does it."""
    if isinstance(value, dict):
        for key in list(dict.keys(value)):
            dict.__setitem__(value, key, _expand_home(dict.__getitem__(value, key)))
    elif isinstance(value, list):
        value[:] = [_expand_home(item) for item in value]
    elif isinstance(value, str) and value.startswith("~/") and "\n" not in value:
        return str(Path(value).expanduser())
    return value


@contextlib.contextmanager
def _as_file(source: ConfigSource, text: str) -> Iterator[str]:
    """A file with the text, for mmengine: the one it came from if that has it."""
    original = Path(source.file)
    is_file = original.is_file()
    if is_file and original.read_text("utf-8") == text:
        yield source.file
        return
    beside = is_file and any(word in text for word in ("read_base", "_base_", "__file__"))
    with tempfile.TemporaryDirectory(
        prefix=".xtuner-", dir=original.parent.resolve() if beside else None
    ) as folder:
        path = Path(folder) / original.name
        if beside:  # paths in it are relative to its folder
            path = original.resolve().parent / f"{Path(folder).name}{original.suffix}"
        try:
            path.write_text(text, "utf-8")
            yield str(path)
        finally:
            path.unlink(missing_ok=True)


def _failed(error: BaseException, source: ConfigSource, path: str) -> UserError:
    """The message for a config that raises while it is loaded."""
    frames = traceback.extract_tb(error.__traceback__)
    line = next((frame.lineno for frame in reversed(frames) if frame.filename == path), None)
    if base := _base_problem(error, source, path):
        return base
    in_text = line is not None and line <= len(source.lines)
    shown = f"\n    {source.lines[line - 1].strip()}" if line and in_text else ""
    what = f"{type(error).__name__}: {error}".replace(path, source.file).rstrip(": ")
    return UserError(
        tr("this config fails while loading: {what}{shown}", what=what, shown=shown),
        hint=_meant(error, source),
        where=Where(source.file, line),
    )


def _base_problem(error: BaseException, source: ConfigSource, path: str) -> UserError | None:
    """The message for a base config that is missing, or reads the config that it is a base of."""
    nodes = [
        node
        for node in ast.walk(source.tree)
        if (isinstance(node, ast.With) and "read_base" in ast.unparse(node.items[0]))
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_base_")
    ]
    if not nodes:
        return None
    node = nodes[0].body[0] if isinstance(nodes[0], ast.With) else nodes[0]
    where = Where(source.file, node.lineno)
    if isinstance(error, RecursionError):
        return UserError(
            tr("this config reads itself again through its base configs"),
            hint=tr("a base must not read a config that it is a base of; delete one of the two."),
            where=where,
        )
    if not isinstance(error, ConfigParsingError | FileNotFoundError):
        return None
    name = getattr(error, "filename", None) or str(error).partition(" not found")[0]
    return UserError(
        tr("there is no base config {name!r}", name=str(name).replace(str(Path(path).parent), ".")),
        hint=tr("correct its name; it is looked for relative to the config's folder."),
        where=where,
    )


def _meant(error: BaseException, source: ConfigSource) -> str | None:
    """The name that was probably meant where one is not defined; why an import cannot be called."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if isinstance(error, RuntimeError) and raised_in.name == "lazy.py":  # mmengine's: it is called
        return tr(
            "what a config imports is not loaded while the config is read: import it inside the "
            "function that uses it, or put what calls it into a module beside the config."
        )
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, KeyError) and frames[-1].filename == os.get_exec_path.__code__.co_filename:
        return tr(
            "set it (export {name}=...), or give a default: os.environ.get({name!r}, 'value').",
            name=error.args[0],
        )
    if not isinstance(error, NameError):
        return None
    meant = [use.meant for use in undefined_names(source) if use.node.id == error.name]
    return _did_you_mean([meant[0]]) if meant and meant[0] else None


class _SafeYaml(YamlHandler):
    """YAML as data: a tag such as ``!!python/object/apply`` is refused, nothing is run."""

    def load_from_fileobj(self, file: TextIO, **_: object) -> Any:
        return yaml.safe_load(file)


@contextlib.contextmanager
def _yaml_is_data() -> Iterator[None]:
    """Let mmengine read YAML as data, that of base files too: its own loader builds any object."""
    given = {name: file_handlers[name] for name in ("yaml", "yml")}
    file_handlers.update(dict.fromkeys(given, _SafeYaml()))
    try:
        yield
    finally:
        file_handlers.update(given)


def _load_data(path: Path) -> Config:
    """Load a config in YAML or JSON, and the base files that it names.

    Raises:
        UserError: when it is no data, with the line.
    """
    if not path.is_file():
        raise _no_file(path)
    try:
        with _yaml_is_data():
            kind = type(load_data(str(path))).__name__
            if kind != "dict":
                raise UserError(
                    tr("this holds {kind}; an object is expected.", kind=kind),
                    where=Where(str(path)),
                )
            config = Config.fromfile(str(path))
        _expand_home(raw_dict(config))
        return config
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            tr("this file cannot be read: {error}", error=error),
            hint=tr("a config in YAML or JSON holds plain data; only a .py config can name code.")
            if isinstance(error, yaml.constructor.ConstructorError)
            else None,
            where=Where(str(path), _line_of(error)),
        ) from error


def _line_of(error: Exception) -> int | None:
    if isinstance(error, json.JSONDecodeError):
        return error.lineno
    mark = getattr(error, "problem_mark", None)
    return mark.line + 1 if mark else None


def _no_file(path: Path) -> UserError:
    folder = path.parent
    there = [str(folder / p.name) for p in folder.glob("*.py")] if folder.is_dir() else []
    near = difflib.get_close_matches(str(path), there, n=3)
    if path.is_dir():
        near = sorted(str(file) for file in path.glob("*.py"))[:3]
    if path.is_dir() and (path / "config.json").is_file():
        return UserError(
            tr("this is a model folder, not a config"),
            hint=tr("{command} writes a config for it.", command=OWN_CONFIG),
            where=Where(str(path)),
        )
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

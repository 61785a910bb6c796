"""The values of a loaded config: looking them up and naming them, imported names staying lazy.

mmengine builds a lazy object as soon as a key is read in the usual way; here ``dict``'s own methods
are used, so nothing is imported.
"""

from __future__ import annotations

import builtins
import copy
import inspect
import keyword
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, TypeGuard

from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject

KeyPath = Sequence[str]
"""A dotted key, split at its dots."""
MISSING = object()


def raw_dict(config: Config) -> dict[str, Any]:
    """The config's own dict, in which lazy objects stay lazy."""
    raw: dict[str, Any] = config._cfg_dict
    return raw


def own_values(config: Config) -> dict[str, Any]:
    """The keys that the config defines itself, without what it imports."""
    imported: set[str] = getattr(config, "_imported_names", set())
    return {
        key: value
        for key, value in dict.items(raw_dict(config))
        if key not in imported and not isinstance(value, ModuleType)
    }


def copy_config(config: Config) -> Config:
    """A config whose dicts and lists can be changed without changing those of the original."""
    copied = copy.copy(config)
    object.__setattr__(copied, "_cfg_dict", _copy(raw_dict(config)))
    return copied


def copyable(config: Config) -> Config:
    """The config without the names of its file that are no settings and cannot be copied.

    Modules of the standard library, open files and locks are among them; mmengine copies configs.
    """
    copied = copy_config(config)
    values = raw_dict(copied)
    for name, value in list(dict.items(values)):
        if not isinstance(value, dict | list | tuple | LazyObject | LazyAttr) and not _copies(
            value
        ):
            dict.__delitem__(values, name)
    return copied


def _copies(value: object) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:  # whatever a class of the user's raises
        return False
    return True


def _copy(value: object) -> Any:
    if isinstance(value, dict):
        copied = type(value)()
        for key in dict.keys(value):
            dict.__setitem__(copied, key, _copy(dict.__getitem__(value, key)))
        return copied
    return type(value)(map(_copy, value)) if type(value) in (list, tuple) else value  # type: ignore


def item_of(value: object, key: str) -> Any:
    """An item of a dict, or of a list by its index; ``MISSING`` where there is none."""
    if isinstance(value, dict):
        return dict.get(value, key, MISSING)
    if isinstance(value, list | tuple) and key.isdigit() and int(key) < len(value):
        return value[int(key)]
    return MISSING


def value_at(value: object, path: KeyPath) -> Any:
    """The value at a path.

    Raises:
        KeyError: when there is none.
    """
    for key in path:
        value = item_of(value, key)
        if value is MISSING:
            raise KeyError(key)
    return value


def has_key(value: object, path: KeyPath) -> bool:
    """Whether there is a value at a path."""
    try:
        value_at(value, path)
    except KeyError:
        return False
    return True


def iter_dicts(value: object, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All dicts in a value, outer ones first, each with its dotted key.

    Args:
        value: a dict, a list or anything else.
        key: the dotted key of ``value`` itself.
    """
    prefix = f"{key}." if key else ""
    if isinstance(value, dict):
        yield key, value
        for name in list(dict.keys(value)):
            if name in value:
                yield from iter_dicts(dict.__getitem__(value, name), f"{prefix}{name}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from iter_dicts(item, f"{prefix}{number}")


def iter_keys(value: object, prefix: str = "") -> Iterator[str]:
    """All dotted keys in a value, outer ones first."""
    if isinstance(value, dict):
        items = [(str(key), dict.__getitem__(value, key)) for key in dict.keys(value)]
    elif isinstance(value, list | tuple):
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        return
    for key, item in items:
        yield f"{prefix}{key}"
        yield from iter_keys(item, f"{prefix}{key}.")


def is_argument_name(key: object) -> TypeGuard[str]:
    """Whether ``dict(key=...)`` can be written for this key of a dict."""
    return isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether this is an int or a float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_imported(value: object) -> bool:
    """Whether a value is an imported name that is not loaded yet."""
    return isinstance(value, LazyAttr | LazyObject)


def is_local_function(value: object) -> TypeGuard[type]:
    """Whether the config file itself defines this function or class."""
    if not (inspect.isfunction(value) or inspect.isclass(value)):
        return False
    return value.__module__ in (None, "builtins") and not hasattr(builtins, value.__name__)


def dotted_name(value: object) -> tuple[str, ...] | None:
    """How to import what a value stands for.

    Returns:
        The module, the name in it, and the attributes that follow (left out where there are none):
        ``("torch.optim", "AdamW")``. None for plain data and what cannot be imported.
    """
    if isinstance(value, LazyAttr):
        return _name_of_attribute(value)
    if isinstance(value, LazyObject):
        module = value._module if isinstance(value._module, str) else value._module[0]
        return (module, value._imported or "")
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return ("torch", "", str(value).partition(".")[2])
    if isinstance(value, str | bytes | int | float | complex | None.__class__):
        return None
    name = getattr(value, "__qualname__", "")
    owner = getattr(value, "__self__", None)
    if inspect.ismethod(value) and inspect.isclass(owner):
        return (owner.__module__, *_split_first(f"{owner.__qualname__}.{value.__name__}"))
    if name and "<" not in name and not is_local_function(value):
        return (str(getattr(value, "__module__", "")), *_split_first(name))
    return None


def _name_of_attribute(value: LazyAttr) -> tuple[str, ...] | None:
    attributes = [value.name]
    while isinstance(value.source, LazyAttr):
        value = value.source
        attributes.insert(0, value.name)
    root = dotted_name(value.source)
    return (root[0], root[1], ".".join(attributes)) if root else None


def _split_first(qualname: str) -> tuple[str, ...]:
    first, _, rest = qualname.partition(".")
    return (first, rest) if rest else (first,)


def name_of(value: object) -> str:
    """What a class, a function or a registered name is called, without its module.

    Returns:
        For example ``AdamW`` or ``AutoTokenizer.from_pretrained``; '' for plain data.
    """
    if isinstance(value, str):
        return value.rpartition(".")[2]
    named = dotted_name(value)
    return ".".join(part for part in named[1:] if part) if named else ""


def last_name(value: object) -> str:
    """The last part of ``name_of``: ``from_pretrained`` of ``AutoTokenizer.from_pretrained``."""
    return name_of(value).rpartition(".")[2]

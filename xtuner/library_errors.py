"""Errors of libraries in the words of users: one translator for each source.

``translate`` gives a ``UserError`` for what a user can fix (a damaged file, a full disk, a name
that no registry knows) and None for everything else, which ``crash`` then reports. No library is
imported for it: a library whose error was raised is loaded already.
"""

from __future__ import annotations

import difflib
import errno
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import N_, tr
from xtuner.utils.lang import translate as translated

Translator = Callable[[BaseException], UserError | None]

HINTS_OF_SYSTEM: Mapping[int, str] = {
    errno.ENOSPC: N_("free some disk space ('df -h', 'df -i'), then start again."),
    errno.EDQUOT: N_("your quota of disk space is used up; free some, then start again."),
    errno.EROFS: N_("this disk is read-only; choose another folder."),
    errno.EACCES: N_("check the permissions, or choose another folder."),
    errno.EPERM: N_("check the permissions, or choose another folder."),
    errno.EADDRINUSE: N_("another process uses this port; choose another, such as PORT=29517."),
    errno.EMFILE: N_("too many files are open; raise the limit with 'ulimit -n 65536'."),
    errno.ENFILE: N_("too many files are open; raise the limit with 'ulimit -n 65536'."),
    errno.ENOMEM: N_("not enough memory; close other programs, or use a smaller model."),
}
_MODEL_NAMES = ("pretrained_model_name_or_path", "path_or_repo_id", "repo_id", "path")
_REGISTRY = re.compile(r"(?P<name>[\w.]+) is not in the (?:[\w.]+::)?(?P<registry>[\w ]+) registry")
_OS_ERROR = re.compile(r"I/O error: .*\(os error (\d+)\)")
"""In errors of Rust's libraries."""
_NEEDS = re.compile(
    r"(?P<purpose>\w+) requires the (?P<module>\w+) library but .*?`pip install (?P<name>[\w-]+)`",
    re.S,
)
_NO_NAME = re.compile(r"Failed to import (?P<module>[\w.]+)\.(?P<name>\w+) in ")
"""How mmengine says that an attribute of a module is not there."""
_WORKER = re.compile(r"Caught \w+ in .*?\.\nOriginal Traceback", re.S)


def translate(error: BaseException) -> UserError | None:
    """The error in the words of users; None for one that they cannot fix.

    Args:
        error: what was raised; its explicit causes (``raise ... from``) are looked at, too.
    """
    for each in causes(error):
        if isinstance(each, UserError):
            return _from_worker(each) or each
        for kind in type(each).__mro__:
            translator = TRANSLATORS.get(kind.__module__.partition(".")[0])
            found = translator(each) if translator else None
            if found is not None:
                return found
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of its text; of a worker process, its own."""
    kind, text = type(error).__name__, str(error).strip()
    if _WORKER.match(text):
        return text.splitlines()[-1]
    first = next(iter(text.splitlines()), "")
    return f"{kind}: {first}" if first else kind


def _from_worker(error: UserError) -> UserError | None:
    """A worker process of a data loader passes on the text of its traceback as the message."""
    name = f"{UserError.__module__}.{UserError.__qualname__}: "
    if not _WORKER.match(error.message) or name not in error.message:
        return None
    return UserError(error.message.rpartition(name)[2].strip(), status=error.status)


def _system(error: BaseException) -> UserError | None:
    """Files, disks, ports and the network."""
    if isinstance(error, UnicodeError | json.JSONDecodeError):
        return _undecodable(error)
    if isinstance(error, KeyError):
        return _unregistered(error)
    if isinstance(error, ImportError):
        return _missing_name(error) or _missing_package(error)
    if type(error) is Exception:
        return _tokenizers(error)
    if isinstance(error, ValueError):
        return _no_tokenizer(error)
    if isinstance(error, EOFError):
        return _archive(error)
    if isinstance(error, RecursionError) and "JSON" in str(error):
        file = _file_in(error, (".json", ".jsonl"))
        message = tr("this file is not valid JSON: {why}", why=str(error))
        return UserError(message, hint=_again(), where=Where(file) if file else None)
    if isinstance(error, MemoryError):
        return UserError(tr("there is not enough memory."), hint=_system_hint(errno.ENOMEM))
    if not isinstance(error, OSError):
        return None
    if error.errno is None:
        return _model_folder(error)
    named = isinstance(error.filename, str | os.PathLike)
    file = os.fspath(error.filename) if named else _stream_in(error)
    return _of_system(error.errno, file, error.strerror)


def _of_system(number: int, file: object = None, what: str | None = None) -> UserError:
    """An error of the operating system.

    Args:
        number: its ``errno``.
        file: what it is about.
        what: its text; the system's own by default.
    """
    place = Where(str(file)) if file else None
    what = what or os.strerror(number)
    return UserError(tr("{what}.", what=what), hint=_system_hint(number), where=place)


def _stream_in(error: BaseException) -> str | None:
    """The file of the innermost stream among the local variables where an error was raised."""
    for variables in _frames(error):
        for value in variables.values():
            name = getattr(value, "name", None) if isinstance(value, io.IOBase) else None
            if isinstance(name, str):
                return name
    return None


def _missing_name(error: ImportError) -> UserError | None:
    """A name that a config takes from a module that has no such name."""
    found = _NO_NAME.match(str(error))
    module = sys.modules.get(found["module"]) if found else None
    if found is None or module is None:
        return None
    near = difflib.get_close_matches(found["name"], dir(module), n=1)
    return UserError(
        tr("'{name}' is not in '{module}'", name=found["name"], module=found["module"]),
        hint=tr("did you mean '{near}'?", near=near[0]) if near else None,
    )


def _missing_package(error: ImportError) -> UserError | None:
    """What a class of transformers needs, such as ``timm`` for the vision tower of Gemma 3n."""
    found = _NEEDS.search(str(error))
    if found is None:
        return None
    return UserError(
        tr(
            "{purpose} needs the package {module!r}, which is not installed.",
            purpose=found["purpose"],
            module=found["module"],
        ),
        hint=f"pip install {found['name']}",
    )


def _system_hint(number: int) -> str | None:
    hint = HINTS_OF_SYSTEM.get(number)
    return translated(hint) if hint else None


def _undecodable(error: BaseException) -> UserError | None:
    """A file that is no JSON or no text; which one it is only the traceback knows."""
    file = _file_in(error, (".json", ".jsonl", ".yaml", ".yml", ".txt", ".csv", ".model"))
    if file is None:
        return None
    if isinstance(error, json.JSONDecodeError):
        file = _holding(error.doc, Path(file))
        message = tr("this file is not valid JSON: {why}", why=error.msg)
        return UserError(message, hint=_again(), where=Where(file, error.lineno))
    return UserError(tr("this file is not UTF-8 text."), hint=_again(), where=Where(file))


def _holding(text: str, near: Path) -> str:
    """The file that a text is of, among a file and those beside it; the file itself if none is."""
    files = (near, *sorted(near.parent.glob("*.json*")))
    of_its_size = (f for f in files if f.is_file() and f.stat().st_size <= 4 * len(text) + 4)
    for file in of_its_size:
        if file.read_text("utf-8", errors="replace").removeprefix("\ufeff") == text:
            return str(file)
    return str(near)


def _again() -> str:
    return tr("the file is damaged or of another format; get it again.")


def _model_folder(error: OSError) -> UserError:
    """An error that a library words itself; transformers' for a model that is not there."""
    what = next(iter(str(error).splitlines()), type(error).__name__)
    if not _raised_in(error, ("transformers", "huggingface_hub", "datasets")):
        return UserError(what)
    name = _local(error, _MODEL_NAMES)
    if name is None or os.path.isdir(name):  # noqa: PTH112 (a name may hold anything)
        return UserError(what, hint=_again(), where=Where(name) if name else None)
    return _not_available(name)


def _not_available(name: str) -> UserError:
    return UserError(
        tr(
            "{name} is neither a folder here, nor in the cache, nor can it be read from the "
            "Hugging Face hub.",
            name=name,
        ),
        hint=tr(
            "check the name and the network, set HF_ENDPOINT to a mirror, log in with 'hf auth "
            "login' where it is gated, or give the path of a folder."
        ),
    )


def _hub(error: BaseException) -> UserError | None:
    if type(error).__name__.startswith("StrictDataclass"):  # transformers' checks of config.json
        return UserError(tr("a model's config.json cannot be used: {why}", why=_values_of(error)))
    name = _local(error, _MODEL_NAMES)
    if name is not None:
        return _not_available(name)
    return UserError(
        tr("the Hugging Face hub cannot be read: {why}", why=one_line(error)),
        hint=tr("check the network; HF_ENDPOINT=... uses a mirror."),
    )


def _values_of(error: BaseException) -> str:
    """The lines of huggingface_hub's check of a config, which name the field and its value."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _unregistered(error: KeyError) -> UserError | None:
    """A name that is in none of mmengine's registries."""
    match = _REGISTRY.search(str(error.args[0]) if error.args else "")
    if match is None:
        return None
    name, registry = match["name"], match["registry"].strip()
    near = difflib.get_close_matches(name, _registered(registry), n=1, cutoff=0.5)
    return UserError(
        tr("there is no {registry} named {name!r}", registry=registry, name=name),
        hint=tr("did you mean {near!r}?", near=near[0])
        if near
        else tr("import the class in the config and write type=TheClass."),
    )


def _registered(name: str) -> list[str]:
    """The names in one of mmengine's registries."""
    from mmengine import registry as registries

    found = [
        each
        for each in vars(registries).values()
        if isinstance(each, registries.Registry) and each.name == name
    ]
    return [word for each in found for word in each.module_dict]


def _datasets(error: BaseException) -> UserError | None:
    if "NotFound" in type(error).__name__:
        return UserError(str(error).partition("\n")[0], hint=tr("check the name or the path."))
    inner = error.__cause__ or error
    return UserError(
        tr("the data cannot be read: {why}", why=one_line(inner)),
        hint=tr("'xtuner check-custom-dataset CONFIG' names the file and the line."),
    )


def _pyarrow(error: BaseException) -> UserError | None:
    file = _file_in(error, (".parquet", ".arrow", ".csv", ".json", ".jsonl"))
    return UserError(
        tr("the data cannot be read: {why}", why=one_line(error)),
        hint=tr("'xtuner check-custom-dataset CONFIG' names the file and the line."),
        where=Where(file) if file else None,
    )


def _jinja2(error: BaseException) -> UserError | None:
    line = getattr(error, "lineno", None)
    place = tr("line {line}: ", line=line) if line else ""
    return UserError(
        tr("the tokenizer's chat template fails: {why}", why=f"{place}{one_line(error)}"),
        hint=tr("correct its chat_template, or set template to a named one (PROMPT_TEMPLATE)."),
    )


def _safetensors(error: BaseException) -> UserError | None:
    file = _file_in(error, (".safetensors",))
    number = _OS_ERROR.search(str(error))
    if number:  # while one is written
        return _of_system(int(number[1]), file)
    return UserError(
        tr("this weights file is damaged: {why}", why=one_line(error)),
        hint=_again(),
        where=Where(file) if file else None,
    )


def _pickle(error: BaseException) -> UserError | None:
    """torch's text advises to switch its protection off, so it is not quoted."""
    file = _file_in(error, (".bin", ".pt", ".pth", ".ckpt"))
    return UserError(
        tr("this file holds more than data, or is damaged; nothing from it was run."),
        hint=tr("use weights in safetensors, from a source that you trust."),
        where=Where(file) if file else None,
    )


def _tokenizers(error: BaseException) -> UserError | None:
    """The tokenizers library raises plain ``Exception`` for a file that it cannot read."""
    if not _raised_in(error, ("transformers", "tokenizers")):
        return None
    file = _file_in(error, ("tokenizer.json", ".model", ".json"))
    return UserError(
        tr("the tokenizer cannot be loaded: {why}", why=one_line(error)),
        hint=_again(),
        where=Where(file) if file else None,
    )


def _no_tokenizer(error: ValueError) -> UserError | None:
    """How transformers says that a folder has none of a tokenizer's files."""
    if "Couldn't instantiate the backend tokenizer" not in str(error):
        return None
    folder = _local(error, _MODEL_NAMES)
    return UserError(
        tr("there is no tokenizer here, or the package that reads it is missing."),
        hint=tr("copy tokenizer.json and tokenizer_config.json of the model there."),
        where=Where(folder) if folder else None,
    )


def _peft(error: BaseException) -> UserError | None:
    if type(error).__name__ != "NoMatchingPeftModuleError":
        return None
    return UserError(
        tr("the adapter is in no layer of this model: {why}", why=str(error).splitlines()[0]),
        hint=tr("set target_modules to names of its linear layers, or to 'all-linear'."),
        where=Where(key="model.lora"),
    )


def _yaml(error: BaseException) -> UserError | None:
    mark = getattr(error, "problem_mark", None)
    file = _file_in(error, (".yaml", ".yml"))
    where = Where(file, mark.line + 1 if mark else None) if file else None
    return UserError(tr("this YAML cannot be read: {why}", why=one_line(error)), where=where)


def _torch(error: BaseException) -> UserError | None:
    kind = type(error).__name__
    if kind == "OutOfMemoryError":
        return UserError(
            tr("the GPU has not enough memory: {why}", why=one_line(error)),
            hint=tr(
                "lower batch_size or max_length, use QLoRA or a smaller model, or shard the model "
                "with --deepspeed deepspeed_zero3 or --fsdp."
            ),
        )
    if kind.startswith("Dist") and "EADDRINUSE" in str(error):
        return UserError(
            tr("the port is in use."), hint=_system_hint(errno.EADDRINUSE), where=Where(key="PORT")
        )
    if kind in ("DistNetworkError", "DistStoreError"):
        return UserError(
            tr("the processes of this run cannot reach each other: {why}", why=one_line(error)),
            hint=tr(
                "check that all of them run, and MASTER_ADDR, MASTER_PORT, the network and the "
                "firewall between the machines."
            ),
        )
    return None


def _archive(error: BaseException) -> UserError:
    """Archives and compressed files that end too early."""
    file = _file_in(error, (".pth", ".pt", ".bin", ".gz", ".zip", ".xlsx", ".tar"))
    return UserError(
        tr("this file is damaged: {why}", why=one_line(error)),
        hint=_again(),
        where=Where(file) if file else None,
    )


TRANSLATORS: Mapping[str, Translator] = {
    "builtins": _system,
    "datasets": _datasets,
    "pyarrow": _pyarrow,
    "jinja2": _jinja2,
    "safetensors": _safetensors,
    "safetensors_rust": _safetensors,
    "tokenizers": _tokenizers,
    "huggingface_hub": _hub,
    "httpx": _hub,
    "requests": _hub,
    "peft": _peft,
    "yaml": _yaml,
    "_pickle": _pickle,
    "pickle": _pickle,
    "torch": _torch,
    "zipfile": _archive,
    "zlib": _archive,
    "gzip": _archive,
}
"""The translator for each package whose errors reach users, by the package of the class."""


def _frames(error: BaseException) -> Iterator[dict[str, Any]]:
    """The local variables where an error was raised, innermost first."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    yield from (frame.f_locals for frame in reversed(frames))


def _local(error: BaseException, names: tuple[str, ...]) -> str | None:
    """The text of the innermost local variable with one of these names."""
    for variables in _frames(error):
        for name in names:
            value = variables.get(name)
            if isinstance(value, str) and value:
                return value
    return None


def _file_in(error: BaseException, suffixes: tuple[str, ...]) -> str | None:
    """The existing file that the code which failed was reading, by its local variables."""
    for variables in _frames(error):
        for value in variables.values():
            if not isinstance(value, str | os.PathLike):
                continue
            path = os.fspath(value)
            if isinstance(path, str) and path.endswith(suffixes) and os.path.isfile(path):  # noqa: PTH113
                return path
    return None


def _raised_in(error: BaseException, packages: tuple[str, ...]) -> bool:
    """Whether the innermost frame is code of one of these packages."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    name = str(frames[-1].f_globals.get("__name__", "")) if frames else ""
    return name.partition(".")[0] in packages

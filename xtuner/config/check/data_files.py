"""XT0317: the data files and image folders that a config names."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xtuner.config.check.code import WARNING
from xtuner.config.check.problem import Context, Finding, rule
from xtuner.config.check.values import looks_local
from xtuner.config.values import name_of
from xtuner.utils.data_files import SUFFIXES, SUFFIXES_OF
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import N_, tr

SECTIONS = ("train_dataloader", "val_dataloader", "test_dataloader", "train_dataset")
OF_LOCAL_DATASETS = (
    *("data_path", "data_paths", "data_file", "image_folder", "image_folders", "folder"),
    "offline_processed_text_folder",
)
"""Arguments of this package's datasets that are always paths, however they are written."""
LOCAL_DATASETS = (
    *(
        "VisionLanguageDataset",
        "VisionLanguagePreferenceDataset",
        "LLaVADataset",
        "InternVL_V1_5_Dataset",
        "MOSSSFTDataset",
        "RefCOCOJsonDataset",
    ),
    *("InvRefCOCOJsonDataset", "load_intern_repo_tokenized_dataset"),
    "load_intern_repo_untokenized_dataset",
)
NO_PATHS = ("type", "pretrained_model_name_or_path", "path", "system", "field", "split")


@dataclass(frozen=True)
class Named:
    """A path that a config names: the key where it does, and the path."""

    key: str
    path: str

    @property
    def is_missing(self) -> bool:
        remote_or_pattern = "://" in self.path or any(sign in self.path for sign in "*?[")
        return not remote_or_pattern and not Path(self.path).expanduser().exists()


def named_paths(context: Context) -> Iterator[Named]:
    """The local paths that the data sections of a config name, whatever their keys are called."""
    for key, section in context.dicts():
        if not key.startswith(SECTIONS) or "data_files" in key.split("."):
            continue
        if name_of(dict.get(section, "type")) == "load_dataset":
            yield from loader_paths(context, key)
            continue
        ours = name_of(dict.get(section, "type")) in LOCAL_DATASETS
        for name in dict.keys(section):
            if name in NO_PATHS:
                continue
            for path in _texts(dict.__getitem__(section, name)):
                if looks_local(path) or _is_file_name(path) or (ours and name in OF_LOCAL_DATASETS):
                    yield Named(f"{key}.{name}", path)


def loader_paths(context: Context, key: str) -> Iterator[Named]:
    """The local paths of the ``load_dataset`` at a key."""
    path = context.get(f"{key}.path")
    reads_files = path in SUFFIXES_OF
    if looks_local(path):
        yield Named(f"{key}.path", path)
    folder = context.get(f"{key}.data_dir")
    files = context.get(f"{key}.data_files")
    if isinstance(folder, str) and (looks_local(folder) or reads_files):
        yield Named(f"{key}.data_dir", folder)
    for file in _texts(files):
        if looks_local(file) or reads_files:
            inside = isinstance(folder, str) and reads_files
            yield Named(f"{key}.data_files", str(Path(folder) / file) if inside else file)


def _texts(value: object) -> Iterator[str]:
    """The texts in a value: itself, or what a list or a dict of splits holds."""
    if isinstance(value, str):
        yield from [value] if value else []
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict) and "type" not in value:
        for name in dict.keys(value):
            yield from _texts(dict.__getitem__(value, name))


def _values(step: object) -> Iterator[str]:
    """The texts that a ``before_run`` function is called with, such as what it makes."""
    if isinstance(step, dict):
        for name in dict.keys(step):
            yield from _texts(dict.__getitem__(step, name))


def _is_file_name(text: str) -> bool:
    """Whether a text is written as the name of a data file."""
    return text.removesuffix(".gz").endswith(SUFFIXES) and not any(c.isspace() for c in text)


@rule(
    "XT0317",
    WARNING,
    N_("a data file or folder that does not exist"),
    N_(
        "A relative path counts from the folder in which the command is run. 'train' stops before "
        "it prepares any data."
    ),
    wrong="train_dataset = dict(type=load_dataset, path='json', data_files='no_such.jsonl')",
    right="train_dataset = dict(type=load_dataset, path='json', data_files='my.jsonl')",
)
def no_such_data_file(context: Context) -> Iterator[Finding]:
    made = {text for step in context.get("before_run") or [] for text in _values(step)}
    for named in dict.fromkeys(named_paths(context)):
        if named.is_missing and named.path not in made:
            shown = repr(named.path)[1:-1]
            hint = None
            if shown != named.path:  # \n and \t of a Windows path are a line break and a tab
                hint = tr("backslashes of a Windows path: write r'C:\\data' or 'C:/data'.")
            is_file = _is_file_name(named.path) or named.key.endswith("data_files")
            yield Finding(
                named.key,
                tr("there is no file '{path}'", path=shown)
                if is_file
                else tr("there is no file or folder '{path}'", path=shown),
                hint,
            )


def require_data_files(context: Context, file: str) -> None:
    """Refuse to start where data files are missing.

    Args:
        context: of the config, after its ``before_run`` has made what it makes.
        file: the config's.

    Raises:
        UserError: which names all of them.
    """
    found = list(no_such_data_file(context))
    if found:
        place = context.place(found[0].key)
        raise UserError(
            "\n".join(f"{finding.message} [{finding.key}]" for finding in found),
            hint=_hint(context, Path(file).resolve().parent),
            where=Where(file, place[0] if place else None),
        )


def _hint(context: Context, folder: Path) -> str:
    """What to do about missing files of a config in this folder."""
    missing = [named.path for named in named_paths(context) if named.is_missing]
    if any((folder / path).exists() for path in missing):
        return tr(
            "it is in the folder of the config: run the command there (cd {folder}), or write the "
            "whole path.",
            folder=shlex.quote(str(folder)),
        )
    return tr(
        "correct the path in the config; a path is seen from the folder where the "
        "command runs: {folder}",
        folder=Path.cwd(),
    )

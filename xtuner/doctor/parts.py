"""The parts of a config's dataset: which files and map functions stand behind any builder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mmengine.config.lazy import LazyAttr, LazyObject

from xtuner.dataset.file_sections import DataFiles
from xtuner.dataset.map_fns import map_function_named
from xtuner.dataset.reading import Row, Unreadable, find_files
from xtuner.dataset.sources import (
    SplitRows,
    dotted_name,
    files_of_splits,
    is_whole,
    local_files,
    name_of,
    of_split,
    paths_in,
    split_of,
)
from xtuner.doctor.layouts import AUTO, BY_MAP_FN, LAYOUTS, Layout
from xtuner.doctor.scan import Part, Rows
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

IMAGE_BUILDERS = ("LLaVADataset", "InternVL_V1_5_Dataset")
PARTS_BUILDER = "VisionLanguageDataset"
"""Reads rows whose messages have content parts."""
PAIRS_BUILDER = "VisionLanguagePreferenceDataset"
"""Reads two answers to such messages."""
RAW_BUILDERS: Mapping[str, str] = {
    "MOSSSFTDataset": "data_file",
    "RefCOCOJsonDataset": "data_path",
    "InvRefCOCOJsonDataset": "data_path",
    "load_intern_repo_tokenized_dataset": "folder",
    "load_intern_repo_untokenized_dataset": "folder",
}
"""Builders with row layouts of their own: their rows are checked for being readable, no more."""


def find_parts(dataset: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[Part]:
    """The parts of the value of ``train_dataloader.dataset``, whatever its builder.

    Args:
        dataset: the settings of the dataset, or of a part of it.
        path: the keys from the whole dataset's settings to these.

    Raises:
        UserError: when its files are missing, or it names no data.
    """
    builder = name_of(dataset.get("type", ""))
    if builder == "ConcatDataset":
        return [
            part
            for number, one in enumerate(dataset["datasets"])
            for part in find_parts(one, (*path, "datasets", str(number)))
        ]
    if builder == "build_packed_dataset":
        return find_parts(dataset["dataset_cfg"], (*path, "dataset_cfg"))
    if builder in ("process_hf_dataset", "process_ms_dataset", "build_preference_dataset"):
        drops = dataset.get("bad_rows") == "drop"
        return [replace(_text_part(builder, dataset), path=path, drops_bad_rows=drops)]
    if builder in (PARTS_BUILDER, PAIRS_BUILDER):
        drops = dataset.get("bad_rows", "drop") == "drop"
        return [replace(_parts_part(dataset), drops_bad_rows=drops)]
    if builder in IMAGE_BUILDERS:
        parts = list(_image_parts(dataset))
        has_function = len(parts) == 1 and "dataset_map_fn" in dataset
        return [replace(part, path=path if has_function else None) for part in parts]
    if builder in RAW_BUILDERS:
        return [_file_part(paths_in(dataset[RAW_BUILDERS[builder]]), layout=None)]
    return [Part(builder, _source(dataset)[1], layout=None)]


def _text_part(builder: str, dataset: Mapping[str, Any]) -> Part:
    source = dataset.get("dataset")
    if source is None:
        raise UserError(
            tr("{builder} has no 'dataset'", builder=builder),
            hint="dataset=dict(type=load_dataset, path='json', data_files=dict(train=data_path))",
        )
    name, rows = _source(source, dataset.get("split"))
    default = LAYOUTS["preference" if builder == "build_preference_dataset" else "xtuner"]
    if dataset.get("do_dataset_tokenization") is False:
        return Part(name, rows, layout=None)  # rows are tokens already
    function = dataset.get("dataset_map_fn")
    if function is None:
        return Part(name, rows, None, default)
    if name_of(function) in BY_MAP_FN and not _is_users_own(function):
        return Part(name, rows, None, BY_MAP_FN[name_of(function)])
    return Part(name, rows, resolve(function), None)


def _parts_part(dataset: Mapping[str, Any]) -> Part:
    source, function = dataset.get("dataset"), dataset.get("dataset_map_fn")
    name, rows = _source(source if source is not None else (), dataset.get("split"))
    is_own = function is not None and name_of(function) not in ("auto", AUTO.map_fn)
    map_row = resolve(function) if is_own else None
    if name_of(dataset.get("type", "")) == PAIRS_BUILDER:
        from xtuner.dataset.vision_language.pairs import PairSide

        map_row = PairSide("chosen", map_row)
    return Part(name, rows, map_row, None, has_content_parts=True)


def _is_users_own(function: object) -> bool:
    name = dotted_name(function)
    return "." in name and not name.startswith("xtuner.")


def resolve(function: Any) -> Callable[[Any], Any]:
    """A map function given as an object, its registered or dotted name, or ``dict(type=...)``."""
    if isinstance(function, str):
        return map_function_named(function)
    if isinstance(function, Mapping):
        from mmengine.config import ConfigDict

        from xtuner.registry import BUILDER

        return BUILDER.build(ConfigDict(function))  # a ConfigDict builds what is lazy in it
    return function.build() if isinstance(function, LazyObject | LazyAttr) else function


def _image_parts(dataset: Mapping[str, Any]) -> Iterator[Part]:
    """One part for each data file with its image folder."""
    files = paths_in(dataset.get("data_path") or dataset.get("data_paths"))
    folders = paths_in(dataset.get("image_folder") or dataset.get("image_folders"))
    folders = folders or [""]
    function = dataset.get("dataset_map_fn")
    is_known = name_of(function) in BY_MAP_FN and not _is_users_own(function)
    layout = BY_MAP_FN[name_of(function)] if is_known else LAYOUTS["llava"]
    for index, file in enumerate(files):
        part = _file_part([file], layout=layout)
        part.image_folder = folders[min(index, len(folders) - 1)]
        yield part


def _file_part(paths: list[str], layout: Layout | None) -> Part:
    name, rows = _files(paths)
    return Part(name, rows, layout=layout)


def _source(source: Iterable[Any], split: str | None = None) -> tuple[str, Rows]:
    """The name and rows of what a builder reads: local files, a hub dataset, or any iterable."""
    if not isinstance(source, Mapping):
        return _iterable(type(source).__name__, lambda: source)
    source = of_split(source, split)
    files = local_files(source)
    if files is not None:
        name, rows = _files(files.paths, files.field, files.delimiter)
        splits = files_of_splits(source, split)
        part = split_of(source, split)
        return name, rows if splits is None or is_whole(part) else SplitRows(splits, part)
    loader = name_of(source.get("type", ""))
    if loader != "load_dataset":
        return _iterable(loader, partial(_loaded, loader, partial(resolve, source)))
    settings = {key: value for key, value in source.items() if key != "type"}
    return _iterable(str(settings.get("path", "")), partial(_hub_rows, settings))


def _files(
    paths: list[str], field: str | None = None, delimiter: str | None = None
) -> tuple[str, Rows]:
    files = find_files(paths)
    name = files[0] if len(files) == 1 else f"{files[0]} (+{len(files) - 1})"
    return name, DataFiles(files, field, delimiter)


def _hub_rows(settings: dict[str, Any]) -> Any:
    """A hub dataset's rows as a stream, so that it need not be downloaded whole."""
    from datasets import load_dataset

    name = str(settings.get("path"))
    return _loaded(name, partial(load_dataset, **{**settings, "streaming": True}))


def _loaded(name: str, load: Callable[[], Any]) -> Any:
    """What a loader gives.

    Raises:
        UserError: when it fails, whatever it raises.
    """
    try:
        return load()
    except UserError:
        raise
    except Exception as error:  # loaders and hub clients raise many kinds
        raise UserError(
            tr("the dataset {name!r} cannot be loaded: {error}", name=name, error=error),
            hint=tr("check the name and the network, or give a local path."),
        ) from error


def _iterable(name: str, build: Callable[[], Any]) -> tuple[str, Rows]:
    def rows() -> Iterator[Row | Unreadable]:
        data = build()
        if isinstance(data, Mapping):
            data = data.get("train") or next(iter(data.values()))
        for number, value in enumerate(data, 1):
            yield Row(name, number, value)

    return name, rows

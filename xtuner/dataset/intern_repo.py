"""Data of InternLM's training code: files of tokens, packed rows that are put together when asked.

A ``.bin`` file has a line ``{"tokens": [...]}`` a row, in which the ids of tokens without loss are
negative; its ``.meta`` (numpy) has byte offset and length of each. Files stay on the disk: a row is
read when a packed row needs it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from xtuner.dataset.data_order import files_in_order
from xtuner.dataset.huggingface import process_hf_dataset
from xtuner.dataset.prepare import packing
from xtuner.registry import BUILDER
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.types import RowFunction, Tokenizer

Sample = tuple[list[int], list[int]]


class TokenRows(Protocol):
    """Rows of tokens whose lengths are known without reading them."""

    lengths: list[int]

    def sample(self, index: int) -> Sample:
        """Token ids and labels of a row."""


class TokenFile:
    """The rows of one ``.bin`` file.

    Args:
        path: the file; its ``.meta`` stands beside it.
        min_length: rows with fewer tokens are left out.

    Raises:
        UserError: when the ``.meta`` is missing or of another file.
    """

    def __init__(self, path: Path, min_length: int = 0) -> None:
        self.path = path
        meta = Path(f"{path}.meta")
        try:
            places = np.load(meta, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(
                tr("its .meta cannot be read: {error}", error=error),
                hint=tr("'xtuner preprocess ftdp' writes both files."),
                where=Where(str(path)),
            ) from error
        places = places.reshape(-1, 2)
        self.numbers = np.flatnonzero(places[:, 1] >= max(1, min_length))
        self.offsets = places[self.numbers, 0]
        self.lengths = places[self.numbers, 1].tolist()

    def sample(self, index: int) -> Sample:
        """Token ids and labels of a row."""
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[index]))
            line = file.readline()
        try:
            tokens = json.loads(line)["tokens"]
        except (ValueError, KeyError) as error:
            raise self._damaged(index) from error
        if len(tokens) != self.lengths[index]:
            raise self._damaged(index)
        ids = [abs(token) for token in tokens]
        labels = [token if token > 0 else IGNORE_INDEX for token in tokens]
        return ids, labels

    def _damaged(self, index: int) -> UserError:
        return UserError(
            tr("this row is not what .meta says"),
            where=Where(str(self.path), int(self.numbers[index]) + 1),
        )


class TokenTable:
    """The rows of a ``datasets.Dataset`` with ``input_ids``, ``labels`` and ``length``."""

    def __init__(self, table: Dataset) -> None:
        self.table = table
        self.lengths = list(table["length"])

    def sample(self, index: int) -> Sample:
        """Token ids and labels of a row."""
        row = self.table[index]
        return row["input_ids"], row["labels"]


def load_intern_repo_tokenized_dataset(
    folder: str,
    min_length: int = 0,
    data_order_path: str | None = None,
    file_type: str = ".bin",
) -> list[TokenRows]:
    """The token files of a folder.

    Args:
        folder: searched with its subfolders.
        min_length: rows with fewer tokens are left out.
        data_order_path: a file with the files' names, a line each, in their order; alphabetical
            when None.
        file_type: how their names end.

    Raises:
        UserError: when there are none, or one of the list is missing.
    """
    files = files_in_order(folder, file_type, data_order_path, all_listed=True)
    return [TokenFile(file, min_length) for file in files]


def load_intern_repo_untokenized_dataset(
    folder: str | None = None,
    tokenizer: Tokenizer | Mapping[str, Any] | None = None,
    max_length: int | None = None,
    template_map_fn: RowFunction | str | Mapping[str, Any] | None = None,
    processed_dataset_dict_path: str | None = None,
    data_order_path: str | None = None,
    file_type: str = ".json",
    dataset_map_fn: RowFunction | str | Mapping[str, Any] | None = None,
) -> list[TokenRows]:
    """Conversations of a folder, made into tokens here.

    Args:
        folder: searched with its subfolders.
        tokenizer: as ``process_hf_dataset``.
        max_length: tokens after which a row is cut.
        template_map_fn: as ``process_hf_dataset``.
        processed_dataset_dict_path: what ``xtuner preprocess`` wrote, instead of ``folder``.
        data_order_path: as ``load_intern_repo_tokenized_dataset``.
        file_type: ``.json`` or ``.jsonl``.
        dataset_map_fn: as ``process_hf_dataset``; None for ``{'conversation': [...]}`` rows.

    Raises:
        UserError: when there is no data.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk

    if processed_dataset_dict_path is not None:
        found = load_from_disk(processed_dataset_dict_path)
        tables = list(found.values()) if isinstance(found, DatasetDict) else [found]
        return [TokenTable(table) for table in tables]
    if folder is None:
        raise UserError(tr("which folder?"), where=Where(key="folder"))
    files = files_in_order(folder, file_type, data_order_path, all_listed=True)
    made = process_hf_dataset(
        {
            "type": load_dataset,
            "path": "json",
            "data_files": [str(file) for file in files],
            "split": "train",
        },
        tokenizer=tokenizer,
        max_length=max_length,
        dataset_map_fn=dataset_map_fn,
        template_map_fn=template_map_fn,
        remove_unused_columns=True,
        pack_to_max_length=False,
    )
    return [TokenTable(made)]


def build_packed_dataset(
    dataset_cfg: Mapping[str, Any] | Sequence[TokenRows],
    packed_length: int = 8192,
    seed: int = 1024,
) -> PackedDataset:
    """Pack the rows of the loaders above.

    Args:
        dataset_cfg: the config of a loader, or what it gives.
        packed_length: tokens of a packed row.
        seed: of the order in which rows are packed.
    """
    parts = BUILDER.build(dict(dataset_cfg)) if isinstance(dataset_cfg, Mapping) else dataset_cfg
    return PackedDataset(parts, packed_length, seed)


class PackedDataset(Dataset[dict[str, Any]]):
    """Whole rows put together by best fit; only what is longer than a packed row is split.

    Args:
        parts: rows of tokens.
        packed_length: tokens of a packed row.
        seed: of the order.
    """

    def __init__(self, parts: Sequence[TokenRows], packed_length: int, seed: int) -> None:
        self.parts = parts
        # A piece is (part, row of it, from token, to token).
        self.segments = [
            (part, row, start, min(start + packed_length, length))
            for part, rows in enumerate(parts)
            for row, length in enumerate(rows.lengths)
            for start in range(0, length, packed_length)
        ]
        random.Random(seed).shuffle(self.segments)
        sizes = [stop - start for _, _, start, stop in self.segments]
        packs = packing.pack_whole(sizes, packed_length)
        self.packs = [[number for number, _, _ in pack] for pack in packs]
        self.length = [sum(sizes[number] for number in pack) for pack in self.packs]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids, labels, rows = [], [], []
        for number in self.packs[index]:
            part, row, start, stop = self.segments[number]
            tokens, goals = self.parts[part].sample(row)
            ids.append(tokens[start:stop])
            labels.append(goals[start:stop])
            rows.append(row)
        whole = [(number, 0, len(piece)) for number, piece in enumerate(ids)]
        packed: dict[str, Any] = dict(packing.join(ids, labels, whole))
        return packed | {"length": len(packed["input_ids"]), "rows": rows}

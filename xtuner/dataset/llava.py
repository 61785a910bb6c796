"""Conversations about images, for LLaVA: texts are tokenized once, images read when needed."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from xtuner.dataset.huggingface import process_hf_dataset
from xtuner.dataset.image_rows import listed_files, map_rows
from xtuner.dataset.images import load_image, pixel_values, problems_of
from xtuner.dataset.json_file import read_json_rows
from xtuner.dataset.map_fns import row_function
from xtuner.registry import BUILDER
from xtuner.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from xtuner.utils.dataset_settings import require_settings
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.types import ImageProcessor, RowFunction, Tokenizer

if TYPE_CHECKING:
    from datasets import Dataset as Table

logger = logging.getLogger(__name__)
NAMED = 50
"""Bad rows that are named one by one; of more the rest is counted."""


class LLaVADataset(Dataset[dict[str, Any]]):
    """Rows ``{'image': file or files, 'conversations': [...]}``; rows without an image are text.

    Args:
        image_folder: what the files of the rows are relative to.
        image_processor: of transformers, or its config.
        data_path: a ``.json`` or ``.jsonl`` file of rows.
        tokenizer: as ``process_hf_dataset``.
        offline_processed_text_folder: what ``xtuner preprocess llava`` wrote, instead of
            ``data_path``.
        max_dataset_length: rows drawn at random when there are more.
        dataset_map_fn: as ``process_hf_dataset``.
        template_map_fn: as ``process_hf_dataset``.
        max_length: tokens of a row, an image counted as one.
        pad_image_to_square: make images square before they are scaled, so that nothing is cropped.
        bad_images: rows that are broken, or whose images are missing or no images, are left out
            and named (``drop``), or stop the run before it begins (``error``).

    Raises:
        UserError: when the data cannot be read, or no row is left.
    """

    def __init__(
        self,
        image_folder: str,
        image_processor: ImageProcessor | Mapping[str, Any] | None,
        data_path: str | None = None,
        tokenizer: Tokenizer | Mapping[str, Any] | None = None,
        offline_processed_text_folder: str | None = None,
        max_dataset_length: int | None = None,
        dataset_map_fn: RowFunction | str | Mapping[str, Any] | None = None,
        template_map_fn: RowFunction | str | Mapping[str, Any] | None = None,
        max_length: int = 2048,
        pad_image_to_square: bool = False,
        bad_images: str = "drop",
    ) -> None:
        require_settings("LLaVADataset", locals())
        self.image_folder = Path(image_folder)
        self.image_processor = (
            BUILDER.build(image_processor)
            if isinstance(image_processor, Mapping)
            else image_processor
        )
        self.pad_image_to_square = pad_image_to_square
        self.bad_images = bad_images
        wrong: dict[int, str] = {}
        if offline_processed_text_folder is not None:
            texts = _prepared_ahead(offline_processed_text_folder)
        else:
            assert data_path is not None
            rows, wrong = map_rows(self.read_rows(data_path), row_function(dataset_map_fn))
            if wrong and len(wrong) == len(rows):
                raise self._refusal(wrong, data_path)
            texts = prepare_texts(
                rows,
                tokenizer=tokenizer,
                max_length=max_length,
                template_map_fn=template_map_fn,
                max_dataset_length=max_dataset_length,
            )
        self.text_data = self._with_good_images(texts, wrong, data_path)

    def read_rows(self, data_path: str) -> list[Any]:
        """The rows of a data file, a ``BrokenRow`` in the place of one that cannot be read.

        Datasets with another layout make theirs of it.
        """
        return read_json_rows(data_path, keep_broken=True)

    def _with_good_images(
        self, texts: Table, wrong: Mapping[int, str], data_path: str | None
    ) -> Any:
        """The rows whose images are all there; the others, and those of ``wrong``, are named."""
        files = [self._files(image) for image in texts["image"]]
        flat = sorted({file for of_row in files for file in of_row})
        broken = {f: why for f, why in zip(flat, problems_of(flat), strict=True) if why}
        bad = dict(wrong)
        good = []
        numbers = _source_numbers(texts)
        for index, (of_row, marks) in enumerate(zip(files, count_images(texts), strict=True)):
            why = next((f"{file}: {broken[file]}" for file in of_row if file in broken), None)
            if why is None and marks > len(of_row):
                why = tr(
                    "{marks} <image> in the text, {count} images", marks=marks, count=len(of_row)
                )
            if why is None:
                good.append(index)
            else:
                bad[numbers[index]] = why
        if bad and (self.bad_images == "error" or not good):
            raise self._refusal(bad, data_path)
        self._warn(bad, data_path)
        return texts.select(good) if len(good) < len(texts) else texts

    @staticmethod
    def _warn(bad: Mapping[int, str], data_path: str | None) -> None:
        place = f"{data_path}: " if data_path else ""
        for line in _lines(bad)[:NAMED]:
            logger.warning(tr("left out, %s%s"), place, line)
        if len(bad) > NAMED:
            logger.warning(tr("... and %d more rows"), len(bad) - NAMED)

    @staticmethod
    def _refusal(bad: Mapping[int, str], data_path: str | None) -> UserError:
        named = "\n".join(_lines(bad)[:NAMED])
        return UserError(
            tr(
                "{count} rows are broken, or their images are:\n{named}",
                count=len(bad),
                named=named,
            ),
            hint=tr("fix image_folder or these rows, or leave them out with bad_images='drop'."),
            where=Where(data_path, key="image_folder"),
        )

    def _files(self, image: object) -> list[Path]:
        return [self.image_folder / name for name in listed_files(image)]

    @property
    def length(self) -> list[int]:
        """Tokens of each row, an image counted as one."""
        return list(self.text_data["length"])

    @property
    def modality_length(self) -> list[int]:
        """Tokens of each row, negative for rows without an image."""
        rows = zip(self.text_data["length"], self.text_data["image"], strict=True)
        return [length if image else -length for length, image in rows]

    def __len__(self) -> int:
        return len(self.text_data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.text_data[index])
        files = self._files(row.pop("image"))[: row["input_ids"].count(IMAGE_TOKEN_INDEX)]
        if not files:
            return row
        try:
            row["pixel_values"] = torch.stack([self._pixels(file) for file in files])
        except (OSError, ValueError) as error:  # of the file, or of a shape that is no picture
            self._report_broken(files, row, error)
            row["labels"] = [IGNORE_INDEX] * len(row["labels"])
            row["pixel_values"] = torch.zeros(len(files), 3, *self._image_size())
        return row

    def _pixels(self, file: Path) -> Any:
        return pixel_values(load_image(file), self.image_processor, self.pad_image_to_square)

    def _report_broken(
        self, files: Sequence[Path], row: Mapping[str, Any], error: Exception
    ) -> None:
        """A file that begins like an image and breaks off: seen only when all of it is read."""
        names = ", ".join(os.fspath(file) for file in files)
        number = "".join(str(number) for number in row.get("rows", []))
        text = tr(
            "row {number}: {names} is broken ({error})", number=number, names=names, error=error
        )
        if self.bad_images == "error":
            raise UserError(text, where=Where(key="image_folder")) from error
        logger.warning(tr("not trained on, %s"), text)

    def _image_size(self) -> tuple[int, int]:
        size: Any = self.image_processor
        crop = getattr(size, "crop_size", None) or size.size
        side = crop.get("shortest_edge", 0)
        return crop.get("height", side), crop.get("width", side)


def prepare_texts(rows: Sequence[Mapping[str, Any]], **settings: Any) -> Any:
    """Token ids and labels of rows with their images, ``<image>`` as one ``IMAGE_TOKEN_INDEX``.

    Args:
        rows: as ``map_rows`` gives them.
        settings: of ``process_hf_dataset``.

    Returns:
        A ``datasets.Dataset`` with ``input_ids``, ``labels``, ``length``, ``rows`` and ``image``
        (a list of files).
    """
    from datasets import Dataset as Table

    texts = [{key: value for key, value in row.items() if key != "image"} for row in rows]
    made = process_hf_dataset(
        Table.from_list([{"row": json.dumps(text)} for text in texts]),
        **settings,
        dataset_map_fn=_from_json,
        remove_unused_columns=True,
        pack_to_max_length=False,
        with_image_token=True,
    )
    return made.add_column("image", [rows[number]["image"] for (number,) in made["rows"]])


def _from_json(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rows are kept as text: the fields of their turns may differ from row to row."""
    value: Mapping[str, Any] = json.loads(row["row"])
    return value


def _prepared_ahead(folder: str) -> Any:
    from datasets import load_from_disk

    try:
        texts = load_from_disk(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            tr("these are no prepared texts: {error}", error=error),
            hint="xtuner preprocess llava CONFIG",
            where=Where(folder, key="offline_processed_text_folder"),
        ) from error
    missing = {"input_ids", "labels", "image"} - set(texts.column_names)
    if missing:
        raise UserError(
            tr("these texts have no {missing}", missing=", ".join(sorted(missing))),
            hint="xtuner preprocess llava CONFIG",
            where=Where(folder, key="offline_processed_text_folder"),
        )
    if "length" not in texts.column_names:
        return texts.add_column("length", [len(ids) for ids in texts["input_ids"]])
    return texts


def count_images(texts: Table) -> list[int]:
    """How many ``IMAGE_TOKEN_INDEX`` each row has."""
    import pyarrow.compute as arrow

    counts: list[int] = []
    for table in texts.select_columns(["input_ids"]).with_format("arrow").iter(10_000):
        column = table["input_ids"].combine_chunks()
        ends = arrow.list_value_length(column).to_numpy(zero_copy_only=False).cumsum()
        hits = (column.flatten().to_numpy(zero_copy_only=False) == IMAGE_TOKEN_INDEX).cumsum()
        upto = [int(hits[end - 1]) if end else 0 for end in ends]
        counts += [b - a for a, b in itertools.pairwise([0, *upto])]
    return counts


def _source_numbers(texts: Table) -> list[int]:
    """For each row its number in the data file; texts of v0.1 do not know it."""
    if "rows" not in texts.column_names:
        return list(range(len(texts)))
    return [number for (number,) in texts["rows"]]


def _lines(bad: Mapping[int, str]) -> list[str]:
    return [tr("row {n}: {why}", n=n, why=why) for n, why in sorted(bad.items())]

"""Conversations about images, for LLaVA: texts prepared ahead, images read when they are needed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from xtuner.dataset.huggingface import process_hf_dataset
from xtuner.dataset.images import load_image, pixel_values, problems_of
from xtuner.dataset.json_file import read_json_rows
from xtuner.registry import BUILDER
from xtuner.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

logger = logging.getLogger(__name__)
BAD_IMAGES = ("drop", "error")
NAMED = 50
"""Bad images that are named one by one; of more the rest is counted."""


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
        bad_images: rows whose images are missing or no images are left out and named (``drop``), or
            stop the run before it begins (``error``).

    Raises:
        UserError: when the data cannot be read, or no row is left.
    """

    def __init__(
        self,
        image_folder: str,
        image_processor: Any,
        data_path: str | None = None,
        tokenizer: Any = None,
        offline_processed_text_folder: str | None = None,
        max_dataset_length: int | None = None,
        dataset_map_fn: Any = None,
        template_map_fn: Any = None,
        max_length: int = 2048,
        pad_image_to_square: bool = False,
        bad_images: str = "drop",
    ) -> None:
        if bad_images not in BAD_IMAGES:
            raise UserError(f"bad_images={bad_images!r}", hint=f"one of: {', '.join(BAD_IMAGES)}")
        if (data_path is None) == (offline_processed_text_folder is None):
            raise UserError(
                tr(
                    "give data_path or offline_processed_text_folder",
                    "请给出 data_path 或 offline_processed_text_folder",
                ),
                where=Where(key="data_path"),
            )
        self.image_folder = Path(image_folder)
        self.image_processor = (
            BUILDER.build(image_processor)
            if isinstance(image_processor, Mapping)
            else image_processor
        )
        self.pad_image_to_square = pad_image_to_square
        self.bad_images = bad_images
        if offline_processed_text_folder is not None:
            from datasets import load_from_disk

            self.text_data = load_from_disk(offline_processed_text_folder)
        else:
            assert data_path is not None
            self.text_data = prepare_texts(
                self.read_rows(data_path),
                tokenizer=tokenizer,
                max_length=max_length,
                dataset_map_fn=dataset_map_fn,
                template_map_fn=template_map_fn,
                max_dataset_length=max_dataset_length,
            )
        self.text_data = self._with_good_images(self.text_data, data_path)

    def read_rows(self, data_path: str) -> list[dict[str, Any]]:
        """The rows of a data file; datasets with another layout make theirs of it."""
        return read_json_rows(data_path)

    def _with_good_images(self, texts: Any, data_path: str | None) -> Any:
        """The rows whose images are all there; the others are named."""
        files = [self._files(row["image"]) for row in texts.select_columns(["image"])]
        flat = sorted({file for of_row in files for file in of_row})
        wrong = {f: why for f, why in zip(flat, problems_of(flat), strict=True) if why}
        bad: list[str] = []
        good = []
        for index, of_row in enumerate(files):
            marks = texts[index]["input_ids"].count(IMAGE_TOKEN_INDEX)
            why = next((f"{file}: {wrong[file]}" for file in of_row if file in wrong), None)
            if why is None and marks > len(of_row):
                why = tr(
                    f"{marks} <image> in the text, {len(of_row)} images",
                    f"文本中有 {marks} 个 <image>，图片有 {len(of_row)} 张",
                )
            if why is None:
                good.append(index)
            else:
                bad.append(tr(f"row {texts[index]['rows'][0]}: {why}", f"第 {index} 行: {why}"))
        if bad and (self.bad_images == "error" or not good):
            raise self._refusal(bad, data_path)
        for line in bad[:NAMED]:
            logger.warning(tr("left out, %s", "丢弃，%s"), line)
        if len(bad) > NAMED:
            logger.warning(tr("... and %d more rows", "……以及另外 %d 行"), len(bad) - NAMED)
        return texts.select(good) if bad else texts

    def _refusal(self, bad: Sequence[str], data_path: str | None) -> UserError:
        named = "\n".join(bad[:NAMED])
        return UserError(
            tr(
                f"{len(bad)} rows have bad images:\n{named}",
                f"{len(bad)} 行数据的图片有问题:\n{named}",
            ),
            hint=tr(
                "mend image_folder or these rows, or leave them out with bad_images='drop'.",
                "请修正 image_folder 或这些数据，或设置 bad_images='drop' 跳过它们。",
            ),
            where=Where(data_path, key="image_folder"),
        )

    def _files(self, image: Any) -> list[Path]:
        names = [image] if isinstance(image, str) else list(image or [])
        return [self.image_folder / name for name in names]

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
        except (OSError, ValueError, SyntaxError) as error:  # as Pillow says that a file is broken
            self._report_broken(files, row, error)
            row["labels"] = [IGNORE_INDEX] * len(row["labels"])
            row["pixel_values"] = torch.zeros(len(files), 3, *self._image_size())
        return row

    def _pixels(self, file: Path) -> Any:
        return pixel_values(load_image(file), self.image_processor, self.pad_image_to_square)

    def _report_broken(self, files: Sequence[Path], row: Mapping[str, Any], error: Any) -> None:
        """A file that begins like an image and breaks off: seen only when all of it is read."""
        names = ", ".join(os.fspath(file) for file in files)
        text = tr(
            f"row {row['rows'][0]}: {names} is broken ({error})",
            f"第 {row['rows'][0]} 行: {names} 已损坏（{error}）",
        )
        if self.bad_images == "error":
            raise UserError(text, where=Where(key="image_folder")) from error
        logger.warning(tr("not trained on, %s", "不参与训练，%s"), text)

    def _image_size(self) -> tuple[int, int]:
        size = self.image_processor
        crop = getattr(size, "crop_size", None) or size.size
        side = crop.get("shortest_edge", 0)
        return crop.get("height", side), crop.get("width", side)


def prepare_texts(rows: Sequence[Mapping[str, Any]], **settings: Any) -> Any:
    """Token ids and labels of rows with their images, ``<image>`` as one ``IMAGE_TOKEN_INDEX``.

    Args:
        rows: with ``image`` (a file, several, or none) and what ``dataset_map_fn`` reads.
        settings: of ``process_hf_dataset``.

    Returns:
        A ``datasets.Dataset`` with ``input_ids``, ``labels``, ``length``, ``rows`` and ``image``
        (a list of files).
    """
    from datasets import Dataset as Table

    images = [_listed(row.get("image")) for row in rows]
    texts = [{key: value for key, value in row.items() if key != "image"} for row in rows]
    made = process_hf_dataset(
        Table.from_list([{"row": json.dumps(text)} for text in texts]),
        **settings | {"dataset_map_fn": _FromJson(settings.get("dataset_map_fn"))},
        pack_to_max_length=False,
        with_image_token=True,
    )
    return made.add_column("image", [images[number] for (number,) in made["rows"]])


class _FromJson:
    """A row function for rows kept as text: their fields may differ in type from row to row."""

    def __init__(self, function: Any) -> None:
        from xtuner.dataset.rows import row_function

        self.function = row_function(function)

    def __call__(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        value = json.loads(row["row"])
        return value if self.function is None else self.function(value)


def _listed(image: Any) -> list[str]:
    if not image:
        return []
    return [image] if isinstance(image, str) else list(image)

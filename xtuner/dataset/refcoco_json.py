"""Boxes in images: where is what a text names, and what is in a box (RefCOCO).

A row is ``{id, image, width, height, bbox: [x1, y1, x2, y2] in pixels, sents: [text, ...]}``, as
``xtuner preprocess refcoco`` writes it. Boxes are written ``{<x1><y1><x2><y2>}`` in hundredths of
the image's sides; with ``pad_image_to_square`` of the square's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from xtuner.dataset.images import load_image, pixel_values
from xtuner.dataset.json_file import BrokenRow, read_json_rows
from xtuner.dataset.llava import LLaVADataset
from xtuner.utils.constants import DEFAULT_IMAGE_TOKEN
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.types import ImageProcessor

PARTS = 100
REFER = "[refer] give me the location of {text}"
IDENTIFY = "[identify] what is this {box}"
FIELDS = ("image", "width", "height", "bbox", "sents")


def box_text(row: Mapping[str, Any], square: bool) -> str:
    """A row's box as models write it.

    Args:
        row: with ``width``, ``height`` and ``bbox`` in pixels.
        square: the image is padded to a square, which the box then refers to.
    """
    return "{" + "".join(f"<{value}>" for value in scaled_box(row, square)) + "}"


def scaled_box(row: Mapping[str, Any], square: bool) -> list[int]:
    """A row's box in hundredths, each corner within the image."""
    width, height = float(row["width"]), float(row["height"])
    left, top = 0.0, 0.0
    if square:
        side = max(width, height)
        left, top = (side - width) // 2, (side - height) // 2
        width = height = side
    x1, y1, x2, y2 = (float(value) for value in row["bbox"])
    corners = ((x1 + left) / width, (y1 + top) / height, (x2 + left) / width, (y2 + top) / height)
    return [min(PARTS, max(0, round(corner * PARTS))) for corner in corners]


class RefCOCOJsonDataset(LLaVADataset):
    """Asks for the box of each text; arguments as ``LLaVADataset``."""

    def read_rows(self, data_path: str) -> list[Any]:
        """Conversations of all boxes; what is no box stays as a ``BrokenRow``."""
        rows: list[Any] = []
        for number, row in enumerate(read_json_rows(data_path, keep_broken=True)):
            why = _problem(row)
            if why is not None:
                rows.append(BrokenRow(tr("box {number}: {why}", number=number, why=why)))
                continue
            box = box_text(row, self.pad_image_to_square)
            rows += [self.conversation(row, text, box) for text in row["sents"]]
        return rows

    def conversation(self, row: Mapping[str, Any], text: str, box: str) -> dict[str, Any]:
        """A text, answered by its box."""
        return self._row(row, REFER.format(text=text), box)

    @staticmethod
    def _row(row: Mapping[str, Any], question: str, answer: str) -> dict[str, Any]:
        return {
            "image": row["image"],
            "conversations": [
                {"from": "human", "value": f"{DEFAULT_IMAGE_TOKEN}\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }


class InvRefCOCOJsonDataset(RefCOCOJsonDataset):
    """Asks what is in each box; arguments as ``LLaVADataset``."""

    def conversation(self, row: Mapping[str, Any], text: str, box: str) -> dict[str, Any]:
        """A box, answered by a text for it."""
        return self._row(row, IDENTIFY.format(box=box), text)


class RefCOCOJsonEvalDataset(Dataset[dict[str, Any]]):
    """The questions of ``xtuner eval_refcoco``: one for each text.

    Args:
        data_path: a file of rows.
        image_folder: what their files are relative to.
        image_processor: of transformers; None leaves the images out.
        pad_image_to_square: make images square before they are scaled.
    """

    def __init__(
        self,
        data_path: str,
        image_folder: str = "",
        image_processor: ImageProcessor | Mapping[str, Any] | None = None,
        pad_image_to_square: bool = True,
    ) -> None:
        self.image_folder = image_folder
        self.image_processor = image_processor
        self.pad_image_to_square = pad_image_to_square
        self.rows = [
            {
                "id": row.get("id", number),
                "image": row["image"],
                "text": text,
                "question": REFER.format(text=text),
                "box": scaled_box(row, pad_image_to_square),
            }
            for number, row in enumerate(read_boxes(data_path))
            for text in row["sents"]
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.rows[index])
        if self.image_processor is not None:
            file = f"{self.image_folder}/{row['image']}" if self.image_folder else row["image"]
            row["pixel_values"] = pixel_values(
                load_image(file), self.image_processor, self.pad_image_to_square
            )
        return row


def read_boxes(data_path: str) -> list[dict[str, Any]]:
    """The rows of a file.

    Raises:
        UserError: naming all rows that lack a field or whose box is no box.
    """
    rows = read_json_rows(data_path, keep_broken=True)
    wrong = [
        f"{number}: {why}" for number, row in enumerate(rows) if (why := _problem(row)) is not None
    ]
    if wrong:
        named = "\n".join(wrong[:50])
        raise UserError(
            tr("{count} rows are no boxes:\n{named}", count=len(wrong), named=named),
            hint=tr("'xtuner preprocess refcoco' writes such files."),
            where=Where(data_path),
        )
    return rows


def _problem(row: object) -> str | None:
    if isinstance(row, BrokenRow):
        return row.why
    if not isinstance(row, Mapping):
        return "not an object"
    missing = [name for name in FIELDS if name not in row]
    if missing:
        return f"no {', '.join(missing)}"
    if not isinstance(row["image"], str):
        return f"image {row['image']!r}"
    texts = row["sents"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return f"sents {texts!r}"
    sides = [row["width"], row["height"]]
    if not _are_numbers(sides) or min(sides) <= 0:
        return f"width and height {sides!r}"
    box = row["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
        return f"bbox {box!r}"
    return None if box[0] < box[2] and box[1] < box[3] else f"empty bbox {box!r}"


def _are_numbers(values: Sequence[Any]) -> bool:
    """Whether all are finite numbers (JSON as Python reads it has NaN and Infinity)."""
    return all(isinstance(v, int | float) and math.isfinite(v) for v in values)

"""Conversations about images for InternVL: each image cut into tiles that fit its shape."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from xtuner.dataset.image_rows import listed_files
from xtuner.dataset.images import load_image
from xtuner.dataset.json_file import read_json_rows
from xtuner.dataset.llava import LLaVADataset
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
from xtuner.registry import BUILDER
from xtuner.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from xtuner.utils.errors import BadRowError
from xtuner.utils.lang import tr

logger = logging.getLogger(__name__)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, as InternVL's visual encoder was trained."""
MARKS = ("<img>", "<IMG_CONTEXT>", "</img>")


def choose_grid(width: int, height: int, fewest: int, most: int, size: int) -> tuple[int, int]:
    """Into how many tiles across and down an image is cut.

    The grid whose shape is nearest to the image's; of equally near ones the larger, where the image
    has more than half its pixels (InternVL 1.5, section 3.2).

    Args:
        width: of the image.
        height: likewise.
        fewest: tiles.
        most: tiles.
        size: side of a tile in pixels.
    """
    shape = width / height
    grids = sorted(
        {
            (across, down)
            for across in range(1, most + 1)
            for down in range(1, most + 1)
            if fewest <= across * down <= most
        },
        key=lambda grid: grid[0] * grid[1],
    )
    best, nearest = (1, 1), float("inf")
    for across, down in grids:
        gap = abs(shape - across / down)
        larger = gap == nearest and width * height > 0.5 * size * size * across * down
        if gap < nearest or larger:
            best, nearest = (across, down), gap
    return best


def cut(image: Image.Image, grid: tuple[int, int], size: int, thumbnail: bool) -> list[Image.Image]:
    """The tiles of an image, row by row; then, of several, the whole image as one more.

    Args:
        image: in RGB.
        grid: of ``choose_grid``.
        size: side of a tile.
        thumbnail: whether the whole image follows.
    """
    across, down = grid
    large = image.resize((across * size, down * size), Image.Resampling.BICUBIC)
    tiles = [
        large.crop((x * size, y * size, (x + 1) * size, (y + 1) * size))
        for y in range(down)
        for x in range(across)
    ]
    if thumbnail and len(tiles) > 1:
        tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
    return tiles


def to_pixels(tiles: Sequence[Image.Image]) -> Tensor:
    """(T, 3, H, W), normalised."""
    import numpy as np

    stacked = torch.stack([torch.from_numpy(np.array(tile)) for tile in tiles])
    scaled = stacked.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[None, :, None, None] for values in (MEAN, STD))
    return (scaled - mean) / std


class InternVL_V1_5_Dataset(LLaVADataset):
    """Rows ``{'image': file or files, 'conversations': [...]}`` as InternVL reads them.

    Args:
        model_path: of the model: its tokenizer and the shape of its tiles.
        template: an entry of ``PROMPT_TEMPLATE``.
        data_paths: a file of rows, or several.
        image_folders: for each file what its images are relative to.
        repeat_times: how often the rows come in an epoch, a number or one for each file.
        max_length: tokens of a row with its images; text beyond it is cut.
        bad_images: as ``LLaVADataset``.
    """

    def __init__(
        self,
        model_path: str,
        template: Mapping[str, Any] | str,
        data_paths: str | Sequence[str],
        image_folders: str | Sequence[str] | None = None,
        repeat_times: int | list[int] = 1,
        max_length: int = 8192,
        bad_images: str = "drop",
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer

        place = {"pretrained_model_name_or_path": model_path}
        config = BUILDER.build({"type": AutoConfig.from_pretrained, **place})
        tokenizer = BUILDER.build({"type": AutoTokenizer.from_pretrained, **place})
        self.tile_size = int(
            getattr(config, "force_image_size", None) or config.vision_config.image_size
        )
        side = self.tile_size // config.vision_config.patch_size
        self.tokens_per_tile = int(side**2 * config.downsample_ratio**2)
        self.fewest = int(config.min_dynamic_patch)
        self.most = int(config.max_dynamic_patch)
        self.thumbnail = bool(config.use_thumbnail)
        self.marks: list[Any] = [tokenizer.convert_tokens_to_ids(mark) for mark in MARKS]
        self.max_length = max_length
        self.sources = _sources(data_paths, image_folders, repeat_times)
        super().__init__(
            image_folder="",
            image_processor=None,
            data_path=self.sources[0][0],
            tokenizer=tokenizer,
            dataset_map_fn=llava_map_fn,
            template_map_fn=template_map_fn_factory(template),
            max_length=max_length,
            bad_images=bad_images,
        )
        self._lengths = self._measure()

    def read_rows(self, data_path: str) -> list[Any]:
        """The rows of all files, images with their folders."""
        rows = []
        for file, folder, repeats in self.sources:
            placed = [self._placed(row, folder) for row in read_json_rows(file, keep_broken=True)]
            rows += placed * repeats
        return rows

    @staticmethod
    def _placed(row: Mapping[str, object], folder: str) -> Any:
        """The row with its images' folder; what is wrong with a row is found later."""
        try:
            names = listed_files(row.get("image"))
        except (AttributeError, BadRowError):
            return row
        return {**row, "image": [str(Path(folder) / name) for name in names]}

    def _measure(self) -> list[int]:
        """Tokens of each row with its tiles, by the sizes in the images' headers."""
        lengths = []
        for row in self.text_data.select_columns(["length", "image"]):
            tiles = sum(self._tiles(file) for file in row["image"])
            marks = len(row["image"])  # of the three marks of an image one is counted already
            lengths.append(row["length"] + tiles * self.tokens_per_tile + marks)
        too_long = sum(length > self.max_length for length in lengths)
        if too_long:
            logger.warning(
                tr("%d rows are longer than max_length=%d with their images: their text is cut"),
                too_long,
                self.max_length,
            )
        return [min(length, self.max_length) for length in lengths]

    def _tiles(self, file: str) -> int:
        with Image.open(file) as image:
            across, down = self._grid(image)
        count = across * down
        return count + 1 if self.thumbnail and count > 1 else count

    def _grid(self, image: Image.Image) -> tuple[int, int]:
        return choose_grid(*image.size, self.fewest, self.most, self.tile_size)

    @property
    def length(self) -> list[int]:
        """Tokens of each row with its images."""
        return self._lengths

    @property
    def modality_length(self) -> list[int]:
        """Tokens of each row, negative for rows without an image."""
        images = self.text_data["image"]
        return [n if image else -n for n, image in zip(self._lengths, images, strict=True)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.text_data[index])
        files = [Path(file) for file in row.pop("image")]
        files = files[: row["input_ids"].count(IMAGE_TOKEN_INDEX)]
        if not files:
            return row
        try:
            images = [load_image(file) for file in files]
            tiles = [cut(i, self._grid(i), self.tile_size, self.thumbnail) for i in images]
        except (OSError, ValueError) as error:
            self._report_broken(files, row, error)
            row["labels"] = [IGNORE_INDEX] * len(row["labels"])
            blank = Image.new("RGB", (self.tile_size, self.tile_size))
            tiles = [[blank] for _ in files]
        row["pixel_values"] = torch.cat([to_pixels(each) for each in tiles])
        self._expand(row, [len(each) for each in tiles])
        return row

    def _expand(self, row: dict[str, Any], tiles: Sequence[int]) -> None:
        """Put the marks and context tokens of each image in its place; cut what is too long."""
        start, context, stop = self.marks
        waiting = iter(tiles)
        ids: list[int] = []
        labels: list[int] = []
        last_image = 0
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            if token != IMAGE_TOKEN_INDEX:
                ids.append(token)
                labels.append(label)
                continue
            ids += [start, *[context] * (next(waiting) * self.tokens_per_tile), stop]
            labels += [IGNORE_INDEX] * (len(ids) - len(labels))
            last_image = len(ids)
        limit = max(self.max_length, last_image)  # an image is never cut
        row["input_ids"], row["labels"] = ids[:limit], labels[:limit]
        row["length"] = len(row["input_ids"])


def _sources(
    data_paths: str | Sequence[str],
    image_folders: str | Sequence[str] | None,
    repeat_times: int | list[int],
) -> list[tuple[str, str, int]]:
    files = [data_paths] if isinstance(data_paths, str) else list(data_paths)
    folders = [image_folders] if isinstance(image_folders, str) else list(image_folders or [""])
    folders = folders * len(files) if len(folders) == 1 else folders
    repeats = [repeat_times] * len(files) if isinstance(repeat_times, int) else list(repeat_times)
    return list(zip(files, folders, repeats, strict=True))

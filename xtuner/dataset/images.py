"""Reading images: from a path, a URL or base64, made square, checked before the training."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from xtuner.utils.lang import tr
from xtuner.utils.types import ImageProcessor

Color = tuple[int, int, int]
READERS = 8
"""Threads that look at image headers: it is waiting for the disk, not work."""


def load_image(image_file: str | os.PathLike[str]) -> Image.Image:
    """Read an image in RGB.

    Args:
        image_file: a path, or an ``http(s)`` address.

    Raises:
        OSError: when it is missing, no image, damaged, or too large to be one.
    """
    try:
        return _read(os.fspath(image_file))
    except OSError:
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise OSError(f"it cannot be decoded: {error}") from error


def _read(text: str) -> Image.Image:
    if text.startswith(("http://", "https://")):
        from urllib.request import urlopen

        with urlopen(text, timeout=30) as answer:
            return to_rgb(Image.open(io.BytesIO(answer.read())))
    with Image.open(text) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image in RGB; 16 bits a channel are scaled to 8.

    Raises:
        OSError: when it has so many pixels that it is no photograph but a decompression bomb.
    """
    limit = Image.MAX_IMAGE_PIXELS or 0
    if limit and image.width * image.height > limit:
        raise OSError(
            f"it has {image.width:,} x {image.height:,} pixels; more than {limit:,} are refused"
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float32)
        scale = 257.0 if values.max(initial=0) > 255 or image.mode != "I" else 1.0
        image = Image.fromarray((values / scale).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def decode_base64_to_image(text: str) -> Image.Image:
    """An image from base64."""
    return to_rgb(Image.open(io.BytesIO(base64.b64decode(text))))


def expand2square(image: Image.Image, background_color: Color) -> Image.Image:
    """Put an image in the middle of a square of one color.

    Args:
        image: of any size.
        background_color: of what is added.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), background_color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def mean_color(image_processor: ImageProcessor) -> Color:
    """The color that an image processor turns into zeros."""
    red, green, blue = (int(value * 255) for value in image_processor.image_mean)
    return red, green, blue


def pixel_values(image: Image.Image, image_processor: Any, square: bool) -> Any:
    """(3, H, W) of an image as a visual encoder wants it."""
    if square:
        image = expand2square(image, mean_color(image_processor))
    return image_processor(image, return_tensors="pt")["pixel_values"][0]


def problems_of(files: Sequence[Path]) -> list[str | None]:
    """For each file what is wrong with it, None where it begins like an image.

    Args:
        files: read by their headers alone, several at a time.
    """
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(_problem_of, files))


def _problem_of(file: Path) -> str | None:
    try:
        with Image.open(file) as image:
            too_large = image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf"))
            return tr("has too many pixels") if too_large else None
    except UnidentifiedImageError:
        return tr("is no image")
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # damaged headers make Pillow's decoders raise nearly anything
        return str(error)

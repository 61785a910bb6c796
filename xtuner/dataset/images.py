"""Reading images: from a path, a URL or base64, made square, checked before the training."""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from xtuner.utils.lang import tr
from xtuner.utils.types import ImageProcessor

warnings.filterwarnings("ignore", module=r"PIL\.")  # our errors say what is wrong with an image

Color = tuple[int, int, int]
Size = tuple[int, int]
"""Width and height in pixels."""
READERS = 8
"""Threads that look at image headers: it is waiting for the disk, not work."""
SMALLER_FIRST = 3.0
"""How much larger than needed Pillow may leave an image before it is resampled carefully."""
NOT_READ = ("EPS",)
"""Formats of Pillow that start another program."""
ORIENTATION = 0x0112
"""The EXIF tag."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What shows an image upright, by its EXIF orientation."""
ON_THEIR_SIDE = (5, 6, 7, 8)
"""Orientations that exchange width and height."""


def load_image(image_file: str | os.PathLike[str], upright: bool = False) -> Image.Image:
    """Read an image in RGB.

    Args:
        image_file: a path, or an ``http(s)`` address.
        upright: turn it as its EXIF orientation says.

    Raises:
        OSError: when it is missing, no image, damaged, or too large to be one.
    """
    text = os.fspath(image_file)
    source: Path | IO[bytes] = Path(text)
    if text.startswith(("http://", "https://")):
        from urllib.request import urlopen

        with urlopen(text, timeout=30) as answer:
            source = io.BytesIO(answer.read())
    return decode_image(source, upright=upright)


def decode_image(source: Path | IO[bytes] | Image.Image, upright: bool = True) -> Image.Image:
    """Decode an image in RGB.

    Args:
        source: a file, an open one, or an image.
        upright: turn it as its EXIF orientation says.

    Raises:
        OSError: when it is missing, no image, damaged, or too large to be one.
    """
    try:
        with open_image(source) as image:
            turn = TURNS.get(_orientation(image)) if upright else None
            decoded = to_rgb(image)
            return decoded if turn is None else decoded.transpose(turn)
    except UnidentifiedImageError as error:
        raise OSError(tr("is no image")) from error
    except Image.DecompressionBombError as error:
        raise OSError(tr("has too many pixels")) from error
    except OSError:
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise OSError(f"it cannot be decoded: {error}") from error


def open_image(source: Path | IO[bytes] | Image.Image) -> Image.Image:
    """Open an image without decoding it.

    Args:
        source: a file, an open one, or an image, which is copied.
    """
    if isinstance(source, Image.Image):
        return source.copy()
    Image.init()
    return Image.open(source, formats=[name for name in Image.OPEN if name not in NOT_READ])


def read_size(source: Path | IO[bytes] | Image.Image) -> Size:
    """The size of an image that is shown upright, by its header alone.

    Args:
        source: as for ``decode_image``.

    Raises:
        OSError: with what is wrong with it, in words.
    """
    try:
        with open_image(source) as image:
            width, height = image.size
            if width * height > (Image.MAX_IMAGE_PIXELS or float("inf")):
                raise OSError(tr("has too many pixels"))
            if not width * height:
                raise OSError(tr("is no image"))
            return (height, width) if _orientation(image) in ON_THEIR_SIDE else (width, height)
    except UnidentifiedImageError as error:
        raise OSError(tr("is no image")) from error
    except OSError as error:
        raise OSError(error.strerror or str(error)) from error
    except Exception as error:  # damaged headers make Pillow's decoders raise nearly anything
        raise OSError(str(error)) from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, as far as it is known before the image is decoded."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # looking for it behind the pixels would decode them
    try:
        found = image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data make it raise nearly anything
        return 1
    return found if isinstance(found, int) else 1


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


def scaled_image(image: Image.Image, size: Size) -> Image.Image:
    """An image in another size."""
    if image.size == size:
        return image
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=SMALLER_FIRST)


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
        read_size(file)
    except OSError as error:
        return str(error)
    return None

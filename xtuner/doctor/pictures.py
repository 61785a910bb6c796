"""Images of a sample as they are shown: small, inside the page itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 160
"""Pixels of a side of a small image, at most."""


@dataclass(frozen=True)
class Picture:
    """An image: its own size in pixels, and a small copy as a data URI."""

    width: int
    height: int
    uri: str

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"


def picture(image: Image) -> Picture:
    """An image as it is shown."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=80)
    data = base64.b64encode(stream.getvalue()).decode()
    return Picture(image.width, image.height, f"data:image/jpeg;base64,{data}")


def pictures_of(samples: Sequence[Sequence[Image]]) -> list[list[Picture]]:
    """The images of each sample of a row of ``VisionLanguageDataset``."""
    return [list(map(picture, images)) for images in samples]

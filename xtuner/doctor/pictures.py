"""Images of a sample as they are shown: small, inside the page itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from xtuner.dataset.videos import Clip
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from xtuner.dataset.vision_language.dataset import Visual

SIDE = 160
"""Pixels of a side of a small image, at most."""
FRAMES_SHOWN = 4


@dataclass(frozen=True)
class Picture:
    """An image: its own size in pixels, and a small copy as a data URI.

    Of a video some frames are shown side by side; ``frames`` says how many are used.
    """

    width: int
    height: int
    uri: str
    frames: int = 0

    def __str__(self) -> str:
        size = f"{self.width} x {self.height}"
        return (
            tr("{frames} frames of {size}", frames=self.frames, size=size) if self.frames else size
        )


def picture(image: Visual) -> Picture:
    """An image or a video as it is shown."""
    shown = list(image.frames) if isinstance(image, Clip) else [image]
    step = -(-len(shown) // FRAMES_SHOWN)
    small = [_small(each) for each in shown[::step]]
    sheet = Image.new("RGB", (sum(each.width for each in small), small[0].height))
    for number, each in enumerate(small):
        sheet.paste(each, (number * small[0].width, 0))
    stream = io.BytesIO()
    sheet.save(stream, "JPEG", quality=80)
    data = base64.b64encode(stream.getvalue()).decode()
    frames = len(shown) if isinstance(image, Clip) else 0
    return Picture(*shown[0].size, f"data:image/jpeg;base64,{data}", frames)


def _small(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    return small


def pictures_of(samples: Sequence[Sequence[Visual]]) -> list[list[Picture]]:
    """The images and videos of each sample of a row of ``VisionLanguageDataset``."""
    return [list(map(picture, images)) for images in samples]

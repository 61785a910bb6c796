"""What a row may give as an image: a path, an address, a data URI, base64, bytes, an image."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import Image

from xtuner.dataset.prepare.cache import cache_folder
from xtuner.utils.errors import BadRowError
from xtuner.utils.files import written_aside
from xtuner.utils.lang import tr

SCHEMES = ("http://", "https://")
KEYS = ("path", "url", "image", "image_url", "file", "source")
"""Keys of an object that hold what the image is."""
BASE64_KEYS = ("base64", "data")
LONGEST_PATH = 1024
"""Characters; a longer text is base64."""
LARGEST_DOWNLOAD = 256 << 20
SECONDS = 60
_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk0|SUkq|TU0AK)[A-Za-z0-9+/\s]*=*")
"""The beginnings of JPEG, PNG, GIF, WebP, BMP and TIFF files in base64."""


@dataclass(frozen=True)
class ImageRef:
    """An image that is not opened yet.

    Attributes:
        place: a path as the row has it, or an address; of an image in memory only its name.
        data: the bytes of a file.
        image: an image that is decoded already.
    """

    place: str = ""
    data: bytes = b""
    image: Image.Image | None = None

    def __str__(self) -> str:
        if self.place:
            return self.place
        return tr("an image of {count:,} bytes", count=len(self.data)) if self.data else "image"

    def file(self, folder: Path) -> Path | None:
        """The file of the image; None where it is in memory.

        Args:
            folder: what relative paths are relative to.

        Raises:
            BadRowError: for a relative path that leaves the folder.
            OSError: when it cannot be downloaded.
        """
        if self.data or self.image is not None:
            return None
        if self.place.startswith(SCHEMES):
            return _downloaded(self.place)
        path = Path(self.place)
        if not path.is_absolute() and os.path.normpath(self.place).startswith(".."):
            raise BadRowError(tr("{place} is outside image_folder", place=self.place))
        return folder / path

    def open(self, folder: Path) -> Path | IO[bytes] | Image.Image:
        """What ``images.open_image`` takes.

        Args:
            folder: as for ``file``.
        """
        if self.image is not None:
            return self.image
        return self.file(folder) or io.BytesIO(self.data)


def image_ref(value: object) -> ImageRef:
    """An image from any value that rows have.

    Args:
        value: a path, an address, a data URI, base64, bytes, an image of Pillow, or an object that
            has one of these, such as ``{"bytes": ..., "path": ...}``.

    Raises:
        BadRowError: for anything else.
    """
    if isinstance(value, Image.Image):
        return ImageRef(image=value)
    if isinstance(value, bytes) and value:
        return ImageRef(data=value)
    if isinstance(value, str) and value:
        return _from_text(value)
    if isinstance(value, Mapping):
        if value.get("bytes"):
            return ImageRef(str(value.get("path") or ""), bytes(value["bytes"]))
        for key in BASE64_KEYS:
            if isinstance(value.get(key), str):
                return ImageRef(data=_decoded(value[key].rpartition("base64,")[2]))
        for key in KEYS:
            if value.get(key):
                return image_ref(value[key])
    raise BadRowError(tr("its image is {value}, which is no image", value=f"{value!r:.60}"))


def _from_text(text: str) -> ImageRef:
    if text.startswith("data:"):
        head, mark, data = text.partition(",")
        if not mark or not head.endswith("base64"):
            raise BadRowError(tr("{uri}... is no data URI in base64", uri=text[:40]))
        return ImageRef(data=_decoded(data))
    if text.startswith("file://"):
        return ImageRef(urllib.request.url2pathname(text.removeprefix("file://")))
    if len(text) > LONGEST_PATH or (len(text) > 64 and _BASE64.fullmatch(text)):
        return ImageRef(data=_decoded(text))
    if "\0" in text:
        raise BadRowError(tr("its image is {value}, which is no image", value=f"{text!r:.60}"))
    return ImageRef(text)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRowError(tr("its image is no base64: {error}", error=error)) from error


def _downloaded(address: str) -> Path:
    """The file of an address, which is downloaded once.

    Raises:
        OSError: when it cannot be.
    """
    file = cache_folder().parent / "images" / hashlib.sha256(address.encode()).hexdigest()
    if file.exists():
        return file
    with urllib.request.urlopen(address, timeout=SECONDS) as answer:
        data = answer.read(LARGEST_DOWNLOAD + 1)
    if len(data) > LARGEST_DOWNLOAD:
        raise OSError(tr("it has more than {count:,} bytes", count=LARGEST_DOWNLOAD))
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(file) as aside:
        aside.write_bytes(data)
    return file

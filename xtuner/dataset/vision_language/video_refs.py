"""What a row may give as a video: a file, a folder of frames or a list of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TypeVar

from PIL import Image

from xtuner.dataset.images import decode_image, read_size, scaled_image
from xtuner.dataset.prepare.cache import cache_folder
from xtuner.dataset.videos import (
    Clip,
    FrameSampling,
    VideoShape,
    read_frames,
    read_header,
    rounded_fps,
)
from xtuner.dataset.vision_language.image_refs import ImageRef, image_ref
from xtuner.utils.errors import BadRowError
from xtuner.utils.files import written_aside
from xtuner.utils.lang import tr

KEYS = ("video", "video_url", "path", "url", "file", "source", "frames")
"""Keys of an object that hold what the video is."""
FPS_KEYS = ("fps", "sample_fps", "raw_fps")
FPS_OF_FRAMES = 2.0
"""Frames per second of a list of frames that does not say it."""
T = TypeVar("T")


@dataclass(frozen=True)
class VideoRef:
    """A video that is not opened yet.

    Attributes:
        source: its file, or a folder of images; None of a list of frames.
        frames: images.
        fps: of the frames, per second; None where the row does not say it.
    """

    source: ImageRef | None = None
    frames: tuple[ImageRef, ...] = ()
    fps: float | None = None

    def __str__(self) -> str:
        if self.source is None:
            return tr("a video of {count} frames", count=len(self.frames))
        return str(self.source)

    @property
    def place(self) -> str:
        """Path or address of the file or the first frame; empty where it is in memory."""
        return (self.source or self.frames[0]).place

    def shape(self, folder: Path, sampling: FrameSampling) -> VideoShape:
        """Measure it by its header, or that of its first frame.

        Args:
            folder: what relative paths are relative to.
            sampling: which frames are used.

        Raises:
            OSError: when it cannot be read.
            BadRowError: as ``ImageRef.file``.
        """
        found = self._found(folder)
        if isinstance(found, Path):
            width, height, count, fps, _ = read_header(found)
        else:
            (width, height), *_ = [_named(read_size, frame, folder) for frame in found]
            count, fps = len(found), rounded_fps(self.fps or FPS_OF_FRAMES)
        return VideoShape(width, height, count, fps, sampling.of(count, fps))

    def clip(self, folder: Path, shape: VideoShape) -> Clip:
        """Decode the used frames.

        Args:
            folder: as for ``shape``.
            shape: as measured, or in another size, to which frames are scaled.

        Raises:
            OSError: when it cannot be read.
        """
        found = self._found(folder)
        if isinstance(found, Path):
            frames = read_frames(found, shape)
        else:
            frames = [_named(decode_image, found[number], folder) for number in shape.used]
        return Clip(shape, [scaled_image(frame, shape[:2]) for frame in frames])

    def _found(self, folder: Path) -> Path | tuple[ImageRef, ...]:
        """The file, or the frames."""
        if self.source is None:
            return self.frames
        file = self.source.file(folder)
        if file is None:
            return _written(self.source.data)
        return _frames_in(file) if file.is_dir() else file


def video_ref(value: object) -> VideoRef:
    """A video from any value that rows have.

    Args:
        value: a path, an address, a data URI, bytes, a list of images, or an object that has one of
            these and may have ``fps``.

    Raises:
        BadRowError: for anything else.
    """
    if isinstance(value, list | tuple) and value:
        return VideoRef(frames=tuple(map(image_ref, value)))
    if isinstance(value, Mapping) and not value.get("bytes"):
        fps = next((value[key] for key in FPS_KEYS if value.get(key)), None)
        for key in KEYS:
            if value.get(key):
                found = video_ref(value[key])
                return replace(found, fps=found.fps or (float(fps) if fps else None))
    if isinstance(value, str | bytes | Mapping) and value:
        return VideoRef(image_ref(value))
    raise BadRowError(tr("its video is {value}, which is no video", value=f"{value!r:.60}"))


def _frames_in(folder: Path) -> tuple[ImageRef, ...]:
    """The images of a folder in the order of their names, 2 before 10.

    Raises:
        OSError: when there are none.
    """
    Image.init()
    files = [each for each in folder.iterdir() if each.suffix.lower() in Image.EXTENSION]
    if not files:
        raise OSError(tr("is a folder without images"))
    files.sort(
        key=lambda file: [
            (int(part), "") if part.isdecimal() else (0, part)
            for part in re.split(r"(\d+)", file.name)
        ]
    )
    return tuple(ImageRef(str(file.absolute())) for file in files)


def _named(read: Callable[[Path | IO[bytes] | Image.Image], T], frame: ImageRef, folder: Path) -> T:
    """Read a frame.

    Raises:
        OSError: when it cannot be read, with its name.
    """
    try:
        return read(frame.open(folder))
    except OSError as error:
        raise OSError(f"{frame}: {error.strerror or error}") from error


def _written(data: bytes) -> Path:
    """A file with these bytes: OpenCV reads nothing else."""
    file = cache_folder().parent / "videos" / hashlib.sha256(data).hexdigest()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(file) as aside:
            aside.write_bytes(data)
    return file

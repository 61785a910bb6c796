"""What a row may give as a video: a file or a list of frames."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from xtuner.dataset.images import decode_image, read_size
from xtuner.dataset.prepare.cache import cache_folder
from xtuner.dataset.videos import FrameSampling, VideoShape, read_frames, read_header, rounded_fps
from xtuner.dataset.vision_language.image_refs import ImageRef, image_ref
from xtuner.utils.errors import BadRowError
from xtuner.utils.files import written_aside
from xtuner.utils.lang import tr

KEYS = ("video", "video_url", "path", "url", "file", "source", "frames")
"""Keys of an object that hold what the video is."""
FPS_KEYS = ("fps", "sample_fps", "raw_fps")
FPS_OF_FRAMES = 2.0
"""Frames per second of a list of frames that does not say it."""


@dataclass(frozen=True)
class VideoRef:
    """A video that is not opened yet.

    Attributes:
        source: its file; None of a list of frames.
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
        if self.source is None:
            (width, height), *_ = [read_size(frame.open(folder)) for frame in self.frames]
            count, fps = len(self.frames), rounded_fps(self.fps or FPS_OF_FRAMES)
        else:
            width, height, count, fps, _ = read_header(self._file(folder))
        return VideoShape(width, height, count, fps, sampling.of(count, fps))

    def read(self, folder: Path, shape: VideoShape) -> list[Image.Image]:
        """Decode the used frames.

        Args:
            folder: as for ``shape``.
            shape: as measured.

        Raises:
            OSError: when it cannot be read.
        """
        if self.source is None:
            return [decode_image(self.frames[number].open(folder)) for number in shape.used]
        return read_frames(self._file(folder), shape)

    def _file(self, folder: Path) -> Path:
        assert self.source is not None
        file = self.source.file(folder)
        return _written(self.source.data) if file is None else file


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
    source = image_ref(value)
    if source.image is not None:
        raise BadRowError(tr("its video is {value}, which is no video", value=f"{value!r:.60}"))
    return VideoRef(source)


def _written(data: bytes) -> Path:
    """A file with these bytes: OpenCV reads nothing else."""
    file = cache_folder().parent / "videos" / hashlib.sha256(data).hexdigest()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(file) as aside:
            aside.write_bytes(data)
    return file

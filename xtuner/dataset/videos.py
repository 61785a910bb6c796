"""Reading videos: headers and frames by OpenCV, and which frames of a video are used."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

QUIET = {"OPENCV_FFMPEG_LOGLEVEL": "-8", "OPENCV_FFMPEG_CAPTURE_OPTIONS": "protocol_whitelist;file"}
"""FFmpeg prints nothing, and reads nothing but files."""
FPS = 24.0
"""Of a file that does not say it."""
PRECISION = 1000
"""Frames per second are kept as a whole number of such parts."""


class VideoShape(NamedTuple):
    """What of a video decides which tokens stand for it.

    Attributes:
        width, height: pixels of a frame.
        total: frames of the whole video.
        fps: frames per second, in whole parts of ``1 / PRECISION``.
        used: numbers of the frames that are used, ascending.
    """

    width: int
    height: int
    total: int
    fps: float
    used: tuple[int, ...] = ()


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are used: evenly spread over it.

    Attributes:
        frames: at most so many.
        fps: so many of each second, where that is fewer; None: ``frames`` of each video.
        exactly: take ``frames`` of each video, of a short one some twice.
    """

    frames: int = 16
    fps: float | None = 2.0
    exactly: bool = False

    def of(self, count: int, fps: float) -> tuple[int, ...]:
        """The numbers of the frames used.

        Args:
            count: frames of the video.
            fps: its frames per second.
        """
        number = self.frames
        if not self.exactly:
            wanted = number if self.fps is None else round(count / fps * self.fps)
            number = max(1, min(number, wanted, count))
        return tuple(np.linspace(0, count - 1, number).round().astype(int).tolist())


@dataclass(frozen=True)
class Clip:
    """The frames of a video that are used, decoded.

    Attributes:
        shape: of the video; the frames have its width and height.
        frames: in RGB, one for each of ``shape.used``.
    """

    shape: VideoShape
    frames: Sequence[Image.Image]

    def array(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """(T, H, W, 3) of the frames."""
        return np.stack([np.asarray(frame) for frame in self.frames])


Visual = Image.Image | Clip
"""An image or a video, decoded."""


def blank_clip(shape: VideoShape) -> Clip:
    """A black video."""
    black = Image.new("RGB", shape[:2])
    return Clip(shape, [black] * len(shape.used))


def rounded_fps(fps: float) -> float:
    """Frames per second as they are kept."""
    return max(1, round(fps * PRECISION)) / PRECISION


def read_header(file: Path) -> VideoShape:
    """What a video file says of itself, and whether its first frame can be decoded.

    Args:
        file: of any format that FFmpeg reads.

    Raises:
        OSError: when it is missing, no video, or damaged.
        UserError: when OpenCV is missing.
    """
    with _opened(file) as (cv2, capture):
        found, frame = capture.read()
        if not found:
            raise OSError(tr("is no video"))
        height, width = frame.shape[:2]
        if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise OSError(tr("has too many pixels"))
        count, fps = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
        if count < 1:  # a stream, which does not say it
            count = 1
            while capture.grab():
                count += 1
        if not 0 < fps < math.inf:
            fps = FPS
        return VideoShape(width, height, int(count), rounded_fps(fps))


def read_frames(file: Path, shape: VideoShape) -> list[Image.Image]:
    """Decode the used frames of a video.

    Args:
        file: as for ``read_header``.
        shape: of the file, with ``used``.

    Returns:
        Images in RGB, upright, in their own size.

    Raises:
        OSError: when it is missing, no video, or breaks off.
        UserError: when OpenCV is missing.
    """
    frames: list[Image.Image] = []
    wanted = set(shape.used)
    last = max(wanted)
    with _opened(file) as (cv2, capture):
        number = -1
        while number < last and capture.grab():
            number += 1
            if number in wanted:
                found, frame = capture.retrieve()
                if not found:
                    raise OSError(tr("has a damaged frame"))
                image = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
                frames += [image] * shape.used.count(number)
    if not frames or number < last - shape.fps:  # containers without an index round their count
        raise OSError(
            tr("breaks off after {count} of {total} frames", count=number + 1, total=shape.total)
        )
    return frames + frames[-1:] * (len(shape.used) - len(frames))


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, Any]]:
    """OpenCV and an open video."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            tr("videos are read with OpenCV, which cannot be imported: {error}", error=error),
            hint="pip install opencv-python-headless",
        ) from error
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    log: Any = cv2.utils.logging
    level = log.getLogLevel()
    log.setLogLevel(log.LOG_LEVEL_SILENT)  # what is wrong is said by our error
    capture: Any = cv2.VideoCapture(str(file), cv2.CAP_FFMPEG)
    try:
        if not capture.isOpened():
            raise OSError(tr("is no video"))
        yield cv2, capture
    finally:
        capture.release()
        log.setLogLevel(level)

"""The text that a processor writes for a video, by its shape alone.

A blank video of each size and number of frames is processed once; what the text says about time is
written for each video.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import ProcessorMixin
from transformers.video_utils import VideoMetadata

from xtuner.dataset.videos import Clip, FrameSampling, VideoShape, blank_clip
from xtuner.tokenization.processor import MissingVideoProcessor
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

GRID = "video_grid_thw"
"""What a model takes of the patches of videos: in time, height and width."""
WITHOUT_PIXELS = {"do_rescale": False, "do_normalize": False}
"""Settings of video processors that change no shape."""


class VideoTexts:
    """The videos of a processor.

    Args:
        processor: of transformers.
        settings: of its video processor, in a call of ``processor``.
    """

    def __init__(self, processor: ProcessorMixin, settings: Mapping[str, Any]) -> None:
        self.processor: Any = processor
        self.settings = dict(settings)
        self._made: dict[tuple[int, int, int], dict[str, Any]] = {}

    @property
    def are_taken(self) -> bool:
        """Whether the processor has a place for videos in a text."""
        token = getattr(self.processor, "video_token", None)
        return bool(token) and hasattr(self.processor, "video_processor")

    def require(self) -> None:
        """Refuse videos where the processor takes none.

        Raises:
            UserError: when it has no place for them, or needs torchvision for them.
        """
        if not self.are_taken:
            raise UserError(
                tr("{kind} takes no videos.", kind=type(self.processor).__name__),
                hint=tr("give their frames as images, or leave these rows out."),
                where=Where(key="processor"),
            )
        if isinstance(self.processor.video_processor, MissingVideoProcessor):
            self.processor.video_processor.preprocess([])

    @property
    def differ_from_images(self) -> bool:
        """Whether the model takes them as other arguments than images."""
        parts = self.processor.image_processor, self.processor.video_processor
        return set.isdisjoint(*(set(part.model_input_names) for part in parts))

    def sampling(self, wanted: FrameSampling) -> FrameSampling:
        """Which frames of a video are used."""
        return replace(wanted, exactly=self.need_equal_lengths)

    @functools.cached_property
    def need_equal_lengths(self) -> bool:
        """Whether all videos must have the same number of frames: the model takes them stacked."""
        shapes = [VideoShape(56, 56, count, 1.0, tuple(range(count))) for count in (2, 4)]
        try:
            self._processed(list(map(blank_clip, shapes)))
        except (ValueError, RuntimeError):
            return True
        return False

    def text(self, shape: VideoShape) -> str:
        """What the placeholder of a video becomes; with times of frames, for some processors.

        Raises:
            ValueError: when the processor refuses it.
        """
        key = (shape.width, shape.height, len(shape.used))
        if key not in self._made:
            try:
                made = self._processed([blank_clip(shape)])
            except (ValueError, ArithmeticError, RuntimeError) as error:
                width, height, count = key
                what = tr(
                    "a video of {count} frames of {width} x {height} pixels",
                    width=width,
                    height=height,
                    count=count,
                )
                raise ValueError(f"{what}: {error}") from error
            self._made[key] = {name: _without_pixels(value) for name, value in made.items()}
        made = {**self._made[key], "video_metadata": [VideoMetadata(**_metadata(shape))]}
        return str(self.processor.replace_video_token(made, video_idx=0, **self.settings))

    def _processed(self, clips: Sequence[Clip]) -> dict[str, Any]:
        arguments = {**self.settings, **arguments_of(clips), **WITHOUT_PIXELS}
        arguments |= {"return_tensors": "pt", "return_metadata": True}
        return dict(self.processor.video_processor(arguments.pop("videos"), **arguments))


def arguments_of(clips: Sequence[Clip]) -> dict[str, Any]:
    """What a processor is given of videos; the dataset has chosen their frames."""
    return {
        "videos": [clip.array() for clip in clips],
        "video_metadata": [_metadata(clip.shape) for clip in clips],
        "do_sample_frames": False,
        "input_data_format": "channels_last",
    }


def _metadata(shape: VideoShape) -> dict[str, Any]:
    """What transformers' processors are told about a video."""
    return {
        "total_num_frames": shape.total,
        "fps": shape.fps,
        "width": shape.width,
        "height": shape.height,
        "duration": shape.total / shape.fps,
        "frames_indices": list(shape.used),
    }


def _without_pixels(value: object) -> object:
    """A tensor of pixels without them; the rest as it is."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return torch.empty_like(value, device="meta")
    return value

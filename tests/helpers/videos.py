"""Tiny videos, and processors that take them where torchvision is missing.

transformers' video processors use a few functions of torchvision. Here they are torch's, so that
all but the resizing of frames is what users have.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import cv2
import numpy as np
import torch
import transformers
from PIL.Image import Resampling
from torch import Tensor
from torch.nn import functional
from transformers import image_processing_backends, video_processing_utils

from tests.helpers.image_text import make_image
from xtuner.tokenization.processor import MissingVideoProcessor, load_processor

MODULES = {
    "Qwen2VLVideoProcessor": "qwen2_vl",
    "Qwen3VLVideoProcessor": "qwen3_vl",
    "Gemma4VideoProcessor": "gemma4",
    "InternVLVideoProcessor": "internvl",
    "LlavaOnevisionVideoProcessor": "llava_onevision",
    "SmolVLMVideoProcessor": "smolvlm",
    "Glm4vVideoProcessor": "glm4v",
}
"""Where transformers has the classes."""
TAKE_VIDEOS = (
    *("qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma4", "internvl", "llava_onevision", "smolvlm"),
    "glm4v",
)
"""Of ``FAMILIES``; Gemma 3 and Mistral 3 take images alone."""
FUNCTIONAL = "torchvision.transforms.v2.functional"


def make_video(file: Path, frames: int, size: tuple[int, int] = (56, 28), fps: float = 4) -> Path:
    """Write a video file of random blocks of color."""
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    for number in range(frames):
        writer.write(np.asarray(make_image(*size, number))[:, :, ::-1].copy())
    writer.release()
    return file


def load_with_videos(name_or_path: str | Path, trust_remote_code: bool = False) -> Any:
    """As ``load_processor``, with the family's own video processor."""
    processor: Any = load_processor(name_or_path, trust_remote_code)
    known = getattr(processor, "video_processor", None)
    if isinstance(known, MissingVideoProcessor):
        settings = known.to_dict()
        kind = settings.pop("video_processor_type")
        processor.video_processor = getattr(_module(MODULES[kind]), kind)(**settings)
    return processor


def _module(name: str) -> ModuleType:
    """A module of video processors, with ``_functions`` in place of torchvision's."""
    made = {FUNCTIONAL: _functions()}
    for inner in ("torchvision.transforms.v2", "torchvision.transforms", "torchvision"):
        made[inner] = ModuleType(inner)
    vars(made["torchvision.transforms.v2"])["functional"] = made[FUNCTIONAL]
    vars(made["torchvision.transforms"])["v2"] = made["torchvision.transforms.v2"]
    vars(made["torchvision"])["transforms"] = made["torchvision.transforms"]
    with (
        mock.patch.dict(sys.modules, made),
        mock.patch.object(transformers.utils, "is_torchvision_available", lambda: True),
        mock.patch.object(transformers.utils, "is_torchvision_v2_available", lambda: True),
    ):
        module = importlib.import_module(f"transformers.models.{name}.video_processing_{name}")
    for each in (module, image_processing_backends, video_processing_utils):
        vars(each)["tvF"] = made[FUNCTIONAL]
    modes: Any = {mode: mode for mode in Resampling}
    vars(image_processing_backends)["pil_torch_interpolation_mapping"] = modes
    return module


def _functions() -> ModuleType:
    made = ModuleType(FUNCTIONAL)
    used = (resize, normalize, pad, grayscale_to_rgb)
    vars(made).update({function.__name__: function for function in used})
    vars(made)["InterpolationMode"] = Resampling
    return made


def resize(
    image: Tensor,
    size: Sequence[int],
    interpolation: Resampling = Resampling.BILINEAR,
    antialias: bool = True,
) -> Tensor:
    """(..., C, H, W) in another size."""
    mode = "bicubic" if interpolation == Resampling.BICUBIC else "bilinear"
    flat = image.reshape(-1, *image.shape[-3:]).float()
    made = functional.interpolate(flat, tuple(size), mode=mode, antialias=antialias)
    made = made.reshape(*image.shape[:-2], *size)
    return made if image.is_floating_point() else made.round().clamp(0, 255).to(image.dtype)


def normalize(image: Tensor, mean: Any, std: Any, inplace: bool = False) -> Tensor:
    """(..., C, H, W) less ``mean``, over ``std``."""
    mean, std = (torch.as_tensor(each, dtype=image.dtype)[:, None, None] for each in (mean, std))
    return (image - mean) / std


def pad(image: Tensor, padding: Sequence[int], fill: float = 0, **settings: Any) -> Tensor:
    """(..., H, W) with more pixels: left, top, right, bottom."""
    left, top, right, bottom = padding
    return functional.pad(image, (left, right, top, bottom), value=fill)


def grayscale_to_rgb(image: Tensor) -> Tensor:
    """It has three channels already."""
    return image

"""Processors of vision-language models: tokenizer, image processor and chat template in one object.

transformers makes a processor only as a whole, and all of its video processors need torchvision,
which has to fit the installed torch exactly. Image processors do not need it. Where torchvision is
missing, the video processor alone is replaced by ``MissingVideoProcessor``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import AutoProcessor, ProcessorMixin, processing_utils
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.processing_utils import VideosKwargs
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin

from xtuner.registry import BUILDER
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Of these a folder with a processor of images has one at least."""


class MissingVideoProcessor(VideoProcessorMixin):
    """Keeps the settings of a video processor that cannot run without torchvision.

    Args:
        settings: the video processor's own JSON; it is saved unchanged with the processor.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("settings", {})
        if name in settings or name in VideosKwargs.__annotations__:
            return settings.get(name)
        raise AttributeError(name)

    def preprocess(self, videos: object, **kwargs: object) -> Any:
        """Refuse videos.

        Raises:
            UserError: always, with what to install.
        """
        raise UserError(
            tr("videos need torchvision, which is not installed."),
            hint=tr("pip install torchvision, in the version that fits your torch."),
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as they were read."""
        return copy.deepcopy(self.settings)


def load_processor(
    name_or_path: str | Path, trust_remote_code: bool = False, **settings: Any
) -> ProcessorMixin:
    """Load the processor of a vision-language model.

    Args:
        name_or_path: folder or hub name of the model.
        trust_remote_code: whether code of the folder may run, where only that knows the processor.
        settings: of the image processor, in place of its own, such as ``max_pixels``.

    Returns:
        A processor with ``image_processor`` and ``tokenizer``; its ``video_processor``, if it has
        one, is a ``MissingVideoProcessor`` without torchvision.

    Raises:
        UserError: when there is no such folder or model, it has no processor for images or no such
            setting, or a library that the processor needs is missing.
    """
    where = Where(str(name_or_path))
    folder = Path(name_or_path).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise UserError(
            tr("this folder has no processor for images: no {names}.", names=_either()),
            hint=tr("name a vision-language model; a folder of one lacks files: copy all of them."),
            where=where,
        )
    loader = {
        "type": AutoProcessor.from_pretrained,
        "pretrained_model_name_or_path": str(name_or_path),
        "trust_remote_code": trust_remote_code,
    }
    try:
        with _without_video_processor():
            processor = BUILDER.build(loader)
    except (OSError, ValueError, ImportError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        hint = tr("name a folder or model with {names}.", names=_either())
        if isinstance(error, ImportError):
            hint = tr("install the library that is named.")
        raise UserError(
            tr("the processor cannot be loaded: {error}", error=reason), hint=hint, where=where
        ) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise UserError(
            tr("it has no processor for images and text ({kind}).", kind=type(processor).__name__),
            hint=tr("name a vision-language model, or train this one as a text model."),
            where=where,
        )
    if settings:
        _change_image_processor(processor, settings, where)
    return processor


def _either() -> str:
    return tr(" or ").join(PROCESSOR_FILES)


def _change_image_processor(
    processor: ProcessorMixin, settings: Mapping[str, Any], where: Where
) -> None:
    """Give an image processor other settings.

    As arguments of ``AutoProcessor.from_pretrained`` they would be saved with the tokenizer, too.

    Raises:
        UserError: when it has no such setting.
    """
    image_processor: Any = processor.image_processor
    known = image_processor.valid_kwargs.__annotations__
    for name in settings:
        if name not in known:
            raise UserError(
                tr(
                    "{kind} has no setting {name}.",
                    kind=type(image_processor).__name__,
                    name=repr(name),
                ),
                hint=tr("it has: {names}", names=", ".join(sorted(known))),
                where=where,
            )
    own = image_processor.to_dict()
    processor.image_processor = type(image_processor).from_dict(own, **settings)


@contextlib.contextmanager
def _without_video_processor() -> Iterator[None]:
    """A context in which a video processor is kept as its settings where torchvision is missing."""
    if is_torchvision_available():
        yield
        return

    def stand_in(name_or_path: str, **settings: Any) -> MissingVideoProcessor:
        found, _ = VideoProcessorMixin.get_video_processor_dict(name_or_path, **settings)
        return MissingVideoProcessor(found)

    with (
        mock.patch.object(AutoVideoProcessor, "from_pretrained", stand_in),
        # Processors look the base class up by its name, which needs torchvision there. Their module
        # is another object than ours where this is the first import of transformers in a process.
        mock.patch.object(
            processing_utils.transformers_module,
            "VideoProcessorMixin",
            VideoProcessorMixin,
            create=True,
        ),
    ):
        yield

"""The tokens that stand for an image or a video, by its shape: as the processor writes them.

A processor writes a placeholder of its chat template as many tokens, by the size of the image. Its
own code tells which: it processes a blank image of that size, once for each size. Most processors
also count an image's tokens by its size; that count is used instead once it has told the right text
for ``VERIFIED`` sizes, and only between these. A batch compares the text again (``checksum``).
Texts of videos are written by ``video_texts``.
"""

from __future__ import annotations

import functools
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.nn.functional import pad

from xtuner.dataset.images import Size
from xtuner.dataset.sources import dotted_name
from xtuner.dataset.videos import Clip, VideoShape
from xtuner.dataset.vision_language.video_texts import GRID, VideoTexts, arguments_of
from xtuner.registry import BUILDER
from xtuner.tokenization.offsets import Span
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

VERIFIED = 24
ALIKE = 6
"""Sizes after which a sample of several images is taken to have the placeholders of one."""
KEPT = 100_000
"""Sizes whose texts are kept."""
ONLY_SIZES = {"do_rescale": False, "do_normalize": False}
"""Settings of image processors that change no size."""
OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""What a processor makes of text."""
GRIDS = GRID, "image_grid_thw"
PIXELS = "pixel_values_videos", "pixel_values"
"""What a model takes of videos and of images."""
Shape = Size | VideoShape
Count = int | tuple[int, ...]
"""What a processor counts for a size: tokens, or patches, rows and columns."""


class PlaceholderText(NamedTuple):
    """What a placeholder becomes.

    Attributes:
        text: each run of the repeated token as one of it.
        runs: the lengths of these runs.
    """

    text: str
    runs: tuple[int, ...]

    @property
    def checksum(self) -> int:
        """A number that tells one placeholder text from another."""
        return zlib.crc32(f"{self.text} {self.runs}".encode())


_BUILT: dict[str, ImagePlaceholders] = {}
"""By the config of the processor: the dataset and the collate function share one."""


def placeholders_of(processor: Any) -> ImagePlaceholders:
    """The placeholders of a processor.

    Args:
        processor: of transformers, or the config to build it from, once a process.

    Raises:
        UserError: when it has no images.
    """
    if not isinstance(processor, Mapping):
        require_images(processor)
        return ImagePlaceholders(processor)
    settings = dict(processor)
    kind = dotted_name(settings.pop("type", ""))
    key = f"{kind} {sorted((name, repr(value)) for name, value in settings.items())}"
    if key not in _BUILT:
        built = BUILDER.build(dict(processor))
        require_images(built)
        _BUILT[key] = ImagePlaceholders(built)
    return _BUILT[key]


def require_images(processor: Any) -> None:
    """Refuse what is no processor for images and text.

    Raises:
        UserError: with what it is.
    """
    kind = type(processor).__name__
    if not hasattr(processor, "image_processor"):
        message = tr("{kind} reads text alone, no images.", kind=kind)
    elif not getattr(processor, "image_token", None):
        message = tr("{kind} does not say which token stands for an image.", kind=kind)
    elif not processor.chat_template:
        message = tr("{kind} has no chat template.", kind=kind)
    else:
        return
    raise UserError(
        message,
        hint=tr(
            "processor=dict(type=load_processor, name_or_path=...) with a vision-language model "
            "that answers questions."
        ),
        where=Where(key="processor"),
    )


class ImagePlaceholders:
    """The placeholders of a processor's chat template, and the texts that they become.

    Args:
        processor: of transformers, with ``image_token``.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.token: str = self.processor.image_token
        self.video_token: str | None = getattr(self.processor, "video_token", None)
        known = self.processor.tokenizer.init_kwargs
        merged = self.processor._merge_kwargs(tokenizer_init_kwargs=known)
        self.settings = merged["images_kwargs"]
        self.videos = VideoTexts(self.processor, merged["videos_kwargs"])
        tokenizer = self.processor.tokenizer
        soft = getattr(tokenizer, "image_token", None)
        self._unit = unit = soft if isinstance(soft, str) else self.token
        units = dict.fromkeys((unit, self.video_token)) if self.videos.are_taken else {unit: None}
        self._repeated: dict[str, int] = {}
        """The tokens that are repeated, and their ids."""
        for each in filter(None, units):
            number = tokenizer.convert_tokens_to_ids(each)
            if tokenizer(each * 3, add_special_tokens=False)["input_ids"] == [number] * 3:
                self._repeated[each] = number
        runs = (f"(?:{re.escape(each)})+" for each in self._repeated)
        self._run = re.compile("|".join(runs) or r"(?!)")
        tokens = {self.token: "image", self.video_token: "video"}
        self._kinds = {token: kind for token, kind in tokens.items() if token}
        self._token = re.compile("|".join(map(re.escape, self._kinds)))
        self._texts: dict[tuple[Size, bool], PlaceholderText] = {}
        self._predictions = {several: _Prediction() for several in (False, True)}
        self._lengths: dict[str, int] = {}
        self._alike = 0  # sizes for which several images were as one; below 0: they are not

    @functools.cached_property
    def frames_are_images(self) -> bool:
        """Whether the frames of a video are images to the model, as to GLM-4V.

        Its class refuses a batch that has both; a frame as an image gives the same.
        """
        if (
            not self.videos.are_taken
            or GRID not in self.processor.video_processor.model_input_names
        ):
            return False
        text = self.collapsed(self.videos.text(VideoShape(56, 56, 2, 1.0, (0, 1)))).text
        return self.repeated(text) == self.repeated(self._unit)

    @property
    def can_mix(self) -> bool:
        """Whether one sample may have images and videos."""
        return self.videos.differ_from_images and not self.frames_are_images

    def texts(self, shapes: Sequence[Shape]) -> list[PlaceholderText]:
        """What the placeholders of one sample become.

        Args:
            shapes: of its images and videos, in order, as the processor gets them.

        Raises:
            ValueError: when the processor refuses one of them.
        """
        images = sum(not isinstance(shape, VideoShape) for shape in shapes)
        if 0 < images < len(shapes) and not self.can_mix:
            kind = type(self.processor).__name__
            raise ValueError(tr("{kind} takes no images and videos in one row", kind=kind))
        several = images > 1
        return [
            self.collapsed(self.videos.text(shape))
            if isinstance(shape, VideoShape)
            else self._text(shape, several)
            for shape in shapes
        ]

    def tokens(self, shapes: Sequence[Shape]) -> int:
        """The tokens of the placeholders of one sample."""
        return sum(self._length(text) + sum(runs) - len(runs) for text, runs in self.texts(shapes))

    def repeated(self, text: str) -> int:
        """The id of the token that a text's runs repeat; -1 if it has none."""
        return next((number for unit, number in self._repeated.items() if unit in text), -1)

    def _length(self, text: str) -> int:
        if text not in self._lengths:
            ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            self._lengths[text] = len(ids)
        return self._lengths[text]

    def collapsed(self, text: str) -> PlaceholderText:
        """A text as the processor writes it, its runs of one token counted."""
        runs: list[int] = []

        def one(match: re.Match[str]) -> str:
            unit = next(each for each in self._repeated if match.group().startswith(each))
            runs.append(len(match.group()) // len(unit))
            return unit

        return PlaceholderText(self._run.sub(one, text), tuple(runs))

    def find(self, text: str) -> list[tuple[Span, str]]:
        """Where a rendered text has placeholders, and whether of an ``image`` or a ``video``."""
        found = self._token.finditer(text)
        return [(match.span(), self._kinds[match.group()]) for match in found]

    def require(self, found: Sequence[str], shapes: Sequence[Shape]) -> None:
        """Refuse a text that has other placeholders than there are images and videos.

        Args:
            found: kinds of its placeholders.
            shapes: of images and videos.

        Raises:
            ValueError: with their numbers.
        """
        kinds = ["video" if isinstance(shape, VideoShape) else "image" for shape in shapes]
        if list(found) == kinds:
            return
        for kind, token in (("image", self.token), ("video", self.video_token)):
            marks, count = found.count(kind), kinds.count(kind)
            if marks != count:
                raise ValueError(_mismatch(kind, token, marks, count))
        raise ValueError(tr("the chat template writes images and videos in another order"))

    def process(
        self, images: Sequence[Sequence[Image.Image | Clip]], **settings: Any
    ) -> tuple[dict[str, Any], list[PlaceholderText]]:
        """What the model gets of images and videos.

        Args:
            images: those of each sample, in order; none of these is empty.
            settings: of the image processor, in place of its own.

        Returns:
            Tensors by the names of the model's arguments; for each image what its placeholder
            becomes.
        """
        if any(isinstance(image, Clip) for of_sample in images for image in of_sample):
            return self._process_with_videos(images)
        text = [self.token * len(of_sample) for of_sample in images]
        nested, *_ = self.processor.prepare_inputs_layout(images=list(images), text=text)
        settings = {**self.settings, "return_tensors": "pt", **settings}
        processed, texts = self.processor._process_images(nested, **settings)
        return self._kept(processed), list(map(self.collapsed, texts))

    def _kept(self, processed: Mapping[str, Any]) -> dict[str, Any]:
        """What the model takes of it."""
        processor = self.processor
        names = {*processor.image_processor.model_input_names, *processor.model_input_names}
        if self.videos.are_taken:
            names |= {*processor.video_processor.model_input_names}
        names -= {*processor.unused_input_names, *OF_TEXT}
        return {name: value for name, value in processed.items() if name in names}

    def _process_with_videos(
        self, samples: Sequence[Sequence[Image.Image | Clip]]
    ) -> tuple[dict[str, Any], list[PlaceholderText]]:
        """As ``process``, by the processor's own call for each sample."""
        made: list[dict[str, Any]] = []
        texts: list[PlaceholderText] = []
        for sample in samples:
            clips = [each for each in sample if isinstance(each, Clip)]
            images = [each for each in sample if not isinstance(each, Clip)]
            tokens = (self.video_token if isinstance(each, Clip) else self.token for each in sample)
            batch = self.processor(
                text=["".join(filter(None, tokens))],
                images=[images] if images else None,
                return_tensors="pt",
                return_text_replacement_offsets=True,
                **(arguments_of(clips) if clips else {}),
            )
            kept = self._kept(batch)
            made.append(_frames_as_images(kept) if clips and self.frames_are_images else kept)
            (written,) = batch["text_replacement_offsets"]
            texts += [self.collapsed(each["replacement"]) for each in written]
        return _joined(made), texts

    def _text(self, size: Size, several: bool) -> PlaceholderText:
        """The text of one image, which may depend on whether its sample has several."""
        known = self._texts.get((size, several))
        if known is not None:
            return known
        if len(self._texts) > KEPT:
            self._texts.clear()
        if several and self._alike >= ALIKE:
            return self._text(size, False)
        prediction = self._predictions[several]
        count = self._count(size)
        text = prediction.text(size, count)
        if text is None:
            blank = Image.new("RGB", size)
            try:
                _, (text, *_) = self.process([[blank] * (2 if several else 1)], **ONLY_SIZES)
            except (ValueError, ArithmeticError) as error:
                width, height = size
                shape = tr("an image of {width} x {height} pixels", width=width, height=height)
                raise ValueError(f"{shape}: {error}") from error
            prediction.learn(size, count, text)
            if several and self._alike >= 0:
                self._alike = self._alike + 1 if text == self._text(size, False) else -1
        self._texts[size, several] = text
        return text

    def _count(self, size: Size) -> Count | None:
        """What the processor counts for a size; None where it cannot."""
        width, height = size
        own = getattr(self.processor, "_get_num_multimodal_tokens", None)
        patches = getattr(self.processor.image_processor, "get_number_of_image_patches", None)
        try:
            if own is not None:
                counts = own(image_sizes=[(height, width)])["num_image_tokens"]
                return None if counts is None else int(counts[0])
            found = None if patches is None else patches(height, width, self.settings)
        except (ValueError, ArithmeticError, AttributeError, TypeError):
            return None  # whatever is wrong with the size, processing it tells
        return tuple(map(int, found)) if isinstance(found, tuple) else None


def _mismatch(kind: str, token: str | None, found: int, count: int) -> str:
    if kind == "image":
        return tr(
            "{found} {token} in the text for {count} images", found=found, token=token, count=count
        )
    return tr(
        "{found} {token} in the text for {count} videos", found=found, token=token, count=count
    )


def _frames_as_images(videos: Mapping[str, Any]) -> dict[str, Any]:
    """Videos as a model takes images: (frames, 3) grids of one frame each."""
    grids = videos[GRIDS[0]]
    frames = grids.repeat_interleave(grids[:, 0], dim=0)
    frames[:, 0] = 1
    return {PIXELS[1]: videos[PIXELS[0]], GRIDS[1]: frames}


def _joined(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The tensors of several samples as one batch; rows of more images are padded with zeros."""
    names = dict.fromkeys(name for sample in samples for name in sample)
    joined: dict[str, Any] = {}
    for name in names:
        parts = [sample[name] for sample in samples if name in sample]
        if parts[0].ndim > 3:
            longest = max(part.shape[1] for part in parts)
            empty = [(0, 0) * (part.ndim - 2) + (0, longest - part.shape[1]) for part in parts]
            parts = [pad(part, more) for part, more in zip(parts, empty, strict=True)]
        joined[name] = torch.cat(parts)
    return joined


@dataclass
class _Prediction:
    """Placeholder texts by what the processor counts, learned from texts that it wrote.

    Attributes:
        texts: by what was counted, where that is more than a number.
        forms: of texts with one run: all texts, and counts minus the length of the run.
        constants: all texts, while these are few.
        learned: how many sizes.
        areas, ratios: the smallest and the largest of these.
    """

    texts: dict[Count, PlaceholderText] = field(default_factory=dict)
    forms: set[tuple[str, int] | None] = field(default_factory=set)
    constants: set[PlaceholderText] = field(default_factory=set)
    learned: int = 0
    areas: tuple[float, float] = (math.inf, 0)
    ratios: tuple[float, float] = (math.inf, 0)
    is_wrong: bool = False

    def learn(self, size: Size, count: Count | None, text: PlaceholderText) -> None:
        """Take in a text that the processor wrote."""
        area, ratio = size[0] * size[1], size[0] / size[1]
        self.learned += 1
        self.areas = min(self.areas[0], area), max(self.areas[1], area)
        self.ratios = min(self.ratios[0], ratio), max(self.ratios[1], ratio)
        if len(self.constants) < 2:
            self.constants.add(text)
        if isinstance(count, tuple):
            self.is_wrong |= self.texts.setdefault(count, text) != text
        elif len(self.forms) < 2:
            is_run = count is not None and len(text.runs) == 1
            self.forms.add((text.text, (count or 0) - text.runs[0]) if is_run else None)

    def text(self, size: Size, count: Count | None) -> PlaceholderText | None:
        """The text for a size; None where it has to be processed."""
        area, ratio = size[0] * size[1], size[0] / size[1]
        is_between = self.areas[0] <= area <= self.areas[1] and (
            self.ratios[0] <= ratio <= self.ratios[1]
        )
        if self.learned < VERIFIED or not is_between:
            return None
        if len(self.constants) == 1:
            return next(iter(self.constants))
        if isinstance(count, tuple):
            return None if self.is_wrong else self.texts.get(count)
        form = next(iter(self.forms))
        if len(self.forms) != 1 or form is None or count is None:
            return None
        text, more = form
        return PlaceholderText(text, (count - more,))

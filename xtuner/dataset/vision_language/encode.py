"""From rows with images to samples: their texts tokenised, their images known by size alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from xtuner.dataset.images import Size, read_size
from xtuner.dataset.prepare.packing import Packs
from xtuner.dataset.prepare.parallel_map import ordered_map, usable_processes, with_progress
from xtuner.dataset.prepare.samples import Samples
from xtuner.dataset.prepare.token_stats import TokenStats
from xtuner.dataset.videos import PRECISION, FrameSampling, VideoShape
from xtuner.dataset.vision_language.content_parts import Conversation, conversation_of
from xtuner.dataset.vision_language.image_refs import ImageRef
from xtuner.dataset.vision_language.placeholders import ImagePlaceholders, PlaceholderText, Shape
from xtuner.dataset.vision_language.size_cache import Measured, measure_files, remember
from xtuner.dataset.vision_language.source_rows import SourceRows
from xtuner.dataset.vision_language.video_refs import VideoRef
from xtuner.tokenization.encode import Sample
from xtuner.tokenization.messages import Placeholder, encode_messages
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.errors import BadRowError, UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.types import RowFunction

Row = Mapping[str, Any]
CHUNK, BYTES_A_CHUNK = 256, 32 << 20
"""Rows that a process takes at a time, and about how many bytes, both at most."""
ROWS_A_PROCESS = 1000
"""Fewer are not worth a process of their own."""
NAMED = 50
"""Bad rows of a dataset that are named one by one."""
SMALLEST_SCALE = 1 / 64
SCALES_TRIED = 12
FIELDS = 8
"""Numbers that are kept for an image or a video: its size in the file, the size in which it is
processed, its frames in the file and those used (0 of an image), frames per second in parts of
``PRECISION``, the checksum of its placeholder.
"""
PIXELS_A_TOKEN = 28 * 28
"""Pixels whose encoding counts as much as a token of the language model (see ``cost``)."""


@dataclass(frozen=True)
class VisionSteps:
    """What is done with each row.

    Attributes:
        map_row: the row to messages; None where its layout is recognised.
        processor: of transformers.
        placeholders: of the processor.
        folder: what relative paths of images are relative to.
        max_length: tokens of a sample at most.
        max_pixels: pixels of an image at most, before the processor; None for no limit.
        long_samples: what becomes of longer ones: ``drop``, ``error`` or ``shrink``.
        train_on: ``answers``, ``last_answer`` or ``everything``.
        bad_rows: rows that cannot be used: ``drop`` or ``error``.
        thinking: of ``dataset_settings.TRAIN_THINKING``.
        place: where the row with a number is, None where that is not known.
        frames: which frames of videos are used.
    """

    map_row: RowFunction | None
    processor: Any
    placeholders: ImagePlaceholders
    folder: Path
    max_length: int
    max_pixels: int | None = None
    long_samples: str = "drop"
    train_on: str = "answers"
    bad_rows: str = "drop"
    thinking: str = "keep"
    place: Callable[[int], Where | None] = lambda number: None
    frames: FrameSampling = field(default_factory=FrameSampling)

    def named(self, number: int) -> str:
        """A row by its file and line, else by its number."""
        return str(self.place(number) or tr("row {number}", number=number))


ImageSample = tuple[Sample, npt.NDArray[np.int64]]
"""A sample, and (images, ``FIELDS``) of its images."""


@dataclass
class ImageSamples:
    """Samples with their images.

    Attributes:
        texts: their tokens.
        counts: (samples,) images of each.
        images: (images, ``FIELDS``) of all, in order.
        bad: rows that cannot be used, by number, and what is wrong with them.
        new: sizes of files that the cache did not know.
    """

    texts: Samples
    counts: npt.NDArray[np.int64]
    images: npt.NDArray[np.int64]
    bad: dict[int, str] = field(default_factory=dict)
    new: dict[Path, Measured] = field(default_factory=dict)

    def columns(self, packs: Packs) -> dict[str, pa.Array]:
        """What rows of these samples have beside their tokens.

        Args:
            packs: the samples of each row, all of them whole.

        Returns:
            ``images_per_sample``; ``images``, ``FIELDS`` numbers for each; ``cost``, tokens and
            pixels of the row together.
        """
        ends = np.cumsum(self.counts)
        bounds = zip(ends - self.counts, ends, strict=True)
        of_sample = [self.images[start:stop] for start, stop in bounds]
        ordered = np.concatenate([of_sample[n] for n in packs.samples] or [self.images])
        counts = self.counts[packs.samples]
        row_ends = np.cumsum(packs.counts)
        images_before = np.concatenate([[0], np.cumsum(counts)])[np.concatenate([[0], row_ends])]
        frames = np.maximum(1, ordered[:, 5])
        pixels = np.concatenate([[0], np.cumsum(ordered[:, 2] * ordered[:, 3] * frames)])
        tokens = np.concatenate([[0], np.cumsum(packs.stops - packs.starts)])
        lengths = np.diff(tokens[np.concatenate([[0], row_ends])])
        return {
            "images_per_sample": _lists(counts, packs.counts),
            "images": _lists(ordered.reshape(-1), np.diff(images_before) * FIELDS),
            "cost": pa.array(lengths + np.diff(pixels[images_before]) // PIXELS_A_TOKEN),
        }


def _lists(values: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.int64()))


def encode_image_rows(
    rows: SourceRows, numbers: Sequence[int], steps: VisionSteps, processes: int
) -> ImageSamples:
    """Encode rows, in several processes where that pays; the result does not depend on them.

    Args:
        rows: all of the source.
        numbers: of those that are taken.
        steps: what is done with each.
        processes: at most.

    Raises:
        UserError: with ``bad_rows='error'`` for rows that cannot be used, naming them; with
            ``long_samples='error'`` for a row that is too long.
    """
    size = rows.at_once(CHUNK, BYTES_A_CHUNK)
    chunks = [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def work(number: int) -> ImageSamples:
        return _encoded(rows[chunks[number]], chunks[number], steps)

    processes = min(usable_processes(processes), max(1, len(numbers) // ROWS_A_PROCESS))
    results = ordered_map(work, len(chunks), processes)
    parts: list[ImageSamples] = []
    try:
        for part in with_progress(results, list(map(len, chunks)), tr("preparing data")):
            parts.append(part)
    finally:
        remember({file: each for part in parts for file, each in part.new.items()})
    joined = ImageSamples(
        Samples.joined(part.texts for part in parts),
        np.concatenate([part.counts for part in parts] or [np.zeros(0, np.int64)]),
        np.concatenate([part.images for part in parts] or [np.zeros((0, FIELDS), np.int64)]),
        {number: why for part in parts for number, why in part.bad.items()},
    )
    _note_bad(joined, steps)
    return joined


def _note_bad(samples: ImageSamples, steps: VisionSteps) -> None:
    """Refuse rows that cannot be used, or put the first of them into the counts."""
    lines = [f"{steps.named(n)}: {why}" for n, why in list(samples.bad.items())[:NAMED]]
    if lines and steps.bad_rows == "error":
        named = "\n".join(lines)
        raise UserError(
            tr("rows that cannot be used:\n{more}", more=named),
            hint=tr("fix image_folder or these rows, or leave them out with bad_rows='drop'."),
            where=Where(key="dataset"),
        )
    samples.texts.stats.bad_rows = lines


def _encoded(rows: Sequence[Row], numbers: Sequence[int], steps: VisionSteps) -> ImageSamples:
    """The samples of some rows; their stats say what is dropped."""
    stats = TokenStats(rows_in=len(rows), dropped={"no_label": [], "too_long": [], "bad": []})
    bad: dict[int, str] = {}
    talks: dict[int, Conversation] = {}
    for number, row in zip(numbers, rows, strict=True):
        try:
            talks[number] = conversation_of(row, steps.map_row)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            bad[number] = _why(error)
    sizes, new = _sizes(talks, steps, bad)
    encoded: dict[int, list[ImageSample]] = {}
    for number, of_row in sizes.items():
        try:
            encoded[number] = _fitting(
                number, encode_talk(talks[number], of_row, steps), steps, stats
            )
        except BadRowError as error:
            bad[number] = str(error)
    stats.dropped["bad"] = sorted(bad)
    samples = {number: [text for text, _ in made] for number, made in encoded.items() if made}
    texts = Samples.of(samples, stats)
    stats.rows_trained = len(samples)
    stats.tokens_trained = len(texts.input_ids)
    stats.tokens_supervised = int((texts.labels != IGNORE_INDEX).sum())
    arrays = [images for made in encoded.values() for _, images in made]
    counts = np.array([len(images) for images in arrays], dtype=np.int64)
    none = np.zeros((0, FIELDS), np.int64)
    return ImageSamples(
        texts, counts, np.concatenate([none, *arrays]), dict(sorted(bad.items())), new
    )


def _fitting(
    number: int, samples: Sequence[ImageSample], steps: VisionSteps, stats: TokenStats
) -> list[ImageSample]:
    """The samples of a row that can be trained on; the others are counted."""
    lengths = [len(sample["input_ids"]) for sample, _ in samples]
    stats.tokens_in += sum(lengths)
    fitting = [each for each, n in zip(samples, lengths, strict=True) if n <= steps.max_length]
    if len(fitting) < len(samples):
        _refuse_long(number, max(lengths), steps)
        stats.dropped["too_long"].append(number)
    trained = [each for each in fitting if set(each[0]["labels"]) != {IGNORE_INDEX}]
    if fitting and not trained:
        stats.dropped["no_label"].append(number)
    stats.tokens_dropped += sum(lengths) - sum(len(sample["input_ids"]) for sample, _ in trained)
    return trained


def _refuse_long(number: int, length: int, steps: VisionSteps) -> None:
    if steps.long_samples == "error":
        raise UserError(
            tr(
                "{place} has {length} tokens, more than max_length={limit}",
                place=steps.named(number),
                length=length,
                limit=steps.max_length,
            ),
            hint=tr("long_samples='drop' leaves such rows out, 'shrink' scales their images down."),
            where=Where(key="max_length"),
        )


def _why(error: Exception) -> str:
    if isinstance(error, KeyError):
        return tr("it has no {error}", error=error)
    return str(error)


def _sizes(
    talks: Mapping[int, Conversation], steps: VisionSteps, bad: dict[int, str]
) -> tuple[dict[int, list[Shape]], dict[Path, Measured]]:
    """The sizes of the images of each row; rows with a broken one go to ``bad``.

    Returns:
        Sizes by the number of the row; those of files that the cache did not know.

    Raises:
        UserError: when there are videos, and the processor takes none or a library is missing.
    """
    folder = steps.folder
    files: dict[int, list[Path | None]] = {}
    for number, talk in talks.items():
        try:
            files[number] = [
                None if isinstance(image, VideoRef) else _file(image, folder)
                for image in talk.images
            ]
        except (OSError, ValueError) as error:
            bad[number] = str(error)
    known, problems, new = measure_files(f for of_row in files.values() for f in of_row if f)
    sizes: dict[int, list[Shape]] = {}
    for number, of_row in files.items():
        images = talks[number].images
        try:
            sizes[number] = [
                _shape(image, steps)
                if isinstance(image, VideoRef)
                else _size(image, file, known, problems)
                for image, file in zip(images, of_row, strict=True)
            ]
        except BadRowError as error:
            bad[number] = str(error)
    return sizes, new


def _file(image: ImageRef, folder: Path) -> Path | None:
    try:
        return image.file(folder)
    except BadRowError:
        raise
    except (OSError, ValueError) as error:
        raise BadRowError(f"{image}: {error}") from error


def _size(
    image: ImageRef, file: Path | None, known: Mapping[Path, Size], problems: Mapping[Path, str]
) -> Size:
    if file is not None and file in known:
        return known[file]
    if file is not None:
        raise BadRowError(f"{file}: {problems[file]}")
    try:
        return read_size(image.open(Path()))
    except OSError as error:
        raise BadRowError(f"{image}: {error}") from error


def _shape(video: VideoRef, steps: VisionSteps) -> VideoShape:
    steps.placeholders.videos.require()
    try:
        return video.shape(steps.folder, steps.placeholders.videos.sampling(steps.frames))
    except OSError as error:
        raise BadRowError(f"{video}: {error.strerror or error}") from error


def encode_talk(
    talk: Conversation, sizes: Sequence[Shape], steps: VisionSteps
) -> list[ImageSample]:
    """Tokenise one conversation.

    Args:
        talk: its messages and images.
        sizes: of its images and videos.
        steps: how.

    Returns:
        Samples, several where the template rewrites earlier messages, which may be longer than
        ``max_length``; each with its images, which are the first ones of the conversation.

    Raises:
        BadRowError: when the chat template or the processor refuses it.
    """
    from jinja2 import TemplateError

    fitted = [fitted_size(size, steps.max_pixels) for size in sizes]
    try:
        samples = _tokenised(talk, sizes, fitted, steps)
        longest = max(len(sample["input_ids"]) for sample, _ in samples)
        if longest > steps.max_length and steps.long_samples == "shrink" and sizes:
            room = steps.placeholders.tokens(fitted) - (longest - steps.max_length)
            shrunk = _shrunk(fitted, room, steps.placeholders)
            samples = _tokenised(talk, sizes, shrunk, steps) if shrunk else samples
    except BadRowError:
        raise
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ArithmeticError,
        TemplateError,
        NotImplementedError,
    ) as error:
        raise BadRowError(
            tr("the processor refuses it: {error}", error=f"{type(error).__name__}: {error}")
        ) from error
    return samples


def _tokenised(
    talk: Conversation, sizes: Sequence[Shape], used: Sequence[Shape], steps: VisionSteps
) -> list[ImageSample]:
    """The samples of a conversation whose images are processed in other sizes than they have."""
    known = steps.placeholders
    counts = [sum(part["type"] != "text" for part in m["content"]) for m in talk.messages]
    possible = list(itertools.accumulate(counts, initial=0))
    images: list[npt.NDArray[np.int64]] = []

    def expand(text: str) -> list[Placeholder]:
        places = known.find(text)
        count = len(places) if len(places) in possible else len(sizes)
        known.require([kind for _, kind in places], sizes[:count])
        texts = known.texts(used[:count])
        facts = [facts_of(*each) for each in zip(sizes, used, texts, strict=False)]
        images.append(np.array(facts, dtype=np.int64).reshape(-1, FIELDS))
        return [
            Placeholder(span, text, runs, known.repeated(text))
            for (span, _), (text, runs) in zip(places, texts, strict=True)
        ]

    samples = encode_messages(
        talk.messages,
        steps.processor.tokenizer,
        tools=talk.tools,
        train_on=steps.train_on,
        thinking=steps.thinking,
        processor=steps.processor,
        expand=expand,
    )
    if max(map(len, images)) < len(sizes):  # either the images follow the last answer, or are lost
        found = known.find(steps.processor.apply_chat_template(talk.messages))
        known.require([kind for _, kind in found], sizes)
    return list(zip(samples, images, strict=True))


def facts_of(shape: Shape, used: Shape, text: PlaceholderText) -> tuple[int, ...]:
    """The ``FIELDS`` of an image or a video."""
    frames = (0, 0, 0)
    if isinstance(used, VideoShape):
        frames = used.total, len(used.used), round(used.fps * PRECISION)
    return (*shape[:2], *used[:2], *frames, text.checksum)


def shape_of(facts: Sequence[int]) -> Shape:
    """The size in which an image or a video is processed, from its ``FIELDS``."""
    _, _, width, height, count, used, fps, _ = facts
    if not count:
        return width, height
    numbers = FrameSampling(used, exactly=True).of(count, fps / PRECISION)
    return VideoShape(width, height, count, fps / PRECISION, numbers)


def _resized(shape: Shape, size: Size) -> Shape:
    if isinstance(shape, VideoShape):
        return shape._replace(width=size[0], height=size[1])
    return size


def fitted_size(size: Shape, max_pixels: float | None) -> Shape:
    """A size of at most so many pixels and about the same shape."""
    width, height = size[:2]
    if max_pixels is None or width * height <= max_pixels:
        return size
    return scaled_size(size, math.sqrt(max_pixels / (width * height)))


def scaled_size(size: Shape, scale: float) -> Shape:
    """A size times a scale, at least one pixel a side."""
    width, height = (max(1, int(side * scale)) for side in size[:2])
    return _resized(size, (width, height))


def _shrunk(
    sizes: Sequence[Shape], room: int, placeholders: ImagePlaceholders
) -> list[Shape] | None:
    """The largest sizes, all scaled alike, whose placeholders have at most ``room`` tokens."""

    def tokens(scale: float) -> int:
        return placeholders.tokens([scaled_size(size, scale) for size in sizes])

    low, high = SMALLEST_SCALE, 1.0
    if room <= 0 or tokens(low) > room:
        return None
    for _ in range(SCALES_TRIED):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens(middle) <= room else (low, middle)
    return [scaled_size(size, low) for size in sizes]

"""Conversations with images for the vision-language models that transformers loads."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from xtuner.dataset import images as image_files
from xtuner.dataset import videos
from xtuner.dataset.images import decode_image, scaled_image
from xtuner.dataset.map_fns import row_function
from xtuner.dataset.prepare import arrow_writer, cache
from xtuner.dataset.prepare import packing as packs
from xtuner.dataset.prepare.arrow_writer import shuffled, unpacked_dataset, write_packed
from xtuner.dataset.prepare.packing import Packs, best_fit_packs
from xtuner.dataset.prepare.parallel_map import usable_processes
from xtuner.dataset.prepare.rows import load_usable_rows
from xtuner.dataset.prepare.samples import require_some
from xtuner.dataset.prepare.token_stats import TokenStats, attach
from xtuner.dataset.prepare.train_val_split import drawn_indices, split_indices
from xtuner.dataset.sources import local_files
from xtuner.dataset.videos import FrameSampling, VideoShape, Visual, blank_clip
from xtuner.dataset.vision_language import (
    content_parts,
    encode,
    image_refs,
    placeholders,
    video_refs,
    video_texts,
)
from xtuner.dataset.vision_language.content_parts import conversation_of
from xtuner.dataset.vision_language.encode import (
    FIELDS,
    NAMED,
    ImageSamples,
    VisionSteps,
    encode_image_rows,
    shape_of,
)
from xtuner.dataset.vision_language.image_refs import ImageRef
from xtuner.dataset.vision_language.placeholders import placeholders_of
from xtuner.dataset.vision_language.source_rows import SourceRows
from xtuner.dataset.vision_language.video_refs import VideoRef
from xtuner.tokenization import messages
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.dataset_settings import require_settings
from xtuner.utils.lang import tr
from xtuner.utils.types import RowFunction

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import ProcessorMixin

logger = logging.getLogger(__name__)
PLAIN_STEPS = ("max_length", "max_pixels", "long_samples", "train_on", "bad_rows", "thinking")
"""What of ``VisionSteps`` is a plain value."""


class VisionLanguageDataset(Dataset[dict[str, Any]]):
    """Rows of texts, images and videos, encoded as the model's own processor encodes them.

    A row is a conversation in any common layout, with no image, one or several: OpenAI messages
    whose content has parts, ShareGPT or ``messages`` with ``<image>`` marks and a column of images,
    or columns such as ``image``, ``question`` and ``answer``. An image is a path, an address, a
    data URI, base64 or bytes; a video one of these or a list of images. Videos are marked with
    ``<video>``.

    Texts are tokenised once, with as many placeholder tokens as the processor writes for images of
    these sizes, which are read from the headers of the files. ``__getitem__`` decodes the images.
    A row with an image that begins well and breaks off, or that has changed since, keeps its place:
    its images are black, none of its tokens is trained, and a warning names it.

    Args:
        dataset: a ``datasets.Dataset`` or ``DatasetDict``, or the config to build it from.
        processor: of transformers, or its config.
        max_length: tokens of a row (packed) or of a sample (not packed).
        image_folder: what relative paths are relative to; None for the folder of the data file.
        dataset_map_fn: row → ``messages`` with content parts; None or ``auto`` where the layout is
            to be recognised.
        pack_to_max_length: put several samples into one row.
        max_pixels: larger images, and frames of videos, are scaled down to so many pixels before
            the processor gets them.
        long_samples: samples longer than ``max_length``: ``drop`` them, stop with an ``error``, or
            ``shrink`` their images until they fit. None is ever cut.
        bad_rows: rows that cannot be used, or whose images cannot, are left out (``drop``) and
            named, or an ``error``.
        max_dataset_length: rows drawn at random when there are more; None: all.
        val_size: rows kept from training, drawn by ``seed``: a share (below 1) or a number.
        part: ``train``, or ``val`` for just those rows.
        seed: of the shuffling and drawing.
        split: of a ``DatasetDict``.
        train_on: ``answers`` (those without loss left out), the ``last_answer``, or ``everything``
            but placeholders.
        train_thinking: ``<think>`` blocks of answers: ``keep`` them, ``mask_empty`` ones (no loss),
            or ``drop`` the reasoning and mask empty ones.
        shuffle_before_pack: shuffle the samples (by ``seed``) before they are packed.
        map_num_proc: processes at most; the result does not depend on it.
        video_frames: frames of a video at most, evenly spread over it; for processors that stack
            videos, just so many.
        video_fps: so many frames of each second where that is fewer; None: ``video_frames``.

    Attributes:
        table: the rows without their images, a ``datasets.Dataset``.

    Raises:
        UserError: when the data cannot be read, the processor has no images, or no row is left.
    """

    def __init__(
        self,
        dataset: Any,
        processor: ProcessorMixin | Mapping[str, Any],
        max_length: int = 2048,
        image_folder: str | None = None,
        dataset_map_fn: RowFunction | str | Mapping[str, Any] | None = None,
        pack_to_max_length: bool = True,
        max_pixels: int | None = None,
        *,
        long_samples: str = "drop",
        bad_rows: str = "drop",
        max_dataset_length: int | None = None,
        val_size: float = 0,
        part: str = "train",
        seed: int = 0,
        split: str | None = "train",
        train_on: str = "answers",
        train_thinking: str = "keep",
        shuffle_before_pack: bool = True,
        map_num_proc: int = 32,
        video_frames: int = 16,
        video_fps: float | None = 2.0,
    ) -> None:
        require_settings("VisionLanguageDataset", locals())
        known = placeholders_of(processor)
        self.processor = known.processor
        rows, place, unreadable = load_usable_rows(dataset, split, bad_rows)
        self.source = SourceRows(rows)
        numbers = drawn_indices(len(rows), max_dataset_length, seed)
        numbers = split_indices(numbers, part, val_size, seed)
        is_auto = dataset_map_fn in (None, "auto", "auto_map_fn")
        self.steps = VisionSteps(
            map_row=None if is_auto else row_function(dataset_map_fn),
            processor=self.processor,
            placeholders=known,
            folder=_image_folder(image_folder, dataset),
            max_length=max_length,
            max_pixels=max_pixels,
            long_samples=long_samples,
            train_on=train_on,
            bad_rows=bad_rows,
            thinking=train_thinking,
            place=place,
            frames=FrameSampling(video_frames, video_fps),
        )
        order = (seed if shuffle_before_pack else None) if pack_to_max_length else None
        self.table = self._prepared(
            rows, numbers, pack_to_max_length, order, map_num_proc, unreadable=unreadable
        )

    def _prepared(
        self,
        rows: Table,
        numbers: Sequence[int],
        is_packed: bool,
        seed: int | None,
        processes: int,
        *,
        unreadable: TokenStats,
    ) -> Table:
        """The training rows, from the cache or made now."""

        def write(folder: Path) -> None:
            encoded = encode_image_rows(self.source, numbers, self.steps, processes)
            _name_bad(encoded.bad, self.steps)
            unreadable.add(encoded.texts.stats)
            encoded.texts.stats = unreadable
            require_some(encoded.texts)
            if is_packed:
                _write_packs(encoded, self.steps.max_length, seed, folder, key, processes)
                return
            columns = encoded.columns(_alone(encoded.texts.lengths))
            made = unpacked_dataset(encoded.texts, key, columns)
            attach(made, encoded.texts.stats)
            made.save_to_disk(str(folder))

        plain = {name: getattr(self.steps, name) for name in PLAIN_STEPS}
        key = cache.content_key(
            rows.select(numbers) if len(numbers) < len(rows) else rows,
            self.processor.tokenizer,
            [self.steps.map_row],
            [
                plain,
                [is_packed, seed, self.steps.frames.frames, self.steps.frames.fps],
                str(self.steps.folder.resolve()),
                self.processor.to_json_string(),
                str(self.processor.chat_template),
            ],
            [
                *(content_parts, encode, image_refs, video_refs, placeholders),
                *(video_texts, image_files, videos),
                *(messages, arrow_writer, packs),
            ],
        )
        return cache.prepared_once(key, write)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def length(self) -> list[int]:
        """Tokens of each row, those of placeholders included."""
        return list(self.table["length"])

    @property
    def modality_length(self) -> list[int]:
        """What each row costs, in tokens; negative for rows without an image.

        Pixels count too: the visual encoder works on them beside the language model.
        """
        costs, images = list(self.table["cost"]), self.table["images_per_sample"]
        return [cost if any(counts) else -cost for cost, counts in zip(costs, images, strict=True)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row with its images decoded.

        Returns:
            As rows of ``process_hf_dataset``, and ``images``: for each sample a list of images;
            ``image_checks``: the checksum of the placeholders of each.
        """
        return self.row(index)

    def row(self, index: int, images: list[list[Visual]] | None = None) -> dict[str, Any]:
        """A row, as ``__getitem__`` gives it.

        Args:
            index: of the row.
            images: its images, where they are decoded already.
        """
        row = dict(self.table[index])
        counts = row.pop("images_per_sample")
        facts = np.array(row.pop("images"), dtype=np.int64).reshape(-1, FIELDS)
        bounds = row.get("cumulative_len") or [0, len(row["input_ids"])]
        row["image_checks"] = facts[:, -1].tolist()
        if images is not None:
            return {**row, "images": images}
        row["images"] = []
        ends = np.cumsum(counts)
        for place, (number, count) in enumerate(zip(row["rows"], counts, strict=True)):
            own = facts[ends[place] - count : ends[place]]
            try:
                row["images"].append(self._images(number, own) if count else [])
            except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                named = self.steps.named(number)
                logger.warning(tr("not trained on, %s"), f"{named}: {error}")
                row["images"].append([self._blank(each) for each in own.tolist()])
                start, stop = bounds[place], bounds[place + 1]
                row["labels"][start:stop] = [IGNORE_INDEX] * (stop - start)
        return row

    def _images(self, number: int, facts: Any) -> list[Visual]:
        """The first images of a source row, decoded, in the sizes that tokens were counted for."""
        (row,) = self.source[[number]]
        found = conversation_of(row, self.steps.map_row).images[: len(facts)]
        images = []
        for ref, each in zip(found, facts.tolist(), strict=True):
            try:
                images.append(self._decoded(ref, each))
            except OSError as error:
                raise OSError(f"{ref}: {error.strerror or error}") from error
        return images

    def _decoded(self, ref: ImageRef | VideoRef, facts: Sequence[int]) -> Visual:
        """An image or a video.

        Raises:
            OSError: when it cannot be read, or is not what was measured.
        """
        shape = shape_of(facts)
        if isinstance(shape, VideoShape):
            assert isinstance(ref, VideoRef)
            now = ref.shape(self.steps.folder, self.steps.frames)
            _require_unchanged((*now[:2], now.total), (*facts[:2], shape.total))
            return ref.clip(self.steps.folder, shape)
        assert isinstance(ref, ImageRef)
        image = decode_image(ref.open(self.steps.folder))
        _require_unchanged(image.size, tuple(facts[:2]))
        return scaled_image(image, shape[:2])

    def _blank(self, facts: Sequence[int]) -> Visual:
        """What is processed in place of an image or a video that cannot be read."""
        shape = shape_of(facts)
        return blank_clip(shape) if isinstance(shape, VideoShape) else Image.new("RGB", shape)


def _require_unchanged(now: Sequence[int], then: Sequence[int]) -> None:
    if tuple(now) != tuple(then):
        raise OSError(
            tr(
                "it is {now}, and was {then} when the data were prepared",
                now=" x ".join(map(str, now)),
                then=" x ".join(map(str, then)),
            )
        )


def _image_folder(folder: str | None, dataset: object) -> Path:
    """What relative paths are relative to."""
    if folder is not None:
        return Path(folder).expanduser()
    files = local_files(dataset) if isinstance(dataset, Mapping) and "type" in dataset else None
    if files is None or not files.paths:
        return Path()
    first = Path(files.paths[0])
    return first if first.is_dir() else first.parent


def _name_bad(bad: Mapping[int, str], steps: VisionSteps) -> None:
    for number, why in itertools.islice(bad.items(), NAMED):
        logger.warning(tr("left out, %s%s"), "", f"{steps.named(number)}: {why}")
    if len(bad) > NAMED:
        logger.warning(tr("... and %d more rows"), len(bad) - NAMED)


def _alone(lengths: Any) -> Packs:
    """Rows of one sample each."""
    count = len(lengths)
    return Packs(np.arange(count), np.zeros_like(lengths), lengths, np.ones(count, np.int64))


def _write_packs(
    encoded: ImageSamples, max_length: int, seed: int | None, folder: Path, key: str, threads: int
) -> None:
    samples = encoded.texts
    order = np.arange(len(samples))
    if seed is not None:
        order = np.array(shuffled(len(samples), seed))
    made = best_fit_packs(samples.lengths[order], max_length)
    made = replace(made, samples=order[made.samples])
    write_packed(
        samples,
        made,
        folder,
        for_varlen=True,
        key=key,
        threads=usable_processes(threads),
        columns=encoded.columns(made),
    )

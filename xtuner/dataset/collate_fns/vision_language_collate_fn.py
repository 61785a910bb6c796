"""Rows with images → one batch, its images processed as the model's own processor does."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xtuner.dataset.collate_fns.default_collate_fn import default_collate_fn
from xtuner.dataset.vision_language.placeholders import placeholders_of
from xtuner.utils.constants import DEFAULT_PAD_TOKEN_INDEX
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import ProcessorMixin

    from xtuner.dataset.videos import Clip


IMAGE, VIDEO = 1, 2
"""Kinds of tokens."""


def vision_language_collate_fn(
    instances: Sequence[Mapping[str, Any]],
    processor: ProcessorMixin | Mapping[str, Any],
    pad_index: int = DEFAULT_PAD_TOKEN_INDEX,
    return_hf_format: bool = False,
    use_varlen_attn: bool = False,
) -> dict[str, Any]:
    """Make a batch.

    Args:
        instances: rows of ``VisionLanguageDataset``, or pairs of
            ``VisionLanguagePreferenceDataset``: of the batch every second sample is a rejected one.
        processor: of transformers, or its config; the same as the dataset's.
        pad_index: id that padding gets.
        return_hf_format: give the tensors alone, as transformers' Trainer wants them.
        use_varlen_attn: the rows are joined into one row whose samples do not see each other.

    Returns:
        As ``default_collate_fn``, and in the data ``mm_token_type_ids`` (B, S), 1 for tokens of an
        image, 2 for those of a video; ``images``, the tensors that the model takes for all images
        and videos of the batch, in order, absent where there are none; ``images_per_sample``, a
        number for each sample.

    Raises:
        UserError: when the processor writes other placeholders than the rows have.
    """
    instances = [sample for row in instances for sample in _samples(row)]
    texts = [{k: v for k, v in row.items() if not k.startswith("image")} for row in instances]
    batch = default_collate_fn(texts, pad_index, return_hf_format, use_varlen_attn)
    data = batch if return_hf_format else batch["data"]
    known = placeholders_of(processor)
    types = _token_types(known.processor, instances, use_varlen_attn)
    samples: list[list[Image | Clip]] = [images for row in instances for images in row["images"]]
    with_images = [images for images in samples if images]
    is_video = (types == VIDEO).any() and known.frames_are_images
    data["mm_token_type_ids"] = types.clamp(max=IMAGE) if is_video else types
    if with_images:
        data["images"], written = known.process(with_images)
        expected = [check for row in instances for check in row["image_checks"]]
        if [text.checksum for text in written] != expected:
            raise UserError(
                tr("the collate function's processor writes other placeholders than the dataset's"),
                hint=tr("give both the same processor."),
                where=Where(key="collate_fn.processor"),
            )
    if return_hf_format:
        return {**data, **data.pop("images", {})}
    data["images_per_sample"] = list(map(len, samples))
    return batch


def _samples(row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """A row, or the two answers of a pair, of which the first has the numbers of its row."""
    if "chosen" not in row:
        return [row]
    rejected = {name: value for name, value in row["rejected"].items() if name != "rows"}
    return [row["chosen"], rejected]


def _token_types(processor: Any, instances: Sequence[Mapping[str, Any]], is_packed: bool) -> Tensor:
    """(B, S) which tokens stand for images; 0 for padding."""
    rows = [list(row["input_ids"]) for row in instances]
    rows = [list(itertools.chain.from_iterable(rows))] if is_packed else rows
    types = map(torch.tensor, processor.create_mm_token_type_ids(rows))
    return pad_sequence(list(types), batch_first=True)

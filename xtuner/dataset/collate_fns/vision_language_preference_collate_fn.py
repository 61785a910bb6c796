"""Pairs of answers about images → one batch, chosen and rejected answers in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xtuner.dataset.collate_fns.vision_language_collate_fn import vision_language_collate_fn
from xtuner.utils.constants import DEFAULT_PAD_TOKEN_INDEX, PREFERENCE_SIDES

if TYPE_CHECKING:
    from transformers import ProcessorMixin


def vision_language_preference_collate_fn(
    instances: Sequence[Mapping[str, Any]],
    processor: ProcessorMixin | Mapping[str, Any],
    pad_index: int = DEFAULT_PAD_TOKEN_INDEX,
    return_hf_format: bool = False,
    use_varlen_attn: bool = False,
) -> dict[str, Any]:
    """Make a batch in which chosen and rejected answers take turns.

    Args:
        instances: pairs of ``VisionLanguagePreferenceDataset``.
        processor: of transformers, or its config; the same as the dataset's.
        pad_index: id that padding gets.
        return_hf_format: give the tensors alone.
        use_varlen_attn: the answers are joined into one row and do not see each other.

    Returns:
        As ``vision_language_collate_fn``; of 2 B rows (or packed samples) every second one is a
        rejected answer.
    """
    samples = [dict(pair[side]) for pair in instances for side in PREFERENCE_SIDES]
    for rejected in samples[1::2]:  # both are of one row of the data
        rejected.pop("rows", None)
    return vision_language_collate_fn(
        samples, processor, pad_index, return_hf_format, use_varlen_attn
    )

"""Rows of a dataset → one batch of tensors, padded or packed: "Batch" in the architecture."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xtuner.utils.constants import DEFAULT_PAD_TOKEN_INDEX, IGNORE_INDEX


def default_collate_fn(
    instances: Sequence[Mapping[str, Any]],
    pad_index: int = DEFAULT_PAD_TOKEN_INDEX,
    return_hf_format: bool = False,
    use_varlen_attn: bool = False,
) -> dict[str, Any]:
    """Make a batch.

    Args:
        instances: rows with ``input_ids`` and ``labels``; packed ones with ``cumulative_len`` and
            ``position_ids``; with images ``pixel_values``, (3, H, W) or, of several, (N, 3, H, W).
        pad_index: id that padding gets.
        return_hf_format: give the tensors alone, as transformers' Trainer wants them.
        use_varlen_attn: the rows are joined into one row whose samples do not see each other.

    Returns:
        ``{'data': tensors, 'data_samples': None}``, or the tensors with ``return_hf_format``.
    """
    data = _joined(instances) if use_varlen_attn else _padded(instances, pad_index)
    if any("rows" in row for row in instances):
        data["rows"] = [number for row in instances for number in row.get("rows", [])]
        data["parts"] = [row.get("part", 0) for row in instances for _ in row.get("rows", [])]
    images = [row["pixel_values"] for row in instances if row.get("pixel_values") is not None]
    if images:
        data["pixel_values"] = torch.cat([_of_row(torch.as_tensor(image)) for image in images])
    if return_hf_format:
        data.pop("rows", None)
        data.pop("parts", None)
        return data
    return {"data": data, "data_samples": None}


def _padded(instances: Sequence[Mapping[str, Any]], pad_index: int) -> dict[str, Any]:
    ids = [_ids(row["input_ids"]) for row in instances]
    labels = [_ids(row["labels"]) for row in instances]
    lengths = torch.tensor([len(row) for row in ids])
    padded = pad_sequence(ids, batch_first=True, padding_value=pad_index)
    places = torch.arange(padded.shape[1]).expand(len(ids), -1)
    return {
        "input_ids": padded,
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": (places < lengths[:, None]).long(),
        "position_ids": places.clone(),
    }


def _joined(instances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sizes: list[int] = []
    for row in instances:
        bounds = row.get("cumulative_len") or [0, len(row["input_ids"])]
        sizes += [b - a for a, b in itertools.pairwise(bounds)]
    cu_seqlens = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.cat([_ids(row["input_ids"]) for row in instances])[None],
        "labels": torch.cat([_ids(row["labels"]) for row in instances])[None],
        "position_ids": torch.cat([torch.arange(size) for size in sizes])[None],
        "cumulative_len": [cu_seqlens],
        "max_seqlen": max(sizes),
    }


def _ids(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.long)


def _of_row(pixels: Tensor) -> Tensor:
    """The images of a row, (N, 3, H, W)."""
    return pixels if pixels.dim() == 4 else pixels[None]

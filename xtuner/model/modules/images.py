"""Images in a sequence of tokens: features replace the image tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise, repeat
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from xtuner.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from xtuner.utils.types import Batch, ImagePlaces

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def has_class_token(visual_encoder: PreTrainedModel) -> bool:
    """Whether the first feature of an encoder stands for the whole image (CLIP), not a patch."""
    return any(name.endswith("class_embedding") for name, _ in visual_encoder.named_parameters())


def visual_features(visual_encoder: PreTrainedModel, pixel_values: Tensor, layer: int) -> Tensor:
    """The patches of images as a layer of the encoder sees them.

    Args:
        visual_encoder: of transformers: CLIP, SigLIP, ...
        pixel_values: (N, 3, H, W).
        layer: which hidden states; -2 are those before the last layer.

    Returns:
        (N, P, W): P patches without the class token.
    """
    dtype = next(visual_encoder.parameters()).dtype
    outputs = visual_encoder(pixel_values.to(dtype), output_hidden_states=True)
    states = outputs.hidden_states[layer]
    return states[:, 1:] if has_class_token(visual_encoder) else states


def freeze_unseen_layers(visual_encoder: PreTrainedModel, layer: int) -> None:
    """Freeze what comes after the layer whose states are taken: it never gets a gradient.

    Args:
        visual_encoder: changed in place.
        layer: which hidden states are taken.
    """
    for name, module in visual_encoder.named_modules():
        if isinstance(module, nn.ModuleList) and name.endswith("layers"):
            used = layer if layer >= 0 else len(module) + 1 + layer
            for unseen in module[used:]:
                unseen.requires_grad_(False)
        elif name.rpartition(".")[2] in ("post_layernorm", "head"):
            module.requires_grad_(False)


def find_images(data: Batch) -> ImagePlaces:
    """Find the image tokens of a batch; of one on a GPU the CPU has to wait for each answer.

    Args:
        data: as for ``merge_images``.
    """
    ids, mask = data["input_ids"], data.get("attention_mask")
    rows = [slice(0, ids.shape[1])] * len(ids)
    if mask is not None:
        # A row's real tokens: first in rows padded on the right, last when padded on the left.
        first = [bool(one) for one in mask[:, 0].tolist()]
        lengths = mask.sum(1).tolist()
        rows = [
            slice(0, length) if right else slice(ids.shape[1] - length, ids.shape[1])
            for right, length in zip(first, lengths, strict=True)
        ]
    is_image = ids == IMAGE_TOKEN_INDEX
    places = [is_image[n, real].nonzero().flatten().tolist() for n, real in enumerate(rows)]
    packed = data.get("cumulative_len")
    if packed is None:
        return ImagePlaces(rows, places, None)
    (cu_seqlens,) = packed if isinstance(packed, list | tuple) else [packed]
    return ImagePlaces(rows, places, cu_seqlens.tolist())


def merge_images(data: Batch, features: Tensor, embeddings: nn.Module) -> Batch:
    """Put the features of images in the places of their tokens.

    Args:
        data: ``input_ids`` (B, S) with ``IMAGE_TOKEN_INDEX``, and where given ``labels``,
            ``attention_mask`` (B, S) or ``cumulative_len`` (packed, B is 1); ``image_places``
            where they were found before the batch was copied.
        features: (N, P, H): P for each of N images, in the order of their tokens.
        embeddings: the language model's.

    Returns:
        The same with ``inputs_embeds`` instead of ``input_ids``; image positions have no label.
        What follows an image moves by P - 1, and cumulative lengths of packed samples with it.

    Raises:
        ValueError: when there are not as many images as image tokens.
    """
    ids, labels = data["input_ids"], data.get("labels")
    found = data.get("image_places") or find_images(data)
    count = sum(map(len, found.places))
    if count != len(features):
        raise ValueError(f"{count} image tokens in the text, but {len(features)} images")
    embedded = embeddings(ids.masked_fill(ids == IMAGE_TOKEN_INDEX, 0))
    images = iter(features.to(embedded.dtype))
    merged: Batch = {**data}
    for name in _REPLACED:
        merged.pop(name, None)
    rows = [
        _with_inserted(embedded[n, real], places, images)
        for n, (real, places) in enumerate(zip(found.rows, found.places, strict=True))
    ]
    merged["inputs_embeds"] = pad_sequence(rows, batch_first=True)
    if labels is not None:
        ignored = repeat(labels.new_full((features.shape[1],), IGNORE_INDEX))
        merged["labels"] = pad_sequence(
            [
                _with_inserted(labels[n, real], places, ignored)
                for n, (real, places) in enumerate(zip(found.rows, found.places, strict=True))
            ],
            batch_first=True,
            padding_value=IGNORE_INDEX,
        )
    if found.cu_seqlens is None:
        sizes = torch.tensor([len(row) for row in rows]).to(ids.device, non_blocking=True)
        columns = torch.arange(max(map(len, rows)), device=ids.device).expand(len(rows), -1)
        merged["attention_mask"] = (columns < sizes[:, None]).long()
        merged["position_ids"] = columns
        return merged
    # An image moves the boundaries after it.
    moved = [
        old + bisect_left(found.places[0], old) * (features.shape[1] - 1)
        for old in found.cu_seqlens
    ]
    lengths = [stop - start for start, stop in pairwise(moved)]
    cu_seqlens = torch.tensor(moved, dtype=torch.int32).to(ids.device, non_blocking=True)
    merged["cumulative_len"], merged["max_seqlen"] = [cu_seqlens], max(lengths)
    merged["position_ids"] = torch.cat([torch.arange(n, device=ids.device) for n in lengths])[None]
    return merged


_REPLACED: tuple[
    Literal[
        "input_ids", "attention_mask", "position_ids", "pixel_values", "labels", "image_places"
    ],
    ...,
] = ("input_ids", "attention_mask", "position_ids", "pixel_values", "labels", "image_places")


def _with_inserted(row: Tensor, places: list[int], images: Iterator[Tensor]) -> Tensor:
    """A row (S, ...) with (P, ...) of each image in place of its token."""
    segments, start = [], 0
    for place in places:
        segments += [row[start:place], next(images)]
        start = place + 1
    return torch.cat([*segments, row[start:]])

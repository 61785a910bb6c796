"""Images in a sequence of tokens: features replace the image tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from xtuner.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from xtuner.utils.types import Batch

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


def merge_images(data: Batch, features: Tensor, embeddings: nn.Module) -> Batch:
    """Put the features of images in the places of their tokens.

    Args:
        data: ``input_ids`` (B, S) with ``IMAGE_TOKEN_INDEX``, and where given ``labels``,
            ``attention_mask`` (B, S) or ``cumulative_len`` (packed, B is 1).
        features: (N, P, H): P for each of N images, in the order of their tokens.
        embeddings: the language model's.

    Returns:
        The same with ``inputs_embeds`` instead of ``input_ids``; image positions have no label.
        What follows an image moves by P - 1, and cumulative lengths of packed samples with it.

    Raises:
        ValueError: when there are not as many images as image tokens.
    """
    ids = data["input_ids"]
    is_image = ids == IMAGE_TOKEN_INDEX
    count = int(is_image.sum())
    if count != len(features):
        raise ValueError(f"{count} image tokens in the text, but {len(features)} images")
    embedded = embeddings(ids.masked_fill(is_image, 0))
    spans = torch.where(is_image, features.shape[1], 1)
    mask = data.get("attention_mask")
    lengths = [int(n) for n in mask.sum(1)] if mask is not None else [ids.shape[1]] * len(ids)
    images = iter(features.to(embedded.dtype))
    rows, labels = [], []
    for row, length in enumerate(lengths):
        # A row's real tokens: first in rows padded on the right, last when padded on the left.
        real = slice(0, length) if mask is None or bool(mask[row, 0]) else slice(-length, None)
        rows.append(_merged_row(embedded[row, real], is_image[row, real], images))
        if data.get("labels") is not None:
            label = data["labels"][row, real].masked_fill(is_image[row, real], IGNORE_INDEX)
            labels.append(label.repeat_interleave(spans[row, real]))
    merged: Batch = {**data}
    for name in _REPLACED:
        merged.pop(name, None)
    merged["inputs_embeds"] = pad_sequence(rows, batch_first=True)
    if labels:
        merged["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
    sizes = torch.tensor([len(row) for row in rows], device=ids.device)
    places = torch.arange(int(sizes.max()), device=ids.device).expand(len(rows), -1)
    if data.get("cumulative_len") is None:
        merged["attention_mask"] = (places < sizes[:, None]).long()
        merged["position_ids"] = places
        return merged
    merged["cumulative_len"], sizes_of_samples = _moved_cu_seqlens(data["cumulative_len"], spans[0])
    merged["max_seqlen"] = max(sizes_of_samples)
    merged["position_ids"] = torch.cat(
        [torch.arange(n, device=ids.device) for n in sizes_of_samples]
    )[None]
    return merged


_REPLACED: tuple[
    Literal["input_ids", "attention_mask", "position_ids", "pixel_values", "labels"], ...
] = ("input_ids", "attention_mask", "position_ids", "pixel_values", "labels")


def _merged_row(embedded: Tensor, is_image: Tensor, images: Iterator[Tensor]) -> Tensor:
    segments, start = [], 0
    for place in is_image.nonzero().flatten().tolist():
        segments += [embedded[start:place], next(images)]
        start = place + 1
    return torch.cat([*segments, embedded[start:]])


def _moved_cu_seqlens(
    cumulative_len: list[Tensor] | Tensor, spans: Tensor
) -> tuple[list[Tensor], list[int]]:
    """Cumulative lengths of a packed row with its images, and the lengths of its samples."""
    (old,) = cumulative_len if isinstance(cumulative_len, list | tuple) else [cumulative_len]
    ends = torch.cat([spans.new_zeros(1), spans.cumsum(0)])
    new = ends[old.long()].to(torch.int32)
    return [new], [int(size) for size in new.diff()]

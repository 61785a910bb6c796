"""Rows with images: the arguments of their own that a vision-language class takes.

Shapes: B rows of S tokens, N samples of a packed row, L tokens of the longest one.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from xtuner.model.backends.interfaces import sample_lengths
from xtuner.model.probe import EXACT, NOISE_FACTOR
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.types import Batch

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""What classes call the kinds of tokens: 0 text, 1 image, 2 video."""
FOR_POSITIONS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
"""What of the images says how many positions they take."""


def arguments(function: Any) -> frozenset[str]:
    """The names of a function's parameters."""
    return frozenset(inspect.signature(function).parameters)


def require_images(data: Batch, types: Tensor) -> None:
    """Refuse rows whose images are missing, and images without a place.

    Args:
        data: a batch.
        types: (B, S) kinds of its tokens.

    Raises:
        UserError: when there are image tokens and no images, or the reverse.
    """
    marked = bool((types != 0).any())
    if marked and not data.get("images"):
        raise UserError(
            tr("the rows have image tokens, and no images came with them."),
            hint=tr("collate them with vision_language_collate_fn and the model's own processor."),
            where=Where(key="train_dataloader.collate_fn"),
        )
    if data.get("images") and not marked:
        raise UserError(
            tr("images came with rows that have no image tokens."),
            hint=tr("collate them with vision_language_collate_fn and the model's own processor."),
            where=Where(key="train_dataloader.collate_fn"),
        )


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Explain what classes of transformers say when tokens and features differ in number.

    Raises:
        UserError: in place of their ValueError.
    """
    try:
        yield
    except ValueError as error:
        if "features" not in str(error) or "tokens" not in str(error):
            raise
        raise UserError(
            tr("the images do not fit the rows: {error}", error=error),
            hint=tr("give the dataset, the collate function and the model the same processor."),
            where=Where(key="model.processor"),
        ) from error


def rope_positions(body: nn.Module, data: Batch, types: Tensor, cu_seqlens: Tensor | None) -> Any:
    """Positions of three dimensions, as the class computes them for each sample.

    Args:
        body: with ``get_rope_index``.
        data: with ``input_ids`` (B, S) and ``images``; ``attention_mask`` (B, S) unless packed.
        types: (B, S) kinds of its tokens.
        cu_seqlens: (N + 1,) of a packed row; None of other rows.

    Returns:
        (3, B, S) time, height and width of each token; each sample begins with 0.
    """
    known: Any = body.get_rope_index
    images: Mapping[str, Any] = data.get("images") or {}
    grids = {name: images[name] for name in FOR_POSITIONS if images.get(name) is not None}
    ids, mask = data["input_ids"], data.get("attention_mask")
    if cu_seqlens is None:
        rows = {"input_ids": ids, "mm_token_type_ids": types, "attention_mask": mask, **grids}
        return known(**_taken(known, rows))[0]
    lengths = sample_lengths(cu_seqlens)
    mask = _as_rows(torch.ones_like(ids), lengths)
    rows = {
        "input_ids": _as_rows(ids, lengths),
        "mm_token_type_ids": _as_rows(types, lengths),
        "attention_mask": mask,
        **grids,
    }
    positions = known(**_taken(known, rows))[0]
    return positions[:, mask.bool()][:, None]


def _as_rows(row: Tensor, lengths: list[int]) -> Tensor:
    """(N, L) samples of a packed row (1, S), with 0 after each."""
    return pad_sequence(list(row[0].split(lengths)), batch_first=True)


def _taken(function: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    names = arguments(function)
    return {name: value for name, value in settings.items() if name in names}


def float_tensors(value: object) -> Iterator[Tensor]:
    """All tensors of floating-point numbers in a nested output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from float_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from float_tensors(item)


@torch.no_grad()
def require_separate_samples(
    forward: Callable[[Batch], Tensor], data: Batch, types: Tensor, name: str
) -> None:
    """Refuse a class whose packed samples see each other where there are images.

    The words of the first sample are put into another order, and no output of the others may move;
    what an experts' sum is rounded to is measured by the same with the last sample.

    Args:
        forward: computes outputs (1, S, D), without dropout.
        data: a packed row of at least two samples.
        types: (1, S) kinds of its tokens.
        name: of the class, for the message.

    Raises:
        UserError: with the settings to write instead.
    """
    cu_seqlens = data["cumulative_len"][0].tolist()
    first, last = slice(0, cu_seqlens[1]), slice(cu_seqlens[-2], cu_seqlens[-1])
    outputs = forward(data)
    moved = change(forward(_with_other_text(data, types, first)), outputs)[first.stop :]
    noise = change(forward(_with_other_text(data, types, last)), outputs)[first]
    if float(moved.max()) <= max(EXACT, NOISE_FACTOR * float(noise.max())):
        return
    raise UserError(
        tr(
            "packed samples with images are not computed separately by {name}: a sample changes by "
            "{leak:.1%} when the one before it changes.",
            name=name,
            leak=float(moved.max()),
        ),
        hint=tr("set pack_to_max_length = False and use_varlen_attn = False."),
        where=Where(key="model.use_varlen_attn"),
    )


def _with_other_text(data: Batch, types: Tensor, sample: slice) -> Batch:
    ids = data["input_ids"].clone()
    is_text = torch.zeros_like(types, dtype=torch.bool)
    is_text[:, sample] = types[:, sample] == 0
    ids[is_text] = ids[is_text].flip(0)
    return {**data, "input_ids": ids}


def change(outputs: Tensor, before: Tensor) -> Tensor:
    """(S,) relative change of each token's output: (1, S, D) each."""
    moved = (outputs.float() - before.float()).norm(dim=-1)
    return torch.nan_to_num(moved / before.float().norm(dim=-1).clamp_min(1e-12), nan=torch.inf)[0]

"""Reading the weights out of a DeepSpeed folder (ZeRO 1, 2, 3), without DeepSpeed.

A folder holds, beside ``*model_states.pt`` (names, shapes, and for ZeRO 1 and 2 the weights in the
training dtype), one ``*zero_pp_rank_R_mp_rank_00_optim_states.pt`` a rank with its part of the fp32
master weights, laid end to end. Those are what is returned for trained parameters::

    ZeRO 1, 2   one flat tensor a parameter group, cut into as many parts as there are ranks
                rank 0 |aaaaaaaaabb|   rank 1 |bbbccc.....|        (. padding)
    ZeRO 3      each parameter cut into equal parts, the last one padded
                rank 0 |aaaabbbcc|     rank 1 |aaaabb.cc|
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from xtuner.checkpoint.io import read_torch_file
from xtuner.checkpoint.lazy import LazyWeights, Make
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_")
FLAT = "single_partition_of_fp32_groups"  # of ZeRO 1 and 2
FLAT_3 = "fp32_flat_groups"


def is_deepspeed_folder(folder: Path) -> bool:
    """Whether a folder (or the one its ``latest`` file names) was written by DeepSpeed."""
    return any(_inside(folder).glob("*model_states.pt"))


def load_deepspeed(folder: Path) -> LazyWeights:
    """Read the weights: trained ones in fp32 as the optimizer had them, others as they were saved.

    Args:
        folder: ``iter_N.pth``, or a folder whose file ``latest`` names one.

    Returns:
        Name -> tensor, made when it is read.

    Raises:
        UserError: when a rank's file is missing, or the parts do not fit the shapes.
    """
    inside = _inside(folder)
    models = [read_torch_file(file, mapped=True) for file in _by_rank(inside, "*model_states.pt")]
    first = models[0]
    if first.get("mp_world_size", 1) != 1:
        raise _unreadable(inside, tr("tensor parallelism is not read"))
    made = dict(_trained(inside, first))
    for name, value in first["module"].items():
        if name not in made and isinstance(value, torch.Tensor):
            made[name] = partial(_frozen, name, value, models)
    for alias, name in dict(first.get("shared_params") or {}).items():
        if name in made:
            made[alias] = made[name]
    return LazyWeights(made)


def _trained(inside: Path, first: Mapping[str, Any]) -> Iterator[tuple[str, Make]]:
    """How to put the trained parameters together, in fp32, from the ranks' parts."""
    files = _by_rank(inside, "*optim_states.pt")
    if not files or "param_shapes" not in first:
        return
    parts = [read_torch_file(file, mapped=True)["optimizer_state_dict"] for file in files]
    counts = parts[0].get("partition_count", len(parts))
    ranks = max(counts) if isinstance(counts, (list, tuple)) else counts
    if ranks != len(parts):
        raise _unreadable(
            inside,
            tr(
                "it was written by {ranks} ranks, there are optimizer files of {count}",
                ranks=ranks,
                count=len(parts),
            ),
        )
    shapes = first["param_shapes"]
    shapes = [shapes] if isinstance(shapes, Mapping) else shapes
    try:
        if FLAT in parts[0]:
            yield from _from_whole_groups(shapes, [part[FLAT] for part in parts])
        else:
            yield from _from_cut_parameters(shapes, [part[FLAT_3] for part in parts])
    except (ValueError, KeyError) as error:
        raise _unreadable(inside, str(error)) from error


def _from_whole_groups(
    shapes: Sequence[Mapping[str, Any]], parts: Sequence[Sequence[torch.Tensor]]
) -> Iterator[tuple[str, Make]]:
    """ZeRO 1 and 2. Args: name -> shape, a group each; flat tensors, [rank][group]."""
    for group, named in enumerate(shapes):
        segments = [rank[group] for rank in parts]
        start = 0
        for name, shape in named.items():
            count = torch.Size(shape).numel()
            yield name, partial(_whole, [segments], start, count, count, shape)
            start += count
        _require(segments, start)


def _from_cut_parameters(
    shapes: Sequence[Mapping[str, Any]], parts: Sequence[Sequence[torch.Tensor]]
) -> Iterator[tuple[str, Make]]:
    """ZeRO 3. Args: name -> shape, a group each; flat tensors, [rank][sub-group]."""
    start = 0
    for named in shapes:
        for name, shape in named.items():
            count = torch.Size(shape).numel()
            share = -(-count // len(parts))
            yield name, partial(_whole, parts, start, share, count, shape)
            start += share
    for rank in parts:
        _require(rank, start)


def _whole(
    parts: Sequence[Sequence[torch.Tensor]],
    start: int,
    share: int,
    count: int,
    shape: Sequence[int],
) -> torch.Tensor:
    """One tensor: the same slice of each part, concatenated, without the padding after it."""
    cut = [_take(segments, start, share) for segments in parts]
    return (cut[0] if len(cut) == 1 else torch.cat(cut))[:count].view(shape).detach()


def _take(segments: Sequence[torch.Tensor], start: int, count: int) -> torch.Tensor:
    """Elements ``start`` to ``start + count`` of flat tensors laid end to end."""
    taken, position = [], 0
    for piece in segments:
        low = max(start - position, 0)
        high = min(start + count - position, piece.numel())
        if low < high:
            taken.append(piece[low:high])
        position += piece.numel()
    return taken[0] if len(taken) == 1 else torch.cat(taken) if taken else segments[0][:0]


def _require(segments: Sequence[torch.Tensor], expected: int) -> None:
    """See that flat tensors hold as many elements as the shapes ask for."""
    found = sum(piece.numel() for piece in segments)
    if found < expected:
        raise ValueError(f"{expected:,} elements expected, {found:,} found")


def _frozen(name: str, value: torch.Tensor, models: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """A weight that was not trained: whole in ZeRO 1 and 2, sharded over the ranks in ZeRO 3."""
    shape = dict(models[0].get("frozen_param_shapes") or {}).get(name)
    if value.numel() or shape is None:
        return value.detach()
    cut = [model["frozen_param_fragments"][name].flatten() for model in models]
    return torch.cat(cut)[: torch.Size(shape).numel()].view(shape).detach()


def _inside(folder: Path) -> Path:
    latest = folder / "latest"
    return folder / latest.read_text("utf-8").strip() if latest.is_file() else folder


def _by_rank(inside: Path, pattern: str) -> list[Path]:
    """Files in the order of their ranks (as text, rank 10 would come before rank 2)."""

    def rank(file: Path) -> tuple[int, ...]:
        found = RANK.search(file.name)
        return tuple(map(int, found.groups())) if found else (0, 0)

    return sorted(inside.glob(pattern), key=rank)


def _unreadable(folder: Path, why: str) -> UserError:
    return UserError(
        tr("the DeepSpeed folder cannot be read: {why}.", why=why),
        hint=tr("copy the whole folder, with the files of every rank."),
        where=Where(str(folder)),
    )

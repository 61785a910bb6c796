"""Copying batches to where the model computes; to a GPU while it computes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def to_device(value: object, device: torch.device) -> Any:
    """Copy the tensors of a nested batch to ``device``; leave everything else as it is.

    To a GPU they are copied from pinned memory on a stream of their own: the CPU runs ahead of the
    GPU, which is still at the micro-batch before.
    """
    if device.type != "cuda":
        return _copied(value, device)
    stream, current = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        copied = _copied(value, device)
    current.wait_stream(stream)
    for tensor in _tensors(copied):
        tensor.record_stream(current)  # its memory is not given away before it was used
    return copied


def _copied(value: object, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        if device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: _copied(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, device) for item in value)
    return value


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)

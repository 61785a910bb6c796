"""Writing the weights of a Hugging Face folder in shards, one tensor at a time.

``ShardWriter`` is told the names, shapes and dtypes of all tensors before the first is written. So
memory is bounded by one tensor (safetensors) or one shard (``.bin``).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from xtuner.export.weights import BIN, DTYPES, INDEX_SUFFIX, SAFETENSORS, TensorInfo, shown
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}


def parse_size(text: str) -> int:
    """The bytes of a size such as ``2GB``, ``500MB`` or ``1GiB``.

    Raises:
        UserError: when it is not a size above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None or float(match[1]) <= 0:
        raise UserError(
            tr("{text!r} is not a shard size.", text=text),
            hint=tr("write for example 2GB or 500MB."),
        )
    return int(float(match[1]) * factor)


def check_space(folder: Path, needed: int) -> None:
    """Check that the disk of a folder has room.

    Args:
        folder: it need not exist yet.
        needed: bytes.

    Raises:
        UserError: when less is free.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            tr(
                "this needs {needed}, but only {free} are free there.",
                needed=_amount(needed),
                free=_amount(free),
            ),
            hint=tr("make room, or choose a folder on another disk."),
            where=Where(str(folder)),
        )


def _amount(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


class ShardWriter:
    """Writes the weights of a Hugging Face folder, a tensor at a time.

    Tensors may come in any order; in that of ``plan`` a ``.bin`` shard is held in memory at a time,
    and nothing of safetensors.

    Args:
        folder: where to write; made if needed.
        plan: all tensors that will be written.
        max_shard_size: bytes; a larger single tensor gets a shard of its own.
        safe: safetensors, or else ``pytorch_model*.bin``.

    Example:
        ``with ShardWriter(folder, plan, 2 * 10**9) as writer: writer.write(name, tensor)``
    """

    def __init__(
        self, folder: Path, plan: Sequence[TensorInfo], max_shard_size: int, safe: bool = True
    ) -> None:
        from huggingface_hub import split_torch_state_dict_into_shards

        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._kind: type[_SafetensorsShard | _BinShard] = _SafetensorsShard if safe else _BinShard
        self._name = SAFETENSORS if safe else BIN
        self._infos = {info.name: info for info in plan}
        stem, _, suffix = self._name.rpartition(".")
        self._split = split_torch_state_dict_into_shards(
            {i.name: torch.empty(i.shape, dtype=i.dtype, device="meta") for i in plan},
            filename_pattern=f"{stem}{{suffix}}.{suffix}",
            max_shard_size=max_shard_size,
        )
        self._left = {file: set(names) for file, names in self._split.filename_to_tensors.items()}
        self._shards: dict[str, _SafetensorsShard | _BinShard] = {}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for shard in self._shards.values():
            shard.abandon()
        if kind is None:
            left = sorted(name for names in self._left.values() for name in names)
            assert not left, f"planned but not written: {shown(left)}"
            self._write_index()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor; its shape and dtype must be as planned."""
        info = self._infos[name]
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), (name, tensor.shape)
        file = self._split.tensor_to_filename[name]
        if file not in self._shards:
            infos = [self._infos[each] for each in self._split.filename_to_tensors[file]]
            self._shards[file] = self._kind(self._folder / file, infos)
        self._shards[file].write(name, tensor)
        self._left[file].remove(name)
        if not self._left[file]:
            self._shards.pop(file).finish()

    def _write_index(self) -> None:
        if not self._split.is_sharded:
            return
        weight_map = dict(sorted(self._split.tensor_to_filename.items()))
        index = {"metadata": self._split.metadata, "weight_map": weight_map}
        file = self._folder / f"{self._name}{INDEX_SUFFIX}"
        file.write_text(json.dumps(index, indent=2) + "\n", "utf-8")


class _SafetensorsShard:
    """A safetensors file whose header is written first, and then each tensor at its offset.

    safetensors' own ``save_file`` needs all tensors of a file in memory.
    """

    def __init__(self, file: Path, infos: Sequence[TensorInfo]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        offset = 0
        # Wide elements first, so that each tensor starts at a multiple of its element's size.
        for info in sorted(infos, key=lambda info: -info.dtype.itemsize):
            self._offsets[info.name] = offset
            header[info.name] = {
                "dtype": _DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            offset += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = file.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + offset)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._file.seek(self._start + self._offsets[name])
        self._file.write(flat.view(torch.uint8).numpy().data)

    def finish(self) -> None:
        self._file.close()

    abandon = finish


class _BinShard:
    """A file of ``torch.save``, which is written as a whole."""

    def __init__(self, file: Path, infos: Sequence[TensorInfo]) -> None:
        self._file = file
        self._tensors: dict[str, torch.Tensor] = {}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self._tensors[name] = tensor.clone()

    def finish(self) -> None:
        torch.save(self._tensors, self._file)

    def abandon(self) -> None:
        self._tensors.clear()

"""A Hugging Face folder's weights, read and written one tensor at a time.

``Weights`` knows the names, shapes and dtypes of all tensors before one is read; ``ShardWriter``
is told all of them before the first is written. So memory is bounded by one tensor (safetensors)
or one shard (``.bin``), however large the model is.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

SAFETENSORS = "model.safetensors"
BIN = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of safetensors' header by name."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def parse_size(text: str) -> int:
    """Bytes meant by a text such as ``2GB``, ``500MB`` or ``1GiB``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None or float(match[1]) <= 0:
        raise UserError(
            tr("{text!r} is not a size of a shard.", text=text),
            hint=tr("write for example 2GB or 500MB."),
        )
    return int(float(match[1]) * factor)


def check_space(folder: Path, needed: int) -> None:
    """Refuse ahead what does not fit on the disk of ``folder`` (bytes)."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            tr(
                "this needs {needed:.2f} GB, but only {free:.2f} GB are free there.",
                needed=needed / 1e9,
                free=free / 1e9,
            ),
            hint=tr("make room, or choose a folder on another disk."),
            where=Where(str(folder)),
        )


class Weights:
    """The tensors of a Hugging Face folder, or of one file, by name.

    Args:
        path: a folder with ``*.safetensors`` or ``pytorch_model*.bin``, with or without an index,
            or one such file.

    Raises:
        UserError: no weights there, a shard of the index missing, a shard damaged or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path] if path.is_file() else _files_of(path)
        self.infos: dict[str, TensorInfo] = {}
        self._home: dict[str, Path] = {}
        self._starts: dict[str, int] = {}
        self._mapped: tuple[Path, dict[str, torch.Tensor]] | None = None
        for file in self.files:
            for info in self._describe(file):
                self.infos[info.name] = info
                self._home[info.name] = file
        self._check_index()

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor onto the CPU. Reading in the order of ``infos`` is fastest."""
        if name not in self._home:
            raise UserError(
                tr("there is no tensor {name!r}.", name=name),
                where=Where(str(self.path)),
            )
        file = self._home[name]
        if file.suffix != ".safetensors":
            return self._map_bin(file)[name]
        # Plain reading, not mapping: mapped pages would stay in memory until the file is closed.
        info = self.infos[name]
        data = bytearray(info.nbytes)
        with file.open("rb") as opened:
            opened.seek(self._starts[name])
            opened.readinto(data)
        if not data:
            return torch.empty(info.shape, dtype=info.dtype)
        return torch.frombuffer(data, dtype=info.dtype).reshape(info.shape)

    def _describe(self, file: Path) -> Iterator[TensorInfo]:
        if file.suffix == ".safetensors":
            for info, start in read_header(file):
                self._starts[info.name] = start
                yield info
            return
        for name, tensor in self._map_bin(file).items():
            yield TensorInfo(name, tuple(tensor.shape), tensor.dtype)

    def _map_bin(self, file: Path) -> dict[str, torch.Tensor]:
        """The tensors of a ``.bin``, mapped; one file at a time, so that memory is given back."""
        if self._mapped is None or self._mapped[0] != file:
            self._mapped = None
            try:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                raise damaged(file, error) from error
            self._mapped = (file, state)
        return self._mapped[1]

    def _check_index(self) -> None:
        index = _index_of(self.path)
        if index is None:
            return
        missing = sorted(set(_weight_map(index)) - set(self.infos))
        if missing:
            raise UserError(
                tr(
                    "the index names tensors that no shard holds: {missing}", missing=shown(missing)
                ),
                hint=tr("download or convert the model again."),
                where=Where(str(index)),
            )


def read_header(file: Path) -> list[tuple[TensorInfo, int]]:
    """What a safetensors file holds and where it starts; checks that the file is whole."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = file.stat().st_size
            if not 0 < length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(opened.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes, but its header asks for {8 + length + end}")
        unknown = sorted({entry["dtype"] for entry in entries.values()} - set(DTYPES))
        if unknown:
            raise ValueError(f"dtypes that are not known here: {', '.join(unknown)}")
        ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
        return [
            (
                TensorInfo(name, tuple(entry["shape"]), DTYPES[entry["dtype"]]),
                8 + length + entry["data_offsets"][0],
            )
            for name, entry in ordered
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: BaseException) -> UserError:
    """The refusal of a file of weights that cannot be read."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        tr("this file of weights is damaged: {reason}", reason=reason),
        hint=tr("download or convert the model again."),
        where=Where(str(file)),
    )


def shown(names: Iterable[str], limit: int = 8) -> str:
    """Names for a message: the first few, and how many more."""
    listed = list(names)
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (tr(" and {more} more", more=more) if more > 0 else "")


def _files_of(folder: Path) -> list[Path]:
    index = _index_of(folder)
    if index is not None:
        files = [folder / name for name in sorted(set(_weight_map(index).values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise UserError(
                tr("shards are missing: {absent}", absent=shown(absent)),
                hint=tr("download or convert the model again."),
                where=Where(str(folder)),
            )
        return files
    for pattern in ("*.safetensors", "pytorch_model*.bin", "*.bin"):
        files = sorted(file for file in folder.glob(pattern) if file.name != "training_args.bin")
        if files:
            return files
    raise UserError(
        tr("there are no weights here."),
        hint=tr("a folder with *.safetensors or pytorch_model*.bin is expected."),
        where=Where(str(folder)),
    )


def _index_of(path: Path) -> Path | None:
    if path.is_file():
        return None
    for name in (SAFETENSORS, BIN):
        index = path / f"{name}{INDEX_SUFFIX}"
        if index.is_file():
            return index
    return None


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text("utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(index, error) from error


class ShardWriter:
    """Writes the weights of a Hugging Face folder, a tensor at a time, in the planned order.

    Args:
        folder: where to write; made if needed.
        plan: all tensors that will be written, in order.
        max_shard_size: bytes; a larger single tensor gets a shard of its own.
        safe: safetensors, or else ``pytorch_model*.bin``.

    Example:
        ``with ShardWriter(folder, plan, 2 * 10**9) as writer: writer.write(name, tensor)``
    """

    def __init__(
        self, folder: Path, plan: Sequence[TensorInfo], max_shard_size: int, safe: bool = True
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._safe = safe
        self._shards = _cut(plan, max_shard_size)
        self._names = _shard_names(SAFETENSORS if safe else BIN, len(self._shards))
        self._shard_of = {
            info.name: number for number, shard in enumerate(self._shards) for info in shard
        }
        self._infos = {info.name: info for info in plan}
        self._left = set(self._infos)
        self._current = -1
        self._file: Any = None
        self._starts: dict[str, int] = {}
        self._held: dict[str, torch.Tensor] = {}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish_shard()
            assert not self._left, f"planned but not written: {shown(sorted(self._left))}"
            self._write_index()
        elif self._file is not None:
            self._file.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor; its shape and dtype must be as planned."""
        info = self._infos[name]
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), (name, tensor.shape)
        if self._shard_of[name] != self._current:
            self._start_shard(self._shard_of[name])
        self._left.discard(name)
        if not self._safe:
            self._held[name] = tensor.clone()
            return
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._file.seek(self._starts[name])
        self._file.write(flat.view(torch.uint8).numpy().data)

    def _start_shard(self, number: int) -> None:
        assert number == self._current + 1, "tensors must be written in the planned order"
        self._finish_shard()
        self._current = number
        if not self._safe:
            return
        # Wide elements first, so that each tensor starts at a multiple of its element's size.
        shard = sorted(self._shards[number], key=lambda info: -info.dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for info in shard:
            end = offset + info.nbytes
            header[info.name] = {
                "dtype": _NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = (self._folder / self._names[number]).open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        base = 8 + len(text)
        self._starts = {info.name: base + header[info.name]["data_offsets"][0] for info in shard}
        self._file.truncate(base + offset)

    def _finish_shard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._held:
            torch.save(self._held, self._folder / self._names[self._current])
            self._held = {}

    def _write_index(self) -> None:
        if len(self._shards) == 1:
            return
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in self._infos.values())},
            "weight_map": {
                name: self._names[number] for name, number in sorted(self._shard_of.items())
            },
        }
        name = (SAFETENSORS if self._safe else BIN) + INDEX_SUFFIX
        (self._folder / name).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _cut(plan: Sequence[TensorInfo], max_shard_size: int) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in plan:
        if shards[-1] and size + info.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return shards


def _shard_names(name: str, count: int) -> list[str]:
    if count == 1:
        return [name]
    stem, _, suffix = name.rpartition(".")
    return [f"{stem}-{number:05d}-of-{count:05d}.{suffix}" for number in range(1, count + 1)]

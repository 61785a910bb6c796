"""Reading the weights of a Hugging Face folder, one tensor at a time.

``Weights`` knows the names, shapes and dtypes of all tensors before one is read, so that memory is
bounded by one tensor, however large the model is.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from xtuner.utils.errors import UserError, Where
from xtuner.utils.hub import INDEX_SUFFIX, read_weight_map
from xtuner.utils.lang import tr

SAFETENSORS = "model.safetensors"
BIN = "pytorch_model.bin"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The names of dtypes in the header of a safetensors file."""


@dataclass(frozen=True)
class TensorInfo:
    """The name, shape and dtype of a tensor that is not in memory."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Weights:
    """The tensors of a Hugging Face folder, or of one file, by name.

    Args:
        path: a folder with ``*.safetensors`` or ``pytorch_model*.bin``, with or without an index,
            or one such file.

    Raises:
        UserError: no weights there, a shard of the index missing, a shard damaged or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path] if path.is_file() else _files_of(path)
        self.infos: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        self._opened: tuple[Path, Callable[[str], torch.Tensor]] | None = None
        for file in self.files:
            for info in _describe(file):
                self.infos[info.name] = info
                self._file_of[info.name] = file
        self._check_index()

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor onto the CPU. Reading in the order of ``infos`` is fastest.

        Raises:
            UserError: when there is no such tensor.
        """
        if name not in self._file_of:
            raise UserError(
                tr("there is no tensor {name!r}.", name=name),
                where=Where(str(self.path)),
            )
        file = self._file_of[name]
        if self._opened is None or self._opened[0] != file:
            self._opened = None  # one file at a time, so that its memory is released
            self._opened = file, _open(file)
        return self._opened[1](name)

    def _check_index(self) -> None:
        index = _index_of(self.path)
        if index is None:
            return
        missing = sorted(set(read_weight_map(index)) - set(self.infos))
        if missing:
            raise UserError(
                tr(
                    "the index names tensors that no shard holds: {missing}", missing=shown(missing)
                ),
                hint=tr("download or convert the model again."),
                where=Where(str(index)),
            )


def _open(file: Path) -> Callable[[str], torch.Tensor]:
    """A function that reads a tensor of a file by its name."""
    if file.suffix == ".safetensors":
        # Read, not mapped: mapped pages would count as memory until the file is closed.
        return safe_open(file, framework="pt", backend="pread").get_tensor
    return _map_bin(file).__getitem__


def _describe(file: Path) -> Iterator[TensorInfo]:
    """What a file holds, in the order of its bytes."""
    if file.suffix != ".safetensors":
        for name, tensor in _map_bin(file).items():
            yield TensorInfo(name, tuple(tensor.shape), tensor.dtype)
        return
    try:
        with safe_open(file, framework="pt", backend="pread") as opened:
            for name in opened.offset_keys():
                entry = opened.get_slice(name)
                yield TensorInfo(name, tuple(entry.get_shape()), _dtype_named(entry.get_dtype()))
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(file, error) from error


def _dtype_named(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"unknown dtype: {name}")
    return DTYPES[name]


def _map_bin(file: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except pickle.UnpicklingError as error:  # torch's text advises to switch its protection off
        raise UserError(
            tr("this file holds more than data, or is damaged; nothing from it was run."),
            hint=tr("use weights in safetensors, from a source that you trust."),
            where=Where(str(file)),
        ) from error
    except Exception as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: BaseException) -> UserError:
    """The error for a file of weights that cannot be read."""
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
        files = [folder / name for name in sorted(set(read_weight_map(index).values()))]
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

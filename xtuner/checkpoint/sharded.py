"""Reading the weights out of a folder of torch's distributed checkpoints (FSDP), in one process.

torch itself unpickles the folder's ``.metadata``, which could run code. Here it is read by an
unpickler that knows nothing but the few dataclasses a ``.metadata`` consists of.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePath
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem, load, metadata
from torch.distributed.checkpoint.api import CheckpointException

from xtuner.checkpoint.lazy import LazyWeights
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

MODEL = ("state_dict.", "model.")  # where a checkpoint with more than weights keeps them
METADATA = "torch.distributed.checkpoint.metadata"
METADATA_NAMES = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)


def _known() -> dict[tuple[str, str], Any]:
    """All that a ``.metadata`` consists of; private names of torch, as far as this torch has them.

    A file that needs one that is missing is refused by its name when it is read.
    """
    known: dict[tuple[str, str], Any] = {("torch", "Size"): torch.Size}
    for path in ("pathlib", "pathlib._local"):
        known |= {(path, "PosixPath"): PurePath, (path, "WindowsPath"): PurePath}
    private = [
        *((METADATA, metadata, name) for name in METADATA_NAMES),
        ("torch.distributed.checkpoint.filesystem", filesystem, "_StorageInfo"),
        ("torch.serialization", torch.serialization, "_get_layout"),
    ]
    for module, place, name in private:
        if hasattr(place, name):
            known[module, name] = getattr(place, name)
    return known


def load_sharded(folder: Path) -> LazyWeights:
    """Read the weights, whichever number of processes wrote them.

    Args:
        folder: with ``.metadata`` and ``*.distcp`` files. Of a checkpoint that also holds the
            optimizer only what is under ``state_dict`` or ``model`` is read.

    Returns:
        Name, without that prefix -> whole tensor, put together when it is read.

    Raises:
        UserError: when the folder is damaged or asks for code.
    """
    reader = DataReader(folder)
    with _explained(folder):
        described = reader.read_metadata().state_dict_metadata
    tensors = {
        name: entry
        for name, entry in described.items()
        if isinstance(entry, metadata.TensorStorageMetadata)
    }
    prefix = next((p for p in MODEL if any(name.startswith(p) for name in tensors)), "")
    return LazyWeights(
        {
            name.removeprefix(prefix): partial(_one, reader, name, entry)
            for name, entry in tensors.items()
            if name.startswith(prefix)
        }
    )


def _one(reader: DataReader, name: str, entry: metadata.TensorStorageMetadata) -> torch.Tensor:
    """One tensor from the files that have parts of it."""
    wanted = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
    with _explained(Path(reader.path)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed.*")
        load(wanted, storage_reader=reader, no_dist=True)
    return wanted[name]


def find_damage(folder: Path) -> str | None:
    """What is wrong with a folder that has no manifest; each of its tensors is read.

    Args:
        folder: with ``*.distcp`` files.

    Returns:
        None when all that ``.metadata`` lists is there, and agrees with its own checksums.
    """
    try:
        with _explained(folder):
            stored = DataReader(folder).read_metadata().storage_data or {}
            for place in stored.values():
                if not _is_whole(folder / place.relative_path, place.offset, place.length):
                    return tr("its part {broken} is damaged", broken=place.relative_path)
    except UserError as error:
        return error.message.rstrip(".\u3002")
    return None


def _is_whole(file: Path, offset: int, length: int) -> bool:
    """Whether a stretch of a file, which torch writes as a zip archive, has not changed."""
    with file.open("rb") as stream:
        stream.seek(offset)
        stored = io.BytesIO(stream.read(length))
    try:
        with zipfile.ZipFile(stored) as archive:
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:  # around what went wrong in each process; here one
        cause: Any = next(iter(error.failures.values()))[0]
        raise _unreadable(folder, cause) from error
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, KeyError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: BaseException) -> UserError:
    return UserError(
        tr("the folder cannot be read: {error}. Nothing from it was run.", error=error),
        where=Where(str(folder)),
    )


class DataReader(FileSystemReader):
    """torch's reader, with a ``.metadata`` that can hold data only."""

    _described: metadata.Metadata | None = None

    def read_metadata(self, *args: object, **kwargs: object) -> metadata.Metadata:
        """Read ``.metadata``, once, by the list of known names."""
        if self._described is not None:
            return self._described
        with (Path(self.path) / ".metadata").open("rb") as stream:
            described = _DataUnpickler(stream).load()
        if not isinstance(described, metadata.Metadata):
            raise pickle.UnpicklingError(".metadata describes no checkpoint")
        described.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        self._described = described
        return described


class _DataUnpickler(pickle.Unpickler):
    """Builds only the dataclasses of ``_known`` and torch's dtypes; anything else is refused."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self._known = _known()

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up in the list."""
        if (module, name) in self._known:
            return self._known[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}")

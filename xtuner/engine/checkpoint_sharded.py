"""Reading the weights out of a folder of torch's distributed checkpoints (FSDP), in one process.

torch itself unpickles the folder's ``.metadata``, which could run code. Here it is read by an
unpickler that knows nothing but the few dataclasses a ``.metadata`` consists of.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem, load, metadata

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

MODEL = ("state_dict.", "model.")  # where a checkpoint with more than weights keeps them
KNOWN = {
    ("torch.distributed.checkpoint.metadata", name): getattr(metadata, name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("pathlib", "PosixPath"): PurePath,
    ("pathlib", "WindowsPath"): PurePath,
    ("pathlib._local", "PosixPath"): PurePath,
    ("pathlib._local", "WindowsPath"): PurePath,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}


def is_sharded_folder(folder: Path) -> bool:
    """Whether a folder was written by ``torch.distributed.checkpoint``."""
    return (folder / ".metadata").is_file()


def load_sharded(folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights, whichever number of processes wrote them.

    Args:
        folder: with ``.metadata`` and ``*.distcp`` files. Of a checkpoint that also holds the
            optimizer only what is under ``state_dict`` or ``model`` is read.

    Returns:
        Name, without that prefix -> whole tensor.

    Raises:
        UserError: when the folder is damaged or asks for code.
    """
    reader = DataReader(folder)
    try:
        described = reader.read_metadata().state_dict_metadata
        tensors = {
            name: entry
            for name, entry in described.items()
            if isinstance(entry, metadata.TensorStorageMetadata)
        }
        prefix = next((p for p in MODEL if any(name.startswith(p) for name in tensors)), "")
        weights = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in tensors.items()
            if name.startswith(prefix)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed.*")
            load(weights, storage_reader=reader, no_dist=True)
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, KeyError) as error:
        raise UserError(
            tr(
                f"the folder cannot be read: {error}. Nothing from it was run.",
                f"无法读取这个文件夹: {error}。没有执行其中的任何内容。",
            ),
            where=Where(str(folder)),
        ) from error
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


class DataReader(FileSystemReader):
    """torch's reader, with a ``.metadata`` that can hold data only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """Read ``.metadata`` by the list of known names."""
        with (Path(self.path) / ".metadata").open("rb") as stream:
            described = _DataUnpickler(stream).load()
        if not isinstance(described, metadata.Metadata):
            raise pickle.UnpicklingError(".metadata describes no checkpoint")
        described.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return described


class _DataUnpickler(pickle.Unpickler):
    """Builds only the dataclasses of ``KNOWN`` and torch's dtypes; anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up in the list."""
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}")

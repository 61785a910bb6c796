"""The weights of a training checkpoint, memory-mapped and released as they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from xtuner.export.weights import TensorInfo, shown
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

REMAP_AFTER = 256 * 2**20
"""Bytes read after which the file is mapped again, which releases the pages that were read."""


class TrainedWeights:
    """The tensors of a checkpoint's ``state_dict``, by name.

    Args:
        path: an ``iter_N.pth``, or a folder of DeepSpeed or FSDP.
        remap_after: bytes; see ``REMAP_AFTER``.

    Raises:
        UserError: when it is missing or damaged.
    """

    def __init__(self, path: Path, remap_after: int = REMAP_AFTER) -> None:
        from xtuner.checkpoint.checkpoint import load_state_dict

        self.path = path
        self._remap_after = remap_after
        self._read_since = 0
        self.tensors: Mapping[str, torch.Tensor] = load_state_dict(path)
        # One pass only: a sharded checkpoint gathers each tensor when it is accessed.
        self.infos = {
            name: TensorInfo(name, tuple(tensor.shape), tensor.dtype)
            for name, tensor in self.tensors.items()
        }

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor; it may be a memory-mapped view of the file."""
        tensor = self.tensors[name]
        self._read_since += tensor.nbytes
        if self._read_since > self._remap_after and self.path.is_file():
            self._remap()
            tensor = self.tensors[name]
        return tensor

    def check(self, expected: Mapping[str, torch.Tensor]) -> None:
        """Compare names and shapes with those of the model; the error lists all differences.

        Raises:
            UserError: when tensors are missing, unexpected, or of another shape.
        """
        found = self.infos
        problems = _listed(tr("missing"), sorted(set(expected) - set(found)))
        problems += _listed(tr("unexpected"), sorted(set(found) - set(expected)))
        problems += _listed(
            tr("of another shape"),
            [
                f"{name} {list(found[name].shape)} != {list(expected[name].shape)}"
                for name in sorted(set(found) & set(expected))
                if found[name].shape != tuple(expected[name].shape)
            ],
        )
        if problems:
            raise UserError(
                tr("the checkpoint does not fit the model of the config; tensors are\n  ")
                + "\n  ".join(problems),
                hint=tr("use the config that this checkpoint was trained with."),
                where=Where(str(self.path)),
            )

    def _remap(self) -> None:
        from xtuner.checkpoint.io import read_torch_file

        self.tensors = {}
        state = read_torch_file(self.path, mapped=True)
        self.tensors = {
            name: value
            for name, value in state.get("state_dict", state).items()
            if isinstance(value, torch.Tensor)
        }
        self._read_since = 0


def _listed(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    return [f"{what}: {shown(names, 4)}"] if names else []

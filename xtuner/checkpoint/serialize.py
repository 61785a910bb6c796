"""What may stand in a checkpoint: plain data and tensors, so that loading one never runs code."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

DATA = (str, int, float, bool, complex, torch.dtype, torch.device)


class SavedHistory:
    """Stands in for mmengine's ``HistoryBuffer`` while a checkpoint of XTuner v0.1 is read."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.max_length = state["max_length"]
        self._log_history = state["_log_history"]
        self._count_history = state["_count_history"]


def to_serializable(value: object, where: str = "") -> Any:
    """Copy nested data, with every object in it put as plain data.

    Tensors come out detached and on the CPU, arrays as tensors, mmengine's ``HistoryBuffer`` as a
    dict of its two histories (``mmengine_hub`` turns it back). Tensors that share their memory
    share it in the copy too; a small view of a large tensor is copied out of it.

    Args:
        value: nested dicts, lists, tuples and the leaves named above.
        where: the path of keys to ``value``, for the error message.

    Raises:
        TypeError: for an object that is neither data nor a tensor, with its path of keys.
    """
    if value is None or type(value) in DATA:
        return value
    if isinstance(value, torch.Tensor):
        return _plain_tensor(value)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {
            to_serializable(key): to_serializable(item, f"{where}.{key}")
            for key, item in value.items()
        }
    if isinstance(value, (list, deque, set, frozenset)):
        return [to_serializable(item, f"{where}[{i}]") for i, item in enumerate(_in_order(value))]
    if isinstance(value, tuple):
        return tuple(to_serializable(item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, Path):
        return str(value)
    if _is_history(value):
        history: Any = value
        return {
            "log_history": torch.from_numpy(np.array(history._log_history, dtype=np.float64)),
            "count_history": torch.from_numpy(np.array(history._count_history, dtype=np.float64)),
            "max_length": int(history.max_length),
        }
    for kind in (str, int, float):  # subclasses, such as an enum of strings, as what they hold
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(
        f"a checkpoint holds plain data and tensors only; {where.lstrip('.') or 'it'} is a "
        f"{type(value).__module__}.{type(value).__qualname__}"
    )


def mmengine_hub(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the plain form of a message hub's state back into what its ``load_state_dict`` takes."""
    from mmengine.logging import HistoryBuffer

    scalars = {}
    for name, history in plain.get("log_scalars", {}).items():
        buffer = HistoryBuffer(max_length=history["max_length"])
        buffer._log_history = history["log_history"].numpy().copy()
        buffer._count_history = history["count_history"].numpy().copy()
        scalars[name] = buffer
    return {
        "log_scalars": scalars,
        "runtime_info": dict(plain.get("runtime_info", {})),
        "resumed_keys": dict(plain.get("resumed_keys", {})),
    }


def _plain_tensor(value: torch.Tensor) -> torch.Tensor:
    tensor = value.detach().as_subclass(torch.Tensor).cpu()
    if tensor.is_sparse or tensor.is_quantized:
        return tensor
    if tensor.untyped_storage().nbytes() > 2 * tensor.numel() * tensor.element_size():
        return tensor.clone()
    return tensor


def _in_order(values: Iterable[Any]) -> Iterable[Any]:
    """Sets are written sorted, so that the same state gives the same file."""
    return sorted(values) if isinstance(values, (set, frozenset)) else values


def _is_history(value: object) -> bool:
    """Whether this is mmengine's HistoryBuffer (mmengine is not imported to find out)."""
    return isinstance(value, SavedHistory) or any(
        kind.__module__.startswith("mmengine.") and kind.__name__ == "HistoryBuffer"
        for kind in type(value).__mro__
    )

"""CUDA tensors without a GPU: shapes, dtypes, devices and autograd are real, floats have no values.

``FakeTensorMode`` of a CUDA build of torch, and a recorder of what a GPU would be asked to do. Of
integers and booleans, on which the flow of the program depends, the values are computed on the CPU.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

import xtuner

DEVICE = torch.device("cuda:0")
PACKAGE = Path(xtuner.__file__).parent
ALLOCATED = 512
"""Bytes of which torch's allocator gives out multiples."""
NO_KERNEL = {
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::_unsafe_view",
    "prim::device",
}
READS = ("aten::_local_scalar_dense", "aten::equal", "aten::allclose")
"""Operations whose result the CPU has to know."""
SIZES = (
    "aten::nonzero",
    "aten::masked_select",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
)
"""Operations of whose result the CPU has to know the size."""
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_")
"""Operations with a list of indices, of which masks have to be counted."""
PRODUCTS = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}
"""Matrix products, with the places of their factors."""


class _Stream:
    """A stream whose work is done at once, in the order of the program."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or DEVICE

    def record_event(self) -> None:
        """There is nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """All before it is done."""

    wait_stream = wait_event


def pretend(capability: tuple[int, int]) -> None:
    """Let torch answer as on one GPU of a compute capability."""
    fake_tensor.init_gpu_context = lambda *_: None
    FakeTensorMode.avoid_device_init = property(lambda _: True)  # type: ignore[assignment]
    native = capability >= (8, 0)
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: capability,
        "is_bf16_supported": lambda including_emulation=True: native or including_emulation,
        "is_current_stream_capturing": lambda: False,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda _: contextlib.nullcontext(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


def on_gpu(mode: FakeTensorMode, value: Tensor) -> FakeTensor:
    """A fake CUDA tensor of the same shape, strides and dtype."""
    like = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    there = FakeTensor(mode, like, DEVICE)
    if value.device.type == "cpu" and not value.dtype.is_floating_point:
        there.known = value
    return there


def batch_on_gpu(mode: FakeTensorMode, batch: Any) -> Any:
    """A nested batch with its tensors on the GPU."""
    return tree_map_only(Tensor, lambda value: on_gpu(mode, value), batch)


def move(mode: FakeTensorMode, module: nn.Module) -> None:
    """Move parameters, buffers, tensor attributes and 4-bit states to the GPU; ties are kept."""
    moved: dict[int, Tensor] = {}

    def one(value: Tensor) -> Tensor:
        if id(value) not in moved:
            there: Tensor = on_gpu(mode, value.detach())
            if isinstance(value, nn.Parameter):
                there = nn.Parameter(there, requires_grad=value.requires_grad)
                state = getattr(value, "quant_state", None)
                if state is not None:
                    there.quant_state = _moved_state(mode, state)  # type: ignore[attr-defined]
                    there.bnb_quantized = True  # type: ignore[attr-defined]
            moved[id(value)] = there
        return moved[id(value)]

    for child in module.modules():
        for store in (child._parameters, child._buffers, vars(child)):
            for name, value in list(store.items()):
                if isinstance(value, Tensor):
                    store[name] = one(value)


def _moved_state(mode: FakeTensorMode, state: Any) -> Any:
    """A ``QuantState`` with its tensors on the GPU."""
    there = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(there, name, on_gpu(mode, value))
    if state.state2 is not None:
        there.state2 = _moved_state(mode, state.state2)
    return there


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """All tensors that a module keeps, those of 4-bit states too."""
    for child in module.modules():
        for value in [*child._parameters.values(), *child._buffers.values()]:
            if value is None:
                continue
            yield value
            state = getattr(value, "quant_state", None)
            while state is not None:
                yield from (v for v in vars(state).values() if isinstance(v, Tensor))
                state = state.state2


class Recorder(TorchDispatchMode):
    """Records waits for the GPU, kernels, bytes that they read and write, products and memory.

    Args:
        mode: of the fake tensors.

    Attributes:
        waits: what makes the CPU wait, by operation and line of the product.
        kernels: launches by operation.
        bytes: read and written by all kernels.
        flops: of matrix products.
        live: bytes that are allocated; ``peak`` is their maximum.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self.live = self.peak = 0
        self._storages: dict[int, int] = {}
        self.clear()

    def clear(self) -> None:
        """Begin to count anew; memory stays."""
        self.waits: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.bytes = self.flops = 0
        self.peak = self.live

    def hold(self, value: Tensor) -> None:
        """Count a tensor's memory until it is freed."""
        if value.device.type != "cuda":
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // ALLOCATED) * ALLOCATED
        self._storages[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._storages.pop(key, 0)

    def __enter__(self):
        self._tolist = FakeTensor.tolist

        def tolist(value: FakeTensor) -> Any:
            self._wait("tolist")
            known = getattr(value, "known", None)
            return [1.0] * value.numel() if known is None else self._real(known.tolist)

        FakeTensor.tolist = tolist
        self._synchronize = torch.cuda.synchronize
        torch.cuda.synchronize = lambda *_: self._wait("synchronize")
        return super().__enter__()

    def __exit__(self, *args):
        FakeTensor.tolist = self._tolist
        torch.cuda.synchronize = self._synchronize
        return super().__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(value.device.type == "cuda" for value in inputs)
        if on_device:
            self._count_wait(name, args, kwargs)
        if any(isinstance(value, FakeTensor) for value in inputs):
            if name in READS:
                return self._answer(name, args)
            if name in SIZES and func is not torch.ops.aten.repeat_interleave.self_int:
                known = self._of_known(func, args, kwargs)
                return batch_on_gpu(self.mode, known) if on_device else known
        if name in INDEXED:
            args = (args[0], self._without_masks(args[1]), *args[2:])
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, FakeTensor)]
        for value in outputs:
            self.hold(value)
        if outputs and not any(value.dtype.is_floating_point for value in outputs):
            self._compute_known(func, args, kwargs, outputs)
        touched = [v for v in [*inputs, *outputs] if v.device.type == "cuda"]
        if touched and not _is_view(func) and name not in NO_KERNEL:
            self.kernels[name] += 1
            self.bytes += sum(value.numel() * value.element_size() for value in touched)
            if name in PRODUCTS:
                one, other = (args[place] for place in PRODUCTS[name])
                self.flops += 2 * one.numel() * other.shape[-1]
        return out

    def _count_wait(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if name in READS or (name in SIZES and kwargs.get("output_size") is None):
            self._wait(name)
        if name in INDEXED and any(each is not None and _is_mask(each) for each in args[1]):
            self._wait("index by mask")
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[0] if name == "aten::_to_copy" else args[1]
            target = kwargs.get("device") if name == "aten::_to_copy" else args[0].device
            kind = torch.device(target or source.device).type
            goes_on = kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,))
            if kind != source.device.type and not goes_on:
                self._wait(f"copy {source.device.type} to {kind}")

    def _answer(self, name: str, args: Any) -> Any:
        """What the CPU is told: of integers the truth, of floats that all is well."""
        values = [_known(value) for value in args if isinstance(value, Tensor)]
        if any(value is None for value in values):
            return 1.0 if name == "aten::_local_scalar_dense" else True
        one, *others = values
        return self._real(one.item if not others else lambda: torch.equal(one, *others))

    def _compute_known(
        self, func: Any, args: Any, kwargs: dict[str, Any], outputs: list[FakeTensor]
    ) -> None:
        """Attach their values to outputs, if those of all inputs are known."""
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, Tensor) and _known(leaf) is None for leaf in leaves):
            return
        found = tree_leaves(self._of_known(func, args, kwargs))
        real = [leaf for leaf in found if isinstance(leaf, Tensor)]
        for value, known in zip(outputs, real, strict=True):
            value.known = known

    def _of_known(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What a function of known tensors computes, on the CPU."""
        args, kwargs = tree_map_only(Tensor, _known, (args, kwargs))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        return self._real(lambda: func(*args, **kwargs))

    def _without_masks(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """The positions at which masks are True in place of these."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or not _is_mask(index):
                found.append(index)
                continue
            known = _known(index)
            if known is None:
                known = torch.ones(
                    index.shape, dtype=torch.bool
                )  # all, where values of floats decide
            columns = self._real(lambda known=known: known.nonzero().unbind(1))
            on_device = index.device.type == "cuda"
            found += [on_gpu(self.mode, each) if on_device else each for each in columns]
        return found

    @staticmethod
    def _real(function: Any) -> Any:
        """Call a function of real tensors."""
        with _disable_current_modes():
            return function()

    def _wait(self, what: str) -> None:
        self.waits[f"{what} {_line()}"] += 1


def _known(value: Tensor) -> Tensor | None:
    """The values of a tensor, on the CPU; None of floats on the GPU."""
    known: Tensor | None = getattr(value, "known", None)
    return value if known is None and not isinstance(value, FakeTensor) else known


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _is_view(func: Any) -> bool:
    aliases = [each.alias_info for each in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _line() -> str:
    """The innermost line of the product, and that of a library that it calls."""
    frames = [f for f in traceback.extract_stack() if "fake_cuda" not in f.filename]
    own = [f for f in frames if Path(f.filename).is_relative_to(PACKAGE)]
    called = [f for f in frames if "/torch/" not in f.filename]
    last = {
        f"{Path(each[-1].filename).name}:{each[-1].lineno}": 0 for each in (own, called) if each
    }
    return " via ".join(last)

"""Keep the inputs of recomputed layers in main memory, copied on a stream of their own.

An input goes there while its layer is computed. It comes back while the layer after it is computed
backward, so that a copy is waited for only where it takes longer than a layer. The GPU has at most
one layer's inputs beside those in use. Main memory is pinned once and used again in each step.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from xtuner.model.backends import environment


class Stream(Protocol):
    """Work beside the computation, done in the order in which it is given."""

    def run(self, work: Callable[[], object]) -> Any:
        """Do work after what the computation has been given up to now; a mark after it."""

    def wait(self, mark: Any) -> None:
        """Let what the computation is given from now on begin after a mark."""


class CudaStream:
    """A stream of a GPU beside the current one."""

    def __init__(self, device: torch.device) -> None:
        self._own = torch.cuda.Stream(device)

    def run(self, work: Callable[[], object]) -> torch.cuda.Event:
        self._own.wait_stream(torch.cuda.current_stream(self._own.device))
        with torch.cuda.stream(self._own):
            work()
        return self._own.record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._own.device).wait_event(mark)


class PinnedMemory:
    """Buffers in main memory that are used again.

    All copies into them and out of them are work of one stream: a buffer that is given back may be
    taken at once, as its next copy comes after its last.
    """

    def __init__(self) -> None:
        self.free: list[Tensor] = []
        self._largest = 0

    def take(self, size: int) -> Tensor:
        """A buffer of at least so many bytes; a free one that is too small is let go for it."""
        self._largest = max(self._largest, size)
        fitting = [buffer for buffer in self.free if buffer.numel() >= size]
        if fitting or self.free:
            chosen = min(fitting or self.free, key=Tensor.numel)
            self.free = [buffer for buffer in self.free if buffer is not chosen]
            if fitting:
                return chosen
        return torch.empty(self._largest, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


class KeptInput:
    """An input in main memory, as the graph of the backward pass keeps it.

    Args:
        source: the input, on the GPU.
        buffer: as many bytes of main memory, or more.
        memory: where the buffer is from.
        stream: of the copies.
        before: the inputs that the backward pass asks for next.
    """

    def __init__(
        self,
        source: Tensor,
        buffer: Tensor,
        memory: PinnedMemory,
        stream: Stream,
        before: Sequence[weakref.ref[KeptInput]],
    ) -> None:
        self._whole, self._memory, self._stream = buffer, memory, stream
        self._device, self._before = source.device, before
        self._on_gpu: Tensor | None = source
        self._buffer = buffer[: _size(source)].view(source.dtype).view(source.shape)
        self._mark = self._copy(self._buffer, source)

    def _copy(self, target: Tensor, source: Tensor) -> Any:
        return self._stream.run(lambda: target.copy_(source, non_blocking=True))

    def leave(self) -> None:
        """Let the tensor on the GPU go, after its copy."""
        if self._on_gpu is not None:
            self._stream.wait(self._mark)
            self._on_gpu = None

    def fetch(self) -> None:
        """Begin to copy it back, into memory that is the computation's."""
        if self._on_gpu is None:
            self._on_gpu = torch.empty_like(self._buffer, device=self._device)
            self._mark = self._copy(self._on_gpu, self._buffer)

    def get(self) -> Tensor:
        """The input on the GPU; those that are asked for next begin to come."""
        self.fetch()
        found = self._on_gpu
        assert found is not None
        self.leave()
        for kept in (ref() for ref in self._before):
            if kept is not None:
                kept.fetch()
        return found

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.leave()
            self._memory.free.append(self._whole)


class InputOffload:
    """Moves what checkpointing functions keep of their inputs on a GPU.

    Args:
        stream: makes the stream for the copies of a device.
    """

    def __init__(self, stream: Callable[[torch.device], Stream] = CudaStream) -> None:
        self._stream = functools.cache(stream)
        self._memory = PinnedMemory()
        self._last: list[weakref.ref[KeptInput]] = []

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A checkpointing function that keeps its inputs in main memory."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            own: list[weakref.ref[KeptInput]] = []
            before = self._last
            for kept in (ref() for ref in before):
                if kept is not None:
                    kept.leave()
            self._last = own

            def pack(tensor: Tensor) -> Tensor | KeptInput:
                if not environment.waits_for(tensor.device):
                    return tensor
                stream = self._stream(tensor.device)
                buffer = self._memory.take(_size(tensor))
                kept = KeptInput(tensor.detach(), buffer, self._memory, stream, before)
                own.append(weakref.ref(kept))
                return kept

            with saved_tensors_hooks(pack, _unpack):
                return function(*args, **kwargs)

        return call


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _unpack(kept: Tensor | KeptInput) -> Tensor:
    return kept.get() if isinstance(kept, KeptInput) else kept

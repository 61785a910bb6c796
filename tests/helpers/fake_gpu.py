"""A GPU that the product believes in, on a CPU: what is chosen there is run with plain torch.

Kernels are stand-ins with the real signatures. What would make the CPU wait for the GPU is counted.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from xtuner.model import base
from xtuner.model.backends import environment
from xtuner.model.backends.case import Case, Libraries, LibraryFunction
from xtuner.model.modules import attention

ON_THE_CPU = {"num_items", "count_tokens", "prepare_batch", "batch_on_device"}
"""Functions that look at batches before they are copied."""
PACKAGE = Path(base.__file__).parents[1]
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")
"""Operations whose result, or its size, the CPU has to know."""


def flash_attn(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
):
    """As flash-attn 2, sample by sample."""
    bounds = cu_seqlens_q.numpy()  # as a kernel reads it: on the device
    parts = [
        scaled_dot_product_attention(
            *(t[a:b].transpose(0, 1)[None] for t in (q, k, v)),
            is_causal=causal,
            scale=softmax_scale,
            enable_gqa=True,
        )
        for a, b in itertools.pairwise(bounds)
        if b > a
    ]
    return torch.cat(parts, 2)[0].transpose(0, 1)


def pretend(monkeypatch: Any, calls: list[Any] | None = None) -> None:
    """Let tensors of a CPU pass for those of an H100 with flash-attn, in float32 too.

    Args:
        monkeypatch: pytest's.
        calls: gets the longest sample of each call of the kernel.
    """

    def called(*args, **kwargs):
        if calls is not None:
            calls.append(kwargs["max_seqlen_q"])
        return flash_attn(*args, **kwargs)

    keywords = frozenset(inspect.signature(flash_attn).parameters)
    libraries = Libraries(LibraryFunction("", keywords))
    true = attention.Facts.case

    def case(facts: attention.Facts) -> Case:
        found = true(facts)
        changes = dict(device="cuda", capability=(9, 0), libraries=libraries)
        return replace(found, dtype=torch.bfloat16, **changes)

    for choice in ("packed_kernel", "_packed_choice", "padded_kernel", "dense_kernel"):
        monkeypatch.setattr(attention, choice, _uncached(getattr(attention, choice)))
    monkeypatch.setattr(environment, "function", {"flash_attn": called}.__getitem__)
    monkeypatch.setattr(attention.Facts, "case", case)
    monkeypatch.setattr(attention, "try_packed_kernel", lambda *_, **__: None)
    monkeypatch.setattr(environment, "waits_for", lambda device: True)
    monkeypatch.setattr(base, "packs_in_one_call", lambda model, dtype: True)


def _uncached(function: Any) -> Any:
    """A cache of its own, so that no choice of another machine is remembered."""
    return functools.cache(function.__wrapped__)


class Waits(TorchDispatchMode):
    """Counts what the CPU would wait for a GPU for, by the line of the product that asks.

    What is asked of batches before they are copied is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        masks = args[1] if name == "aten::index" else ()
        by_mask = any(mask is not None and mask.dtype is torch.bool for mask in masks)
        if name in READS or by_mask:
            self._count(name)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str) -> None:
        functions = {frame.name for frame in traceback.extract_stack()}
        if not functions & ON_THE_CPU:
            self.found[f"{name} {_line()}"] += 1

    def __enter__(self):
        self._tolist = torch.Tensor.tolist

        def tolist(tensor):
            self._count("tolist")
            return self._tolist(tensor)

        torch.Tensor.tolist = tolist
        return super().__enter__()

    def __exit__(self, *args):
        torch.Tensor.tolist = self._tolist
        return super().__exit__(*args)


def _line() -> str:
    """The innermost lines of the product, and of a library that it calls."""
    frames = [f for f in traceback.extract_stack()[:-2] if "/tests/" not in f.filename]
    own = [f for f in frames if f.filename.startswith(str(PACKAGE))]
    called = [f for f in frames if "/torch/" not in f.filename]
    return " via ".join(
        dict.fromkeys(f"{each[-1].filename}:{each[-1].lineno}" for each in (own, called) if each)
    )

"""Trying a kernel on a few tokens, output and gradients, before a run relies on it.

What a library declares says little: a build for another torch or another GPU fails when it is first
called, and a release may compute something else than the one before it.

Shapes: T tokens of a row, H query heads, K key heads, D width of a head of queries and keys, V of
values.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from xtuner.model.backends.case import Case
from xtuner.model.backends.interfaces import AttentionOptions, PackedKernel, Packing
from xtuner.model.backends.registry import Backend
from xtuner.utils.lang import tr

LENGTHS = (5, 24, 11)
"""Tokens of the samples."""
WINDOW, SOFTCAP, DROPOUT, SCALING = 4, 1.0, 0.1, 0.2
"""Settings that show in the output."""
TOLERANCE = 0.05
"""Largest relative difference of output and gradients: bfloat16 has a hundredth of rounding."""
logger = logging.getLogger(__name__)


def try_packed_kernel(
    backend: Backend[PackedKernel], case: Case, reference: PackedKernel
) -> str | None:
    """Compare a backend with a reference that computes in float32.

    Args:
        backend: it supports the case.
        case: what is computed; tensors are made on its device.
        reference: what it is compared with.

    Returns:
        None if it works, otherwise the reason why not, of which a warning is logged.
    """
    if backend.device is None:  # what it would be compared with
        return None
    try:
        # A thread begins on the first GPU.
        index = torch.cuda.current_device() if case.device == "cuda" else None
        device = torch.device(case.device, index) if index else torch.device(case.device)
        # Grad mode, autocast, checkpointing and the like belong to a thread: none there.
        with ThreadPoolExecutor(1) as thread:
            gap = thread.submit(_largest_gap, backend, case, device, reference).result()
    except Exception as error:  # libraries and compilers raise anything
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
    else:
        if gap <= TOLERANCE:
            return None
        why = tr("its values differ from torch's by {gap:.1%}", gap=gap)
    logger.warning(tr("%s is not used: %s"), backend.name, why)
    return why


def _largest_gap(
    backend: Backend[PackedKernel], case: Case, device: torch.device, reference: PackedKernel
) -> float:
    """The largest relative difference; 0 where weights are dropped and all values are finite."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    with torch.random.fork_rng([device] if cuda else []):
        tensors, options = _inputs(case, device)
        found = _with_gradients(backend.build(case), tensors, options)
        expected = _with_gradients(reference, [t.float() for t in tensors], options)
    if case.dropout:
        return 0.0 if all(t.isfinite().all() for t in found) else float("inf")
    gaps = [_gap(one, other) for one, other in zip(found, expected, strict=True)]
    return max(gaps)


def _inputs(case: Case, device: torch.device) -> tuple[list[Tensor], AttentionOptions]:
    """Queries, keys and values (1, H or K, T, D or V), and sinks (H,) where there are any."""
    draw = torch.Generator().manual_seed(0)
    heads, few = 4, 2 if case.grouped else 4

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, case.dtype)

    tokens = sum(LENGTHS)
    tensors = [
        random(1, tokens, heads, case.qk_width).transpose(1, 2),
        random(1, tokens, few, case.qk_width).transpose(1, 2),
        random(1, tokens, few, case.v_width).transpose(1, 2),
    ]
    if case.sinks:
        tensors.append(random(heads))
    options = AttentionOptions(
        causal=case.causal,
        scaling=SCALING if case.scaled else None,
        dropout=DROPOUT if case.dropout else 0.0,
        sliding_window=WINDOW if case.sliding_window else None,
        softcap=SOFTCAP if case.softcap else None,
    )
    return tensors, options


def _with_gradients(
    kernel: PackedKernel, tensors: list[Tensor], options: AttentionOptions
) -> list[Tensor]:
    """The output (1, T, H, V), and the gradient of each tensor."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    query, key, value, *sinks = tensors
    cu_seqlens = torch.tensor((0, *LENGTHS)).cumsum(0).to(query.device, torch.int32)
    packing = Packing(cu_seqlens, max(LENGTHS))
    out = kernel(query, key, value, packing, options._replace(sinks=sinks[0] if sinks else None))
    slope = torch.cos(torch.arange(out.numel(), device=out.device)).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, tensors, slope.to(out.dtype))]


def _gap(found: Tensor, expected: Tensor) -> float:
    """Infinite where values are not finite."""
    gap = (found.float() - expected).norm() / expected.norm()
    return float(torch.nan_to_num(gap, nan=torch.inf))

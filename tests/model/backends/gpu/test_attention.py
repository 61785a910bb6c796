"""Calls of the GPU kernels, their rules kept by stand-ins that compute on a CPU with plain torch.

The stand-ins refuse what the real ones refuse (unequal widths, widths that are no multiple of 8,
other than 16-bit numbers, unknown keywords), and mask by what they are told, not by what is right.
"""

import itertools

import pytest
import torch

from xtuner.model.backends import environment
from xtuner.model.backends.case import Case, Libraries, LibraryFunction
from xtuner.model.backends.gpu import attention as gpu
from xtuner.model.backends.interfaces import AttentionOptions, Packing

BORDERS = [0, 3, 4, 23, 40]


def masked(q, k, v, cu_seqlens, longest, scale, window, softcap=0.0):
    """(T, H, D) in float32, with ``window`` as flash-attn means it."""
    assert {q.dtype, k.dtype, v.dtype} <= {torch.float16, torch.bfloat16}
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.shape[-1] % 8 == 0
    assert longest == int(cu_seqlens.diff().max())
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    places = torch.arange(len(q))
    sample = torch.bucketize(places, cu_seqlens[1:].long(), right=True)
    seen = sample[:, None] == sample[None, :]
    left, right = window
    if left >= 0:
        seen &= places[None, :] >= places[:, None] - left
    if right >= 0:
        seen &= places[None, :] <= places[:, None] + right
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)


def flash_attn(
    q, k, v, cu_q, cu_k, max_q, max_k, *, dropout_p, softmax_scale, causal, window_size, softcap
):
    left, right = window_size
    window = (left, 0 if causal else right)
    return masked(q, k, v, cu_q, max_q, softmax_scale, window, softcap)


def varlen_2_10(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, return_aux=None):
    assert q.shape[1] == k.shape[1]
    window = (-1, 0 if is_causal else -1)
    return masked(q, k, v, cu_q, max_q, q.shape[-1] ** -0.5, window)


def varlen_2_11(
    q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert q.shape[1] == k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return masked(q, k, v, cu_q, max_q, scale, window_size)


def varlen_2_12(
    q,
    k,
    v,
    cu_q,
    cu_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    assert enable_gqa or q.shape[1] == k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return masked(q, k, v, cu_q, max_q, scale, window_size)


def plain(query, key, value, options):
    """(1, T, H, V) sample by sample, every score formed, in float64."""
    parts = []
    for start, stop in itertools.pairwise(BORDERS):
        q, k, v = (t[0, :, start:stop].double() for t in (query, key, value))
        k, v = (t.repeat_interleave(len(q) // len(k), 0) for t in (k, v))
        scale = q.shape[-1] ** -0.5 if options.scaling is None else options.scaling
        scores = q @ k.mT * scale
        if options.softcap:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        ones = torch.ones_like(scores, dtype=torch.bool)
        seen = ones.tril() if options.causal else ones
        if options.sliding_window:
            seen = seen & ones.triu(1 - options.sliding_window)
            seen = seen & ones.tril(options.sliding_window - 1)
        parts.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v)
    return torch.cat(parts, 1).transpose(0, 1)[None]


KERNELS = {
    "flash_attn": ("flash_attn", gpu.FLASH_ATTN, flash_attn),
    "torch_2.10": ("varlen_attn", gpu.VARLEN_ATTN, varlen_2_10),
    "torch_2.11": ("varlen_attn", gpu.VARLEN_ATTN, varlen_2_11),
    "torch_2.12": ("varlen_attn", gpu.VARLEN_ATTN, varlen_2_12),
}
SHAPES = {  # H, K, D, V
    "plain": (4, 4, 16, 16),
    "grouped": (6, 2, 16, 16),
    "latent": (4, 4, 24, 16),
    "wide values": (4, 4, 16, 24),
    "odd": (4, 2, 20, 20),
}
OPTIONS = {
    "causal": AttentionOptions(),
    "scaled": AttentionOptions(scaling=0.7),
    "both ways": AttentionOptions(causal=False),
    "window": AttentionOptions(sliding_window=5),
    "window both ways": AttentionOptions(causal=False, sliding_window=5),
    "softcap": AttentionOptions(softcap=0.5),
}


def case_of(name, stand_in, shape, options):
    import inspect

    found = LibraryFunction("", frozenset(inspect.signature(stand_in).parameters))
    heads, few, width, v_width = shape
    return Case(
        "cuda",
        (9, 0),
        libraries=Libraries(**{name: found}),
        qk_width=width,
        v_width=v_width,
        grouped=heads != few,
        packed=True,
        causal=options.causal,
        scaled=options.scaling is not None,
        sliding_window=options.sliding_window is not None,
        softcap=options.softcap is not None,
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_a_backend_supports_it_computes(kernel, shape, options, monkeypatch):
    """Output and gradients are those of plain attention, for every case that is not refused."""
    name, backend, stand_in = KERNELS[kernel]
    heads, few, width, v_width = SHAPES[shape]
    options = OPTIONS[options]
    case = case_of(name, stand_in, SHAPES[shape], options)
    if backend.supports(case) is not None:
        assert kernel.startswith("torch"), "flash-attn has all of these"
        pytest.skip(backend.supports(case))
    monkeypatch.setattr(environment, "function", {name: stand_in}.__getitem__)
    torch.manual_seed(0)
    tensors = [
        torch.randn(1, count, BORDERS[-1], size, dtype=torch.bfloat16, requires_grad=True)
        for count, size in ((heads, width), (few, width), (few, v_width))
    ]
    packing = Packing(torch.tensor(BORDERS, dtype=torch.int32), 19)
    found = backend.build(case)(*tensors, packing, options)
    expected = plain(*tensors, options)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    assert (found - expected).norm() < 1e-2 * expected.norm()
    slope = torch.randn_like(expected)
    ours = torch.autograd.grad(found, tensors, slope.to(found.dtype))
    theirs = torch.autograd.grad(expected, tensors, slope)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 2e-2 * other.norm()


def test_most_cases_are_supported():
    """The test above skips few: without a soft cap all from 2.11 on, the plain ones on 2.10."""
    refused = {
        kernel: {
            (shape, options)
            for shape in SHAPES
            for options in OPTIONS
            if backend.supports(case_of(name, stand_in, SHAPES[shape], OPTIONS[options]))
        }
        for kernel, (name, backend, stand_in) in KERNELS.items()
    }
    soft = {(shape, "softcap") for shape in SHAPES}
    assert refused["flash_attn"] == set()
    assert refused["torch_2.11"] == refused["torch_2.12"] == soft
    taken = {(s, o) for s in ("plain", "grouped", "latent") for o in ("causal", "both ways")}
    everything = {(shape, options) for shape in SHAPES for options in OPTIONS}
    assert refused["torch_2.10"] == everything - taken

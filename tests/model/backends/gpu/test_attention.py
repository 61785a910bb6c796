"""Calls of the GPU kernels, their rules kept by stand-ins that compute on a CPU with plain torch.

The stand-ins refuse what the real ones refuse (unequal widths, widths that are no multiple of 8,
other than 16-bit numbers, unknown keywords), and mask by what they are told, not by what is right.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import AuxOutput, BlockMask, flex_attention

from xtuner.model.backends import environment
from xtuner.model.backends.case import Case, Libraries, LibraryFunction
from xtuner.model.backends.gpu import attention as gpu
from xtuner.model.backends.gpu import flex_attention as flex_kernel
from xtuner.model.backends.gpu.flex_attention import FLEX_ATTENTION
from xtuner.model.backends.interfaces import AttentionOptions, Packing

BORDERS = [0, 3, 4, 23, 40]


def masked(q, k, v, cu_seqlens, longest, scale, window, softcap=0.0, sinks=None):
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
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, len(q), 1)], -1)
    weights = scores.softmax(-1)[..., : len(q)]
    return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)


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
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    left, right = window_size
    window = (left, 0 if causal else right)
    return masked(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, window, softcap)


def flash_attn_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    left, right = window_size
    window = (left, 0 if causal else right)
    out = masked(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, window, softcap)
    return out, None  # as before 2.8.3


def flash_attn_4(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    return_lse=False,
):
    assert -1 not in window_size
    left, right = (-1 if side is None else side for side in window_size)
    window = (left, 0 if causal else right)
    return masked(
        q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, window, softcap, learnable_sink
    )


def flex(
    query,
    key,
    value,
    score_mod=None,
    block_mask=None,
    scale=None,
    enable_gqa=False,
    return_lse=False,
    kernel_options=None,
    *,
    return_aux=None,
):
    """torch's own has no backward pass on a CPU."""
    assert isinstance(block_mask, BlockMask)
    assert enable_gqa or query.shape[1] == key.shape[1]
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.float() @ key.float().mT * scale
    q, k = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])[None]
    if score_mod is not None:
        scores = score_mod(scores, 0, 0, q, k)
    scores = scores.masked_fill(~block_mask.mask_mod(0, 0, q, k), float("-inf"))
    out = (scores.softmax(-1) @ value.float()).to(value.dtype)
    return (out, AuxOutput(lse=scores.logsumexp(-1))) if return_aux else out


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
        scores = scores.masked_fill(~seen, float("-inf"))
        if options.sinks is not None:
            sinks = options.sinks.double()[:, None, None].expand(-1, len(scores[0]), 1)
            scores = torch.cat([scores, sinks], -1)
        parts.append(scores.softmax(-1)[..., : stop - start] @ v)
    return torch.cat(parts, 1).transpose(0, 1)[None]


KERNELS = {
    "flash_attn": ("flash_attn", gpu.FLASH_ATTN_2, flash_attn),
    "flash_attn_3": ("flash_attn_3", gpu.FLASH_ATTN_3, flash_attn_3),
    "flash_attn_4": ("flash_attn_4", gpu.FLASH_ATTN_4, flash_attn_4),
    "flex": ("flex_attention", FLEX_ATTENTION, flex),
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
    "sinks": AttentionOptions(sinks=torch.linspace(-1, 2, 6)),
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
        sinks=options.sinks is not None,
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_a_backend_supports_it_computes(kernel, shape, options, monkeypatch):
    """Output and gradients are those of plain attention, for every case that is not refused."""
    name, backend, stand_in = KERNELS[kernel]
    heads, few, width, v_width = SHAPES[shape]
    options = OPTIONS[options]
    if options.sinks is not None:
        options = options._replace(sinks=options.sinks[:heads].clone().requires_grad_())
    case = case_of(name, stand_in, SHAPES[shape], options)
    if backend.supports(case) is not None:
        pytest.skip(backend.supports(case))
    monkeypatch.setattr(environment, "function", {name: stand_in}.__getitem__)
    flex_kernel._function.cache_clear()
    torch.manual_seed(0)
    tensors = [
        torch.randn(1, count, BORDERS[-1], size, dtype=torch.bfloat16, requires_grad=True)
        for count, size in ((heads, width), (few, width), (few, v_width))
    ]
    packing = Packing(torch.tensor(BORDERS, dtype=torch.int32), 19)
    # flex attention is compiled on a GPU; here it is plain torch
    found = backend.build(replace(case, device="cpu"))(*tensors, packing, options)
    expected = plain(*tensors, options)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    assert (found - expected).norm() < 1e-2 * expected.norm()
    tensors += [] if options.sinks is None else [options.sinks]
    slope = torch.randn_like(expected)
    ours = torch.autograd.grad(found, tensors, slope.to(found.dtype))
    theirs = torch.autograd.grad(expected, tensors, slope)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 2e-2 * other.norm()


@pytest.mark.parametrize("options", OPTIONS)
def test_flex_attention_of_this_torch(options, monkeypatch):
    """Its output; it has no backward pass on a CPU."""
    monkeypatch.setattr(environment, "function", {"flex_attention": flex_attention}.__getitem__)
    flex_kernel._function.cache_clear()
    shape, options = (6, 2, 20, 24), OPTIONS[options]
    case = replace(case_of("flex_attention", flex_attention, shape, options), device="cpu")
    torch.manual_seed(0)
    tensors = [
        torch.randn(1, count, BORDERS[-1], size) for count, size in ((6, 20), (2, 20), (2, 24))
    ]
    packing = Packing(torch.tensor(BORDERS, dtype=torch.int32), 19)
    found = FLEX_ATTENTION.build(case)(*tensors, packing, options)
    expected = plain(*tensors, options)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_most_cases_are_supported():
    """The test above skips few: all without soft cap or sinks from 2.11 on, plain ones on 2.10."""
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
    sinks = {(shape, "sinks") for shape in SHAPES}
    assert refused["flash_attn"] == refused["flash_attn_3"] == sinks
    assert refused["flash_attn_4"] == refused["flex"] == set()
    assert refused["torch_2.11"] == refused["torch_2.12"] == soft | sinks
    taken = {(s, o) for s in ("plain", "grouped", "latent") for o in ("causal", "both ways")}
    everything = {(shape, options) for shape in SHAPES for options in OPTIONS}
    assert refused["torch_2.10"] == everything - taken

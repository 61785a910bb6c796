"""Attention over packed rows equals plain attention sample by sample, forward and backward."""

import inspect
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from xtuner.model.backends import environment
from xtuner.model.backends.case import Case, Libraries, LibraryFunction
from xtuner.model.backends.cpu import attention as cpu_attention
from xtuner.model.backends.cpu.kernels import Kernel
from xtuner.model.modules import attention as attention_module
from xtuner.model.modules.attention import attention


def row(heads, few, tokens, width=16, dtype=torch.float32):
    """Queries, keys and values as a transformers layer makes them: tokens before heads."""
    torch.manual_seed(0)
    return [
        torch.randn(1, tokens, count, width, dtype=dtype).transpose(1, 2).requires_grad_()
        for count in (heads, few, few)
    ]


def plain(query, key, value, cu_seqlens):
    """(1, S, H, D) in float64, sample by sample."""
    parts = [
        scaled_dot_product_attention(
            *(t[:, :, a:b].double() for t in (query, key, value)), is_causal=True, enable_gqa=True
        )
        for a, b in itertools.pairwise(cu_seqlens)
        if b > a
    ]
    return torch.cat(parts, 2).transpose(1, 2)


def compare(tensors, cu_seqlens, bound):
    """Output and gradients with those of plain attention in float64."""
    found, _ = attention(nn.Module(), *tensors, None, cu_seq_lens_q=torch.tensor(cu_seqlens))
    expected = plain(*tensors, cu_seqlens)
    slope = torch.randn_like(expected)
    assert (found - expected).norm() < bound * expected.norm()
    ours = torch.autograd.grad(found, tensors, slope.to(found.dtype))
    theirs = torch.autograd.grad(expected, tensors, slope)
    for one, other in zip(ours, theirs, strict=True):
        # where a token sees itself alone the gradients of query and key are 0, up to rounding
        assert (one - other).norm() < bound * (other.norm() + 0.2 * slope.norm())


@pytest.fixture(params=[False, True], ids=["plain", "compiled"])
def compiled(request, monkeypatch):
    """Both backward passes of a CPU."""
    monkeypatch.setattr(Kernel, "compiled", request.param)
    yield request.param
    assert Kernel.compiled == request.param  # compiling did not fail


@pytest.mark.parametrize("cu_seqlens", [[0, 1], [0, 7, 7, 8, 61], [0, 37, 400, 431, 560, 1400]])
@pytest.mark.parametrize("heads, few", [(4, 4), (6, 2)])
@pytest.mark.parametrize("autocast", [True, False], ids=["bf16", "float32"])
def test_packed_rows_equal_plain_attention_on_each_sample(
    cu_seqlens, heads, few, autocast, compiled
):
    tensors = row(heads, few, cu_seqlens[-1])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        compare(tensors, cu_seqlens, 1e-2 if autocast else 1e-5)


def test_the_bound_is_one_that_a_broken_path_passes_not(monkeypatch, compiled):
    """An error of 5 % in the scale of the backward pass."""
    true = cpu_attention._Row.__init__
    monkeypatch.setattr(
        cpu_attention._Row, "__init__", lambda row, *args: true(row, *args[:-1], args[-1] * 1.05)
    )
    tensors = row(4, 4, 61)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(AssertionError):
        compare(tensors, [0, 7, 8, 61], 1e-2)


def test_scores_that_would_overflow_are_masked(compiled):
    """What a token must not see may have a score by far larger than all that it sees."""
    tensors = row(2, 2, 61)
    with torch.no_grad():
        tensors[1][:, :, -1] = 40 * tensors[1][:, :, -1]
        tensors[0].mul_(10)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attention(nn.Module(), *tensors, None, cu_seq_lens_q=torch.tensor([0, 61]))
        grads = torch.autograd.grad(found.float().sum(), tensors)
    assert all(grad.isfinite().all() for grad in grads)


def test_which_backward_is_taken(monkeypatch):
    """Products up to a length where kernels are compiled, otherwise torch's; none in float32."""
    taken = []
    for name in ("backward_by_torch", "backward_by_matmul"):
        monkeypatch.setattr(
            cpu_attention._Row, name, lambda row, part, name=name: taken.append((name, part))
        )
    cu_seqlens = torch.tensor([0, 30, 830, 833])
    short, long, last = slice(0, 30), slice(30, 830), slice(830, 833)
    for is_compiled, dtype, expected in (
        (False, torch.bfloat16, [("backward_by_torch", part) for part in (short, long, last)]),
        (
            True,
            torch.bfloat16,
            [("backward_by_matmul", [short, last]), ("backward_by_torch", long)],
        ),
        (True, torch.float32, []),
    ):
        monkeypatch.setattr(Kernel, "compiled", is_compiled)
        tensors = row(2, 2, 833, dtype=dtype)
        found, _ = attention(nn.Module(), *tensors, None, cu_seq_lens_q=cu_seqlens)
        found.sum().backward()
        assert taken == expected
        taken.clear()


def test_batches_are_bounded(monkeypatch):
    """However many samples are alike."""
    monkeypatch.setattr(Kernel, "compiled", True)
    monkeypatch.setattr(cpu_attention, "SCORES", 2 * 2 * 64**2)  # two samples with two heads
    sizes, true = [], cpu_attention._Row._batch
    monkeypatch.setattr(
        cpu_attention._Row,
        "_batch",
        lambda row, parts, *rest: sizes.append(len(parts)) or true(row, parts, *rest),
    )
    cu_seqlens = [0, 20, 50, 60, 123, 130]
    with torch.autocast("cpu", torch.bfloat16):
        compare(row(2, 2, 130), cu_seqlens, 1e-2)
    assert sizes == [2, 2, 1]


def test_shared_keys_are_kept_once():
    """Not once for each head of the queries."""
    kept = []
    query, key, value = row(6, 2, 61, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        attention(nn.Module(), query, key, value, None, cu_seq_lens_q=torch.tensor([0, 20, 61]))
    assert sum(kept) == 2 * query.numel() + 2 * key.numel() + 6 * 61  # output, log-sum-exp


def test_rows_of_one_length_without_padding():
    tensors = [t.detach().repeat(3, 1, 1, 1).requires_grad_() for t in row(4, 2, 40)]
    tensors[0].data[1].mul_(2)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attention(nn.Module(), *tensors, None)
    for each in range(3):
        expected = plain(*(t[each : each + 1] for t in tensors), [0, 40])
        assert (found[each] - expected[0]).norm() < 1e-2 * expected.norm()


def test_padding_sees_nothing_and_a_row_of_padding_is_zero():
    query, key, value = (t.repeat(3, 1, 1, 1).detach() for t in row(2, 2, 12))
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = 0
    mask[1] = 0
    found, _ = attention(nn.Module(), query, key, value, mask)
    assert not found[1].any()
    expected = plain(query[:1, :, 5:], key[:1, :, 5:], value[:1, :, 5:], [0, 7])
    torch.testing.assert_close(found[:1, 5:].double(), expected, rtol=1e-5, atol=1e-6)


def clear_choices():
    for choice in ("packed_kernel", "_packed_choice", "padded_kernel", "dense_kernel"):
        getattr(attention_module, choice).cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Tensors of a CPU pass for those of an H100 with flash-attn, which is plain torch here."""
    calls = []

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
        calls.append((q.dtype, int(max_seqlen_q)))
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        parts = [
            scaled_dot_product_attention(
                *(t[a:b].transpose(0, 1)[None] for t in (q, k, v)),
                is_causal=causal,
                scale=softmax_scale,
                enable_gqa=True,
            )
            for a, b in itertools.pairwise(cu_seqlens_q.tolist())
            if b > a
        ]
        return torch.cat(parts, 2)[0].transpose(0, 1)

    libraries = Libraries(LibraryFunction("", frozenset(inspect.signature(flash_attn).parameters)))
    true = attention_module.Facts.case

    def case(facts):
        found: Case = true(facts)
        return replace(found, device="cuda", capability=(9, 0), libraries=libraries)

    monkeypatch.setattr(environment, "function", {"flash_attn": flash_attn}.__getitem__)
    monkeypatch.setattr(attention_module.Facts, "case", case)
    monkeypatch.setattr(attention_module, "try_packed_kernel", lambda *_, **__: None)
    clear_choices()
    yield calls
    clear_choices()


@pytest.mark.parametrize("heads, few", [(4, 4), (6, 2)])
def test_packed_rows_on_a_gpu_are_one_call_that_sees_no_other_sample_and_no_future(heads, few, gpu):
    cu_seqlens = [0, 7, 8, 61]
    compare(row(heads, few, 61, dtype=torch.bfloat16), cu_seqlens, 1e-2)
    assert gpu == [(torch.bfloat16, 53)]


def test_packed_rows_in_float32_are_none_for_the_kernels_of_a_gpu(gpu):
    compare(row(4, 2, 61), [0, 7, 8, 61], 1e-5)
    assert gpu == []


def test_rows_with_padding_at_their_end_are_one_call_on_a_gpu(gpu, monkeypatch):
    calls, dense = [], attention_module.attend_dense
    monkeypatch.setattr(
        attention_module, "attend_dense", lambda *args: calls.append(1) or dense(*args)
    )
    query, key, value = (t.repeat(3, 1, 1, 1).detach() for t in row(2, 2, 12))
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, 9:] = 0
    mask[1, 1:] = 0
    found, _ = attention(nn.Module(), query, key, value, mask)
    assert len(calls) == 1
    for each, length in enumerate((9, 1, 12)):
        tokens = [t[each : each + 1, :, :length] for t in (query, key, value)]
        expected = plain(*tokens, [0, length])
        torch.testing.assert_close(
            found[each : each + 1, :length].double(), expected, rtol=1e-5, atol=1e-6
        )
    mask[0] = mask[0].flip(0)  # padding before the tokens is seen without a mask
    found, _ = attention(nn.Module(), query, key, value, mask)
    assert len(calls) == 1 + 3
    expected = plain(*(t[:1, :, 3:] for t in (query, key, value)), [0, 9])
    torch.testing.assert_close(found[:1, 3:].double(), expected, rtol=1e-5, atol=1e-6)


def test_packed_samples_of_a_bidirectional_layer_see_what_follows():
    layer = nn.Module()
    layer.is_causal = False
    query, key, value = row(2, 2, 9)
    found, _ = attention(layer, query, key, value, None, cu_seq_lens_q=torch.tensor([0, 4, 9]))
    for a, b in ((0, 4), (4, 9)):
        expected = scaled_dot_product_attention(*(t[:, :, a:b] for t in (query, key, value)))
        torch.testing.assert_close(found[:, a:b], expected.transpose(1, 2))
    same, _ = attention(
        nn.Module(),
        query,
        key,
        value,
        None,
        is_causal=False,
        cu_seq_lens_q=torch.tensor([0, 4, 9]),
    )
    assert torch.equal(same, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [True, False])
def test_the_output_is_contiguous(dtype, packed):
    """Some models take a view of it (AFMoE, JetMoE)."""
    query, key, value = row(4, 2, 12, dtype=dtype)
    cu_seqlens = torch.tensor([0, 5, 12]) if packed else None
    for softcap in (None, 1.0):
        found, _ = attention(
            nn.Module(), query, key, value, None, cu_seq_lens_q=cu_seqlens, softcap=softcap
        )
        assert found.is_contiguous()

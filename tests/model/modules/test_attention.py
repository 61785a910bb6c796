"""Attention over packed rows equals plain attention sample by sample, forward and backward."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from xtuner.model.modules import short_attention
from xtuner.model.modules.attention import attention


def row(heads, few, tokens, width=16, dtype=torch.float32):
    """Queries, keys and values as a transformers layer makes them: tokens before heads."""
    torch.manual_seed(0)
    return [
        torch.randn(1, tokens, count, width, dtype=dtype).transpose(1, 2).requires_grad_()
        for count in (heads, few, few)
    ]


def plain(query, key, value, borders):
    """(1, S, H, D) in float64, sample by sample."""
    parts = [
        scaled_dot_product_attention(
            *(t[:, :, a:b].double() for t in (query, key, value)), is_causal=True, enable_gqa=True
        )
        for a, b in itertools.pairwise(borders)
        if b > a
    ]
    return torch.cat(parts, 2).transpose(1, 2)


@pytest.mark.parametrize("borders", [[0, 1], [0, 7, 7, 8, 61], [0, 37, 400, 431]])
@pytest.mark.parametrize("heads, few", [(4, 4), (6, 2)])
@pytest.mark.parametrize("autocast", [True, False], ids=["bf16", "float32"])
def test_packed_rows_equal_plain_attention_on_each_sample(borders, heads, few, autocast):
    tensors = row(heads, few, borders[-1])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = attention(nn.Module(), *tensors, None, cu_seq_lens_q=torch.tensor(borders))
    expected = plain(*tensors, borders)
    slope = torch.randn_like(expected)
    bound = 1e-2 if autocast else 1e-5
    assert (found - expected).norm() < bound * expected.norm()
    ours = torch.autograd.grad(found, tensors, slope.to(found.dtype))
    theirs = torch.autograd.grad(expected, tensors, slope)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < bound * other.norm() + 1e-6


def test_only_short_samples_in_bf16_have_their_own_backward(monkeypatch):
    lengths = []
    monkeypatch.setattr(
        short_attention,
        "short_attention",
        lambda query, *_: lengths.append(query.shape[2]) or query,
    )
    borders = torch.tensor([0, 30, 430, 433])
    attention(nn.Module(), *row(2, 2, 433, dtype=torch.bfloat16), None, cu_seq_lens_q=borders)
    assert lengths == [30, 3]
    attention(nn.Module(), *row(2, 2, 433), None, cu_seq_lens_q=borders)
    assert lengths == [30, 3]


def test_padding_sees_nothing_and_a_row_of_padding_is_zero():
    query, key, value = (t.repeat(3, 1, 1, 1).detach() for t in row(2, 2, 12))
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = 0
    mask[1] = 0
    found, _ = attention(nn.Module(), query, key, value, mask)
    assert not found[1].any()
    expected = plain(query[:1, :, 5:], key[:1, :, 5:], value[:1, :, 5:], [0, 7])
    torch.testing.assert_close(found[:1, 5:].double(), expected, rtol=1e-5, atol=1e-6)

"""Attention on any device equals plain attention, whatever is done to the scores."""

import pytest
import torch

from xtuner.model.backends import sdpa
from xtuner.model.backends.case import Case
from xtuner.model.backends.interfaces import AttentionOptions, OncePerTensor


def plain(query, key, value, options):
    """(B, S, H, V), every score formed, in float64."""
    q, k, v = (t.double() for t in (query, key, value))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scale = q.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    scores = q @ k.mT * scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    new, total = scores.shape[-2:]
    distance = torch.arange(total)[None, :] - torch.arange(total - new, total)[:, None]
    if options.causal:
        scores = scores.masked_fill(distance > 0, float("-inf"))
    if options.sliding_window:
        scores = scores.masked_fill(distance.abs() >= options.sliding_window, float("-inf"))
    weights = scores.exp()
    sums = weights.sum(-1, keepdim=True)
    if options.sinks is not None:
        sums = sums + options.sinks.double().exp().view(1, -1, 1, 1)
    return (weights / sums @ v).transpose(1, 2)


OPTIONS = {
    "causal": AttentionOptions(),
    "scaled": AttentionOptions(scaling=0.7),
    "both ways": AttentionOptions(causal=False),
    "window": AttentionOptions(sliding_window=5),
    "window both ways": AttentionOptions(causal=False, sliding_window=5),
    "softcap": AttentionOptions(softcap=0.5),
    "sinks": AttentionOptions(),
    "all": AttentionOptions(scaling=0.7, softcap=0.5, sliding_window=5),
}


@pytest.mark.parametrize("shape", [(4, 4, 13, 13), (6, 2, 13, 13), (4, 2, 5, 13), (4, 2, 1, 13)])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("block", [3, 1024])
def test_blocks_equal_plain_attention(shape, name, block, monkeypatch):
    monkeypatch.setattr(sdpa, "BLOCK", block)
    heads, few, new, total = shape
    options = OPTIONS[name]
    torch.manual_seed(0)
    tensors = [
        torch.randn(2, count, size, width, requires_grad=True)
        for count, size, width in ((heads, new, 16), (few, total, 16), (few, total, 8))
    ]
    if name in ("sinks", "all"):
        tensors.append(torch.randn(heads, requires_grad=True))
        options = options._replace(sinks=tensors[3])
    found = sdpa.attend_in_blocks(*tensors[:3], options)
    expected = plain(*tensors[:3], options)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    slope = torch.randn_like(expected)
    ours = torch.autograd.grad(found, tensors, slope.float())
    theirs = torch.autograd.grad(expected, tensors, slope)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["causal", "scaled", "both ways"])
@pytest.mark.parametrize("new", [13, 1])
def test_sdpa_equals_plain_attention(name, new):
    options = OPTIONS[name]
    case = Case(causal=options.causal, cached=new != 13, single_query=new == 1)
    assert sdpa.SDPA.supports(case) is None
    query, key, value = (
        torch.randn(2, 6, new, 16),
        torch.randn(2, 2, 13, 16),
        torch.randn(2, 2, 13, 8),
    )
    found = sdpa.SDPA.build(case)(query, key, value, options)
    assert found.is_contiguous()
    expected = plain(query, key, value, options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_dropout_drops_weights_and_keeps_their_mean():
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, 8, 40, 16),
        torch.randn(1, 8, 40, 16),
        torch.ones(1, 8, 40, 16),
    )
    for options in (AttentionOptions(dropout=0.5), AttentionOptions(dropout=0.5, softcap=9.0)):
        found = sdpa.attend_in_blocks(query, key, value, options)
        assert found.std() > 0.05  # without dropout all are 1
        assert abs(found.mean() - 1) < 0.1


def test_a_function_of_a_tensor_is_computed_once_until_it_changes():
    calls = []
    total = OncePerTensor(lambda t: calls.append(1) or float(t.sum()))
    one, other = torch.ones(3), torch.ones(4)
    assert [total(one), total(one), total(other), total(other)] == [3, 3, 4, 4]
    assert len(calls) == 2
    other += 1
    assert total(other) == 8
    with torch.inference_mode():
        assert total(torch.ones(2)) == 2

"""Attention of rows that ranks share equals attention of whole rows, forward and backward."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.parallel.workers import together
from xtuner.model.modules.attention import attention
from xtuner.parallel.sequence import (
    get_sequence_parallel_group,
    init_sequence_parallel,
    post_process_for_sequence_parallel_attn,
    pre_process_for_sequence_parallel_attn,
    sequence_parallel_wrapper,
)
from xtuner.parallel.sequence.shard import SequenceShard

HEADS = [(4, 2), (6, 3), (3, 1), (6, 2), (1, 1)]
KINDS = ["plain", "packed", "padded", "window", "cap", "bidirectional", "wide", "sinks"]
LENGTH = 13  # 2 and 4 do not divide it


def case(heads, kind):
    """Query, key, value, settings of the call, and which tokens are real."""
    generator = torch.Generator().manual_seed(0)
    rows = 1 if kind == "packed" else 2
    width = 6 if kind == "wide" else 8
    q, k, v = (
        torch.randn(rows, count, LENGTH, size, generator=generator, requires_grad=True)
        for count, size in zip((heads[0], heads[1], heads[1]), (width, width, 8), strict=True)
    )
    settings = {
        "window": {"sliding_window": 4},
        "cap": {"softcap": 2.0},
        "sinks": {"s_aux": torch.linspace(-1, 2, heads[0]).requires_grad_()},
    }.get(kind, {})
    inputs = {"input_ids": torch.zeros(rows, LENGTH, dtype=torch.long)}
    if kind == "packed":
        cu_seqlens = torch.tensor([0, 5, 6, LENGTH], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
        inputs |= {"max_length_q": 7, "max_length_k": 7}
    if kind == "padded":
        inputs["attention_mask"] = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [6]])).long()
    module = SimpleNamespace(is_causal=kind != "bidirectional")
    return (q, k, v), settings, inputs, module


def whole(heads, kind):
    tensors, settings, inputs, module = case(heads, kind)
    mask = inputs.pop("attention_mask", None)
    out, _ = attention(module, *tensors, mask, **settings, **inputs)
    (out.square().sum() * 0.5).backward()
    return out.detach(), [tensor.grad for tensor in (*tensors, *of_heads(settings))]


def of_heads(settings):
    """The settings that are trained."""
    return [value for name, value in settings.items() if name == "s_aux"]


def shared(heads, kind):
    """The same, each rank with its shard; gathered."""
    tensors, settings, inputs, module = case(heads, kind)
    shard = SequenceShard(LENGTH)
    named = shard.inputs(inputs)
    cut = [shard.shard(tensor.transpose(1, 2)).transpose(1, 2) for tensor in tensors]
    out, _ = attention(module, *cut, None, **settings, **named)
    real = shard.shard(torch.ones(len(out), LENGTH, 1, 1))  # a loss looks at no padding
    (out * real).square().sum().mul(0.5).backward()
    grads = [tensor.grad for tensor in (*tensors, *of_heads(settings))]
    for grad in grads:
        dist.all_reduce(grad)
    parts = [torch.empty_like(out) for _ in range(shard.size)]
    dist.all_gather(parts, out.detach().contiguous())
    return torch.cat(parts, 1)[:, :LENGTH], grads


def all_cases(size):
    init_sequence_parallel(size)
    found = {}
    for number, (heads, kind) in enumerate(itertools.product(HEADS, KINDS)):
        found[number] = shared(heads, kind)
    found["wrapped"] = wrapped()
    return found


def plain(q, k, v):
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def wrapped():
    """The published functions around an attention of one's own."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 8, n, 4, generator=generator) for n in (6, 3, 3))
    shard = SequenceShard(8)
    out = sequence_parallel_wrapper(plain)(*(shard.shard(tensor) for tensor in (q, k, v)))
    three = pre_process_for_sequence_parallel_attn(*(shard.shard(t) for t in (q, k, v)))
    same = post_process_for_sequence_parallel_attn(plain(*three))
    alone = sequence_parallel_wrapper(plain)(q, k, v, training=False)
    assert get_sequence_parallel_group() is not None
    return [out - shard.shard(alone), same - shard.shard(alone)]


@pytest.mark.parametrize("size", [2, 4])
def test_shared_rows_equal_whole_rows(size):
    by_rank = together(all_cases, size, size)
    for number, (heads, kind) in enumerate(itertools.product(HEADS, KINDS)):
        out, grads = whole(heads, kind)
        for found in by_rank:
            for ours, theirs in zip(
                [found[number][0], *found[number][1]], [out, *grads], strict=True
            ):
                torch.testing.assert_close(ours, theirs, msg=f"{heads} {kind}")
    for found in by_rank:
        assert all(float(off.abs().max()) < 1e-6 for off in found["wrapped"])

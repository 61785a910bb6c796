"""Which heads, and what belongs to them, each rank of a group has."""

import itertools

import pytest
import torch
import torch.distributed as dist

from tests.parallel.test_shared_attention import HEADS
from xtuner.parallel.sequence.heads import of_own_heads, share_heads


def test_heads_are_dealt_out_once_with_the_keys_they_need():
    for (heads, keys), size in itertools.product([*HEADS, (12, 4), (8, 8)], [2, 3, 4, 8]):
        shares = share_heads(heads, keys, size)
        assert [head for share in shares for head in share.queries] == list(range(heads))
        for share in shares:
            wanted = [head * keys // heads for head in share.queries]
            assert [share.keys[place] for place in share.key_of_query] == wanted
            assert len(set(wanted)) == len(share.keys)
    assert not share_heads(6, 2, 4)[1].regular or share_heads(3, 1, 2)[1].regular


@pytest.mark.parametrize("size", [2, 3, 8])
def test_values_of_heads_are_distributed_as_the_heads(size, monkeypatch):
    sinks = torch.arange(6.0).requires_grad_()
    monkeypatch.setattr(dist, "get_world_size", lambda group: size)
    parts = []
    for rank in range(size):
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        own = of_own_heads(sinks, 3, None)
        assert own.tolist() == [float(head) for head in share_heads(6, 3, size)[rank].queries]
        (grad,) = torch.autograd.grad(own.sum(), sinks)  # on each rank, of all heads
        assert grad.sum() == len(own) and grad.shape == sinks.shape
        parts.append(own)
    assert torch.equal(torch.cat(parts), sinks)

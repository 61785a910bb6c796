"""Differentiable collectives: values and gradients equal those of one process."""

import pytest
import torch
import torch.distributed as dist

from tests.parallel.workers import together
from xtuner.parallel.sequence import collectives

RANKS = 2


def whole(rank=0):
    """(B, S, H) of a rank, the same numbers wherever it is computed."""
    return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(rank))


def work():
    """What this rank gets, and the gradient of its input when all ranks' losses are summed."""
    rank, group = dist.get_rank(), dist.group.WORLD
    found = {}

    def record(name, function, own):
        own.requires_grad_()
        output = function(own)
        weight = torch.arange(1.0, output.numel() + 1).view_as(output) * (rank + 1)
        (output * weight).sum().backward()
        found[name], found[f"{name}_grad"] = output.detach(), own.grad

    record("reduced", lambda own: collectives.all_reduce_sum(own, group), whole(rank))
    record("exchanged", lambda own: collectives.all_to_all(own, group), whole(rank))
    sends = [[3, 1], [2, 0]]
    receives = [[3, 2], [1, 0]]
    record(
        "uneven",
        lambda own: collectives.all_to_all_single(own, sends[rank], receives[rank], group),
        whole(rank).flatten()[: sum(sends[rank])].clone(),
    )
    for scale in (None, "up", "down"):
        record(
            f"split_{scale}",
            lambda own, scale=scale: collectives.split_forward_gather_backward(
                own, 1, group, scale
            ),
            whole(),
        )
        record(
            f"gathered_{scale}",
            lambda own, scale=scale: collectives.gather_forward_split_backward(
                own, 1, group, scale
            ),
            whole().chunk(RANKS, 1)[rank].clone(),
        )
    return found


@pytest.fixture(scope="module")
def found():
    return together(work, RANKS)


def weights(shape, rank):
    return torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape) * (rank + 1)


def test_a_sum_has_the_gradients_of_all_ranks(found):
    for own in found:
        torch.testing.assert_close(own["reduced"], whole(0) + whole(1))
        torch.testing.assert_close(
            own["reduced_grad"], weights((2, 4, 6), 0) + weights((2, 4, 6), 1)
        )


def test_an_exchange_splits_heads_and_gathers_tokens(found):
    for rank, own in enumerate(found):
        expected = torch.cat([whole(r).chunk(RANKS, 2)[rank] for r in range(RANKS)], 1)
        torch.testing.assert_close(own["exchanged"], expected)
        sent = [
            weights((2, 8, 3), r).chunk(RANKS, 1)[rank] for r in range(RANKS)
        ]  # what rank r weighs of this rank's tokens
        torch.testing.assert_close(own["exchanged_grad"], torch.cat(sent, 2))


def test_uneven_parts_come_from_where_they_were_sent(found):
    first, second = (whole(rank).flatten() for rank in range(RANKS))
    torch.testing.assert_close(found[0]["uneven"], torch.cat([first[:3], second[:2]]))
    torch.testing.assert_close(found[1]["uneven"], first[3:4])
    assert found[0]["uneven_grad"].tolist() == [1, 2, 3, 2]  # the last is weighed by rank 1
    assert found[1]["uneven_grad"].tolist() == [4, 5]


@pytest.mark.parametrize(("scale", "factor"), [(None, 1), ("up", RANKS), ("down", 1 / RANKS)])
def test_a_split_gathers_gradients_and_a_gather_splits_them(found, scale, factor):
    for rank, own in enumerate(found):
        torch.testing.assert_close(own[f"split_{scale}"], whole().chunk(RANKS, 1)[rank])
        gathered = torch.cat([weights((2, 2, 6), r) for r in range(RANKS)], 1) * factor
        torch.testing.assert_close(own[f"split_{scale}_grad"], gathered)
        torch.testing.assert_close(own[f"gathered_{scale}"], whole())
        shard = weights((2, 4, 6), rank).chunk(RANKS, 1)[rank] * factor
        torch.testing.assert_close(own[f"gathered_{scale}_grad"], shard)


def test_without_a_group_tensors_stay_as_they_are():
    own = whole()
    assert collectives.all_to_all(own, None) is own
    assert collectives.split_for_sequence_parallel(own, 1, None) is own
    assert collectives.gather_for_sequence_parallel(own, 1, None) is own


def test_another_scale_is_named():
    with pytest.raises(ValueError, match="not 'sideways'"):
        collectives.split_forward_gather_backward(whole(), 1, None, "sideways")

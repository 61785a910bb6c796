"""Groups of ranks read the same samples; groups together read all of them."""

import pytest
from mmengine.dataset import DefaultSampler

from xtuner.parallel import sequence
from xtuner.parallel.sequence import SequenceParallelSampler, init_sequence_parallel


def test_alone_it_is_mmengines_sampler():
    ours = SequenceParallelSampler(range(10), seed=5)
    theirs = DefaultSampler(range(10), shuffle=True, seed=5)
    assert list(ours) == list(theirs)
    ours.set_epoch(2), theirs.set_epoch(2)
    assert list(ours) == list(theirs)


def test_groups_share_and_cover(monkeypatch):
    orders = []
    for rank in range(4):
        monkeypatch.setattr(sequence, "get_dist_info", lambda rank=rank: (rank, 4))
        monkeypatch.setattr(sequence, "_size", 2)
        sampler = SequenceParallelSampler(range(7), seed=0)
        orders.append(list(sampler))
        assert len(sampler) == len(orders[-1]) == 4
    assert orders[0] == orders[1]
    assert orders[2] == orders[3]
    assert set(orders[0]) | set(orders[2]) == set(range(7))


def test_a_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="does not divide the number of processes, 1"):
        init_sequence_parallel(2)

"""Groups of ranks that share rows, and the samplers that give them the same rows."""

import pytest

from xtuner.dataset.samplers import InternRepoSampler, LengthGroupedSampler
from xtuner.parallel.sequence import SequenceParallelSampler, groups, init_sequence_parallel


class Lengths:
    """What LengthGroupedSampler looks at."""

    length = [5, 9, 2, 7, 3, 8, 4]

    def __len__(self):
        return len(self.length)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SequenceParallelSampler(range(7), seed=0),
        lambda: InternRepoSampler(range(7)),
        lambda: LengthGroupedSampler(Lengths(), 1, seed=0),
    ],
)
def test_groups_share_and_cover(monkeypatch, make):
    orders = []
    monkeypatch.setattr(groups, "_layout", groups._Layout(size=2))
    for rank in range(4):
        monkeypatch.setattr(groups, "get_dist_info", lambda rank=rank: (rank, 4))
        sampler = make()
        orders.append(list(sampler))
        assert len(sampler) == len(orders[-1]) == 4
    assert orders[0] == orders[1]
    assert orders[2] == orders[3]
    assert set(orders[0]) | set(orders[2]) == set(range(7))


def test_a_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="does not divide the number of processes, 1"):
        init_sequence_parallel(2)

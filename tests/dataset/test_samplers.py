"""LengthGroupedSampler: all rows, like lengths together, modalities apart, any world size."""

import numpy as np
import pytest
from datasets import Dataset
from mmengine.runner import Runner

from xtuner.dataset.samplers import InternRepoSampler, LengthGroupedSampler


def test_every_row_once_and_like_lengths_together():
    lengths = [(7 * i) % 50 + 1 for i in range(64)]
    data = Dataset.from_dict({"length": lengths})  # a Column since datasets 4
    order = list(LengthGroupedSampler(data, per_device_batch_size=4, mega_batch_mult=4))
    assert sorted(order) == list(range(64))
    spread = [
        max(lengths[i] for i in order[a : a + 4]) - min(lengths[i] for i in order[a : a + 4])
        for a in range(0, 64, 4)
    ]
    assert sum(spread) / len(spread) < 20  # rows drawn at random would differ by about 30


def test_a_batch_has_one_modality():
    class Mixed:
        modality_length = [5, -5] * 20

        def __len__(self):
            return 40

    order = list(LengthGroupedSampler(Mixed(), 4, length_property="modality_length"))
    assert sorted(order) == list(range(40))
    for start in range(0, 40, 4):
        assert len({row % 2 for row in order[start : start + 4]}) == 1


def test_epochs_differ_and_seeds_repeat():
    data = Dataset.from_dict({"length": list(range(1, 33))})
    sampler = LengthGroupedSampler(data, 4, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthGroupedSampler(data, 4, seed=3)) == first


def test_intern_repo_order_has_its_own_seed():
    data = list(range(16))
    assert list(InternRepoSampler(data)) == list(InternRepoSampler(data, seed=1024))
    assert list(InternRepoSampler(data)) != list(InternRepoSampler(data, seed=1))


def order_in_a_run(sampler, seed):
    """The order of a loader that is built as a run builds it, with the run's seed."""
    data = Dataset.from_dict({"length": list(range(1, 33))})
    settings = dict(dataset=data, batch_size=4, sampler=sampler)
    return list(Runner.build_dataloader(settings, seed=seed).sampler)


@pytest.mark.parametrize("seed", [0, 7])
def test_the_seed_of_a_run_reaches_the_order(seed):
    sampler = dict(type=LengthGroupedSampler, per_device_batch_size=4)
    assert order_in_a_run(sampler, seed) == order_in_a_run(sampler, seed)
    assert order_in_a_run(sampler, seed) != order_in_a_run(sampler, 3)
    assert order_in_a_run({**sampler, "seed": 3}, seed) == order_in_a_run(sampler, 3)


def test_without_a_seed_one_is_drawn_from_the_state_that_a_run_seeds():
    data = Dataset.from_dict({"length": list(range(1, 33))})
    orders = []
    for state in (1, 1, 2):
        np.random.seed(state)
        orders.append(list(LengthGroupedSampler(data, 4)))
    assert orders[0] == orders[1] != orders[2]

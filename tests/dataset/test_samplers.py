"""LengthGroupedSampler: all rows, like lengths together, modalities apart, any world size."""

from datasets import Dataset

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

"""Going on in the middle of an epoch: the same batches, the ones before not loaded."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from xtuner.engine.data_position import from_batch


class Rows(Dataset):
    def __init__(self) -> None:
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return 23

    def __getitem__(self, row: int) -> int:
        self.loaded.append(row)
        return row


class Epochs(RandomSampler):
    """Shuffled by its epoch, as mmengine's DefaultSampler."""

    epoch = 0

    def __iter__(self):
        order = torch.randperm(23, generator=torch.Generator().manual_seed(self.epoch))
        return iter(order.tolist())


def loader(workers: int = 0) -> DataLoader:
    rows = Rows()
    return DataLoader(rows, batch_size=3, sampler=Epochs(rows), num_workers=workers)


def batches(iterator) -> list[list[int]]:
    return [batch.tolist() for batch in iterator]


@pytest.mark.parametrize("skip", [0, 1, 5, 7, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_rest_of_the_epoch_is_the_same(skip, workers):
    whole = batches(loader(workers))
    assert batches(from_batch(loader(workers), skip)) == whole[skip:]


def test_rows_before_are_not_loaded_and_the_next_epoch_is_whole():
    cut = loader()
    assert len(batches(from_batch(cut, 5))) == 3
    assert len(cut.dataset.loaded) == 23 - 15
    cut.sampler.epoch = 1
    again = batches(from_batch(cut, 0))
    assert len(again) == 8 and again != batches(loader())


def test_an_epoch_is_as_long_as_ever_while_its_rest_is_read():
    cut = loader()
    rest = from_batch(cut, 5)
    next(rest)
    assert len(cut) == 8


def test_an_epoch_left_early_does_not_shorten_the_next():
    cut = loader()
    list(itertools.islice(from_batch(cut, 5), 1))
    assert len(batches(from_batch(cut, 0))) == 8


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    batches(from_batch(loader(), 0))
    batches(from_batch(loader(), 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_sampler_of_the_users_own_is_followed():
    rows = Rows()
    own = [[0, 1], [2, 3], [4]]
    assert batches(from_batch(DataLoader(rows, batch_sampler=own), 2)) == [[4]]

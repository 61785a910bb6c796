"""Every rank runs the model equally often; results are those of one rank, in order."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from xtuner.engine import sharded_batches
from xtuner.engine._strategy.strategy import Strategy
from xtuner.engine.sharded_batches import ShardedBatches


def on_ranks(monkeypatch, rows: int, ranks: int, batch_size: int) -> list[ShardedBatches]:
    made = []
    monkeypatch.setattr(sharded_batches, "get_data_parallel_world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(sharded_batches, "get_data_parallel_rank", lambda rank=rank: rank)
        like = DataLoader(list(range(rows)), batch_size=batch_size, collate_fn=list)
        made.append(ShardedBatches(list(range(rows)), like))
    return made


@pytest.mark.parametrize(
    ("rows", "ranks", "size"), [(11, 2, 1), (11, 3, 2), (2, 4, 1), (8, 2, 4), (1, 3, 5)]
)
def test_each_row_counts_once_and_ranks_have_as_many_batches(monkeypatch, rows, ranks, size):
    shards = on_ranks(monkeypatch, rows, ranks, size)
    assert len({len(list(shard)) for shard in shards}) == 1
    counted = [row for shard in shards for batch, counts in shard if counts for row in batch]
    assert sorted(counted) == list(range(rows))
    results = [[sum(batch) for batch, counts in shard if counts] for shard in shards]
    monkeypatch.setattr(sharded_batches, "all_gather_object", lambda own: results)
    expected = [sum(range(rows)[start : start + size]) for start in range(0, rows, size)]
    assert all(shard.gather([]) == expected for shard in shards)


def test_a_pass_has_no_gradients_and_no_dropout_and_drops_what_does_not_count():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9)).train()
    seen = []

    def run(called, batch):
        seen.append(batch)
        assert called is model and not called.training and not torch.is_grad_enabled()
        return batch

    batches = [(1, True), (2, True), (3, False)]
    assert Strategy().map_batches(model, batches, run) == [1, 2]
    assert seen == [1, 2, 3]
    assert model.training and torch.is_grad_enabled()


def test_a_pass_that_fails_leaves_the_model_as_it_was():
    model = nn.Linear(2, 2).train()
    with pytest.raises(ZeroDivisionError):
        Strategy().map_batches(model, [(0, True)], lambda _, batch: 1 / batch)
    assert model.training

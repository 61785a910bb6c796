"""Validation: a mean over all tokens, the same on one rank and on two."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.engine.toy import ToyModel, ToyRows, collate, make_runner, metrics, weights
from tests.helpers.forked import server
from xtuner.engine.launch import free_port


def test_validation_weighs_by_tokens_and_repeats(tmp_path):
    runner = make_runner(tmp_path, validate=True, val_interval=4, max_epochs=1, lr=0.0)
    runner.train()
    lines = [line for line in metrics(tmp_path) if "val/loss" in line]
    assert [line["iter"] for line in lines] == [4, 8]
    rows = ToyRows()
    expected = float(ToyModel()(**collate(rows.rows), mode="loss")["loss"])
    for line in lines:
        assert line["val/loss"] == pytest.approx(expected, abs=1e-5)
        assert line["val/perplexity"] == pytest.approx(2.718281828**expected, rel=1e-4)


def two_ranks(rank: int, folder: str, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    runner = make_runner(
        Path(folder),
        accumulative_counts=2,
        launcher="pytorch",
        validate=True,
        val_interval=4,
        max_epochs=1,
    )
    runner.train()
    torch.save(weights(runner), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_on_the_same_rows(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    server()
    torch.multiprocessing.start_processes(
        two_ranks, (str(two), free_port()), nprocs=2, start_method="forkserver"
    )
    runner = make_runner(one, accumulative_counts=4, validate=True, val_interval=8, max_epochs=1)
    runner.train()
    for rank in range(2):
        theirs = torch.load(two / f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close(theirs, weights(runner), rtol=0, atol=1e-6)
    for name in ("loss", "val/loss"):
        ours = [line[name] for line in metrics(one) if name in line]
        assert [line[name] for line in metrics(two) if name in line] == pytest.approx(ours)

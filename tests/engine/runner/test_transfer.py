"""Batches are copied whole; to a GPU from pinned memory, on a stream of their own."""

import contextlib

import pytest
import torch

from xtuner.engine.runner import transfer
from xtuner.engine.runner.transfer import to_device

CPU = torch.device("cpu")


def nested():
    return {
        "data": {
            "input_ids": torch.arange(4),
            "cumulative_len": [torch.arange(2)],
            "max_seqlen": 4,
        },
        "data_samples": (torch.zeros(1), None),
    }


def test_nested_batches_are_copied_and_the_rest_is_kept():
    copied = to_device(nested(), torch.device("meta"))
    assert copied["data"]["input_ids"].is_meta
    assert copied["data"]["cumulative_len"][0].is_meta
    assert copied["data"]["max_seqlen"] == 4
    assert copied["data_samples"][0].is_meta
    assert copied["data_samples"][1] is None


def test_a_batch_on_its_device_is_not_copied():
    batch = nested()
    assert to_device(batch, CPU)["data"]["input_ids"] is batch["data"]["input_ids"]


@pytest.fixture
def gpu(monkeypatch):
    """Streams that note what is done on them; tensors stay on the CPU."""
    events, on = [], ["computation"]

    class Stream:
        def __init__(self, name="copies"):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def stream(chosen):
        on.append(chosen.name)
        yield
        on.pop()

    def pinned(tensor):
        events.append("pinned")
        return tensor

    computation, true = Stream("computation"), torch.Tensor.to

    def to(tensor, device, non_blocking=False):
        assert non_blocking
        events.append(f"copied on {on[-1]}")
        return true(tensor, CPU).clone()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computation)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, used: events.append(f"used on {used.name}")
    )
    transfer._copy_stream.cache_clear()
    yield events
    transfer._copy_stream.cache_clear()


def test_copies_to_a_gpu_go_beside_the_computation(gpu):
    batch = nested()
    copied = to_device(batch, torch.device("cuda"))
    assert torch.equal(copied["data"]["input_ids"], batch["data"]["input_ids"])
    assert gpu == [
        *["pinned", "copied on copies"] * 3,
        "computation waits for copies",
        *["used on computation"] * 3,
    ]

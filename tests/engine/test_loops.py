"""The loop: a step is one mean over its tokens, however it is cut up."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import LinearLR

from tests.engine.toy import ToyModel, ToyRows, collate, make_runner, metrics, weights
from tests.helpers.fake_gpu import Waits
from tests.helpers.tiny import make_model
from xtuner.engine.optim import FinetuneOptimWrapper
from xtuner.engine.runner.loops import TrainLoop, batch_on_device
from xtuner.model import SupervisedFinetune
from xtuner.utils.errors import UserError

CPU = torch.device("cpu")


def test_batch_and_accumulation_train_the_same(tmp_path):
    cut = [(4, 1), (2, 2), (1, 4)]
    results = []
    for batch_size, counts in cut:
        folder = tmp_path / f"{batch_size}x{counts}"
        runner = make_runner(folder, batch_size=batch_size, accumulative_counts=counts)
        runner.train()
        results.append(weights(runner))
    start = weights(make_runner(tmp_path / "start"))
    assert (results[0] - start).abs().max() > 1e-3  # something was learnt
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-6)


def test_the_loss_is_the_mean_over_the_tokens_of_the_step(tmp_path):
    runner = make_runner(tmp_path, accumulative_counts=8, max_epochs=1)
    model, rows = ToyModel(), ToyRows()
    batch = collate([rows[number] for number in range(8)])
    with torch.no_grad():
        expected = float(model(**batch, mode="loss")["loss"])  # one batch with all rows
    runner.train()
    (line,) = metrics(tmp_path)
    assert line["loss"] == pytest.approx(expected, abs=1e-5)
    per_row = [float(model(**collate([rows[n]]), mode="loss")["loss"]) for n in range(8)]
    assert abs(sum(per_row) / 8 - expected) > 1e-3  # a mean of means would be another number


def test_the_last_short_accumulation_is_a_step_of_its_own(tmp_path):
    runner = make_runner(tmp_path, accumulative_counts=3, max_epochs=1)  # 8 = 3 + 3 + 2
    runner.train()
    lines = metrics(tmp_path)
    assert [line["iter"] for line in lines] == [3, 6, 8]
    assert [line["step"] for line in lines] == [1, 2, 3]
    model, rows = ToyModel(), ToyRows()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for numbers in ([0, 1, 2], [3, 4, 5], [6, 7]):
        loss = model(**collate([rows[n] for n in numbers]), mode="loss")["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(runner), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("epochs", "iterations"), [(0.5, 4), (1.25, 10), (3, 24)])
def test_fractions_of_epochs(tmp_path, epochs, iterations):
    runner = make_runner(tmp_path, max_epochs=epochs)
    runner.train()
    assert runner.iter == iterations
    assert metrics(tmp_path)[-1]["epoch"] == pytest.approx(epochs)


def test_an_accumulation_goes_on_over_the_end_of_an_epoch(tmp_path):
    runner = make_runner(tmp_path, rows=3, accumulative_counts=2, max_epochs=2)
    runner.train()
    assert [line["iter"] for line in metrics(tmp_path)] == [2, 4, 6]


@pytest.mark.parametrize("counts", [1, 4])
def test_a_scaled_loss_trains_the_same(tmp_path, counts, monkeypatch):
    """As of float16 on a GPU; over several micro-batches too, whose gradients are clipped."""
    settings = dict(batch_size=4 // counts, accumulative_counts=counts, lr=0.01)
    plain = make_runner(tmp_path / "plain", **settings)
    plain.train()
    context = _scaled(FinetuneOptimWrapper.optim_context)
    monkeypatch.setattr(FinetuneOptimWrapper, "optim_context", context)
    runner = make_runner(tmp_path / "scaled", **settings)
    runner.train()
    assert runner.optim_wrapper.scaler.get_scale() == 2.0**10
    torch.testing.assert_close(weights(runner), weights(plain), rtol=1e-5, atol=1e-7)


def _scaled(context):
    """A context of the forward that gives the wrapper a loss scaler before the first one."""

    def optim_context(wrapper, model):
        if wrapper.scaler is None:
            wrapper.set_scaler(2.0**10, "cpu")
        return context(wrapper, model)

    return optim_context


@pytest.mark.parametrize("counts", [1, 4])
def test_a_step_reads_what_the_device_computed_once(tmp_path, counts, monkeypatch):
    """The loss, what is logged and the norm of the gradients together, whatever hooks do."""
    found, run_iter = [], TrainLoop.run_iter

    def counted(loop, batches):
        with Waits() as waits:
            run_iter(loop, batches)
        found.append(waits.found)

    monkeypatch.setattr(TrainLoop, "run_iter", counted)
    make_runner(tmp_path, accumulative_counts=counts, max_iters=2 * counts).train()
    assert [list(waits.values()) for waits in found] == [[1], [1]]
    assert all("loops.py" in line for waits in found for line in waits)


def batch_of(largest):
    return {"data": {"input_ids": torch.tensor([[1, largest]]), "rows": [7]}, "data_samples": None}


def test_a_token_id_that_the_model_lacks_is_named_with_its_row():
    model = SupervisedFinetune(make_model("llama"), use_activation_checkpointing=False)
    vocab_size = model.llm.config.vocab_size
    places = SimpleNamespace(model=model, device=CPU, trace=lambda batch: ["a.jsonl:8"])
    kept = batch_on_device(places, batch_of(vocab_size - 1))
    assert kept["data"]["input_ids"].tolist() == [[1, vocab_size - 1]]
    with pytest.raises(UserError, match=rf"the token id {vocab_size}, .*\(a\.jsonl:8\)"):
        batch_on_device(places, batch_of(vocab_size))
    embeddings_alone = {"data": {"inputs_embeds": torch.zeros(1, 2, 4)}}
    assert batch_on_device(places, embeddings_alone)["data"]["inputs_embeds"].shape == (1, 2, 4)


class Order(Hook):
    """Notes which rows came and which hooks were called."""

    def __init__(self):
        self.rows, self.epochs, self.finished = [], [], []

    def before_train_epoch(self, runner):
        self.epochs.append(f"begin {runner.epoch}")

    def after_train_epoch(self, runner):
        self.epochs.append(f"end {runner.epoch}")

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.rows += data_batch["data"]["rows"]
        self.finished.append(runner.train_loop.step_finished)


def test_each_epoch_has_all_rows_in_an_order_of_its_own(tmp_path):
    order = Order()
    make_runner(tmp_path, max_epochs=2, shuffle=True, hooks=[order]).train()
    first, second = order.rows[:8], order.rows[8:]
    assert sorted(first) == sorted(second) == sorted(row["row"] for row in ToyRows().rows)
    assert first != second
    assert order.epochs == ["begin 0", "end 0", "begin 1", "end 1"]


def test_hooks_know_when_a_step_is_finished(tmp_path):
    order = Order()
    make_runner(tmp_path, accumulative_counts=3, hooks=[order]).train()
    assert order.finished == [False, False, True, False, False, True, False, True]


def test_no_pause_between_epochs(tmp_path, monkeypatch):
    runner = make_runner(tmp_path, rows=2, max_epochs=3)
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)  # mmengine's loop sleeps 2 s an epoch
    runner.train()
    assert not slept


def test_neither_or_both_lengths_are_refused(tmp_path):
    for settings in (dict(val_interval=5), dict(max_epochs=1, max_iters=5)):
        with pytest.raises(UserError, match="max_epochs or max_iters"):
            make_runner(tmp_path, **settings).train()


def poisoned_row() -> int:
    """A token that only some rows have."""
    rows = ToyRows().rows
    for token in range(31):
        there = [row["row"] for row in rows if bool((row["input_ids"] == token).any())]
        if len(there) == 1:
            return token
    raise AssertionError("no such token")


def row_with(token: int) -> str:
    (row,) = [r["row"] for r in ToyRows().rows if bool((r["input_ids"] == token).any())]
    return row


def test_a_loss_that_is_not_a_number_stops_and_names_its_row(tmp_path):
    token = poisoned_row()
    runner = make_runner(tmp_path, accumulative_counts=2, poison=token)
    with pytest.raises(UserError, match="the loss is nan") as caught:
        runner.train()
    assert row_with(token) in str(caught.value)
    (entry,) = [json.loads(x) for x in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in entry["rows"]] == [row_with(token)]
    assert torch.isfinite(weights(runner)).all()


@pytest.mark.parametrize("share", [0.05, 0.15, 0.3])
def test_a_short_run_gets_its_learning_rate_after_the_warmup(tmp_path, share):
    warmup = dict(
        type=LinearLR,
        start_factor=1e-5,
        by_epoch=True,
        begin=0,
        end=share,
        convert_to_iter_based=True,
    )
    make_runner(tmp_path, schedule=[warmup], max_epochs=1).train()
    rates = [line["lr"] for line in metrics(tmp_path)]
    assert rates[-1] == pytest.approx(0.1)


def test_a_bad_step_can_be_left_out(tmp_path):
    runner = make_runner(tmp_path, poison=poisoned_row(), on_bad_loss="skip", max_epochs=1)
    runner.train()
    assert runner.iter == 8
    assert torch.isfinite(weights(runner)).all()


def test_a_bad_step_can_be_taken_all_the_same(tmp_path):
    runner = make_runner(tmp_path, poison=poisoned_row(), on_bad_loss="continue", max_epochs=1)
    runner.train()
    assert not torch.isfinite(weights(runner)).all()

"""The whole examination: what training refuses is named by row, and "ready" means built."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from datasets import load_dataset

from tests.dataset.prepare.test_bad_rows import AUTO as AUTO_TEMPLATE
from tests.dataset.prepare.test_bad_rows import (
    CALL,
    EMPTY,
    NAMED,
    REFUSED,
    STRICT,
    THINKING,
    TOOLS,
    A,
    Q,
)
from tests.helpers.tiny import make_tokenizer
from xtuner.dataset.concat import ConcatDataset
from xtuner.dataset.huggingface import process_hf_dataset
from xtuner.dataset.map_fns import openai_map_fn
from xtuner.doctor import encoded
from xtuner.doctor.examine import examine


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path / "cache"))


def config(
    *rows: dict, chat_template: str = STRICT, tokenizer=None, name: str = "a.jsonl", **settings
) -> dict:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "type": process_hf_dataset,
        "dataset": dict(type=load_dataset, path="json", data_files=name),
        "tokenizer": tokenizer or make_tokenizer(chat_template=chat_template),
        "dataset_map_fn": openai_map_fn,
        "template_map_fn": AUTO_TEMPLATE,
        "max_length": 64,
        "remove_unused_columns": True,
        **settings,
    }


def examined(dataset: dict) -> tuple[dict[str, list[int]], str]:
    """The lines of each kind of finding, and the advice."""
    report, _ = examine("c.py", dataset)
    lines = {f.code: [place.line for place in f.places] for f in report.scan.findings}
    return lines, report.advice


GOOD = [{"messages": [Q, A]}, {"messages": [{**Q, "content": "again"}, A]}]


def test_ready_means_that_it_was_built():
    assert examined(config(*GOOD)) == ({}, "The dataset is ready: xtuner train c.py")


def test_the_command_is_quoted():
    report, _ = examine("我的 configs/a.py", config(*GOOD))
    assert report.advice == "The dataset is ready: xtuner train '我的 configs/a.py'"


def test_not_built_is_not_ready():
    found, advice = examined(config(*GOOD) | {"tokenizer": None})
    assert found == {}
    assert "not known" in advice


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_is_an_error(number, monkeypatch):
    def build(settings):
        raise OSError(number, "the disk", "/cache")

    monkeypatch.setattr(encoded, "_build", build)
    found, advice = examined(config(*GOOD))
    assert found == {"cannot-build": [1]}
    assert advice.startswith("Fix everything")


@pytest.mark.parametrize("kind", ["an assistant turn first", "a system turn"])
def test_rows_that_the_template_refuses_are_named(kind):
    found, advice = examined(config(*GOOD, {"messages": REFUSED[kind]}))
    assert found["bad-row"] == [3]
    assert advice.startswith("Fix everything")
    found, advice = examined(config(*GOOD, {"messages": REFUSED[kind]}, bad_rows="drop"))
    assert found["left-out"] == [3]
    assert "can be trained on" in advice


def test_tools_that_the_template_has_no_place_for():
    row = {"messages": [Q, CALL, {"role": "tool", "content": "3"}, A], "tools": TOOLS}
    settings = config(row, template_map_fn=NAMED)
    report, _ = examine("c.py", settings)
    (finding,) = [f for f in report.scan.findings if f.code == "cannot-build"]
    assert "a.jsonl:1 has tools, tool_calls" in finding.places[0].detail


def test_of_a_large_table_a_sample_is_encoded(monkeypatch):
    monkeypatch.setattr(encoded, "SAMPLED_ROWS", 1)
    settings = config(*GOOD)
    report, _ = examine("c.py", settings)
    assert (len(report.tokens.lengths), report.tokens.rows) == (1, 2)
    assert "of which 1 were encoded" in report.advice and report.tokens.packs == 0
    assert report.as_dict()["tokens"]["unmeasured"] == 1
    whole, _ = examine("c.py", settings, all_rows=True)
    assert whole.tokens.unmeasured == 0 and len(whole.tokens.lengths) == 2
    assert whole.advice.startswith("The dataset is ready")


def test_what_training_draws_itself_is_no_sample(monkeypatch):
    monkeypatch.setattr(encoded, "SAMPLED_ROWS", 1)
    report, _ = examine("c.py", config(*GOOD, max_dataset_length=1))
    assert (len(report.tokens.lengths), report.tokens.unmeasured) == (1, 0)
    assert report.tokens.packs == 1 and report.advice.startswith("The dataset is ready")


def test_each_dataset_has_a_sample_of_its_own(monkeypatch):
    """One of three rows, and one of two that is all small: only the first is drawn from."""
    monkeypatch.setattr(encoded, "SAMPLED_ROWS", 2)
    other = {"messages": [{**Q, "content": "a third"}, A]}
    parts = [config(*GOOD, other), config(*GOOD, name="b.jsonl")]
    report, _ = examine("c.py", {"type": ConcatDataset, "datasets": parts})
    assert (len(report.tokens.lengths), report.tokens.unmeasured) == (4, 1)
    assert report.tokens.packs == 1  # of the second


def with_think_tokens():
    tokenizer = make_tokenizer(chat_template=THINKING)
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def test_trained_empty_think_blocks_are_counted():
    """Whether the data have them or the template inserts them."""
    given = {"messages": [Q, {**A, "content": f"{EMPTY}Hello."}]}
    inserted = {"messages": [{**Q, "content": "again"}, A]}
    thoughtful = {"messages": [Q, {**A, "content": "<think>\nhm\n</think>\n\nHello."}]}
    rows = [given, inserted, thoughtful]
    found, _ = examined(config(*rows, tokenizer=with_think_tokens()))
    assert found == {"empty-think": [1, 2]}
    masked = config(*rows, tokenizer=with_think_tokens(), train_thinking="mask_empty")
    assert examined(masked)[0] == {}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{**Q, "content": "<image>\nWhat is it?"}, A]},
        {"messages": [{**Q, "content": "And?"}, A], "images": ["a.png"]},
    ],
)
def test_an_image_in_text_data_is_noticed(row):
    found, _ = examined(config(GOOD[0], row))
    assert found == {"image-in-text": [2]}

"""The doctor's figures come from the dataset as training builds it."""

from __future__ import annotations

import io
import json

import pytest
from datasets import Dataset
from rich.console import Console

from tests.helpers.tiny import make_tokenizer
from xtuner.doctor.examine import examine
from xtuner.doctor.report import print_report
from xtuner.utils.errors import UserError

ROWS = [{"input": f"Name river {number}.", "output": "Rhine" * (number + 1)} for number in range(4)]
LIMIT = 20


def process_hf_dataset(tokenizer, max_length, pack_to_max_length=True, **settings):
    """Keeps the contract of the builder whose name it has, on the rows above."""
    if settings.get("error"):
        raise UserError("no such column")
    encoded = []
    for number, row in enumerate(ROWS):
        ask, say = (
            tokenizer(row[key], add_special_tokens=False)["input_ids"]
            for key in ("input", "output")
        )
        ids, labels = ask + say, [-100] * len(ask) + say
        encoded.append(
            {"input_ids": ids[:max_length], "labels": labels[:max_length], "rows": [number]}
        )
    if not pack_to_max_length:
        return Dataset.from_list(encoded)
    packs = -(-sum(len(row["labels"]) for row in encoded) // max_length)
    return Dataset.from_list(encoded[:packs])


@pytest.fixture
def settings(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"conversation": [row]}) + "\n" for row in ROWS))

    def load_jsonl_dataset() -> None:
        raise AssertionError("the raw rows are read by the doctor itself")

    source = {"type": load_jsonl_dataset, "data_files": str(file)}
    return {
        "type": process_hf_dataset,
        "dataset": source,
        "tokenizer": make_tokenizer(),
        "max_length": LIMIT,
    }


def lengths(tokenizer) -> list[int]:
    return [
        sum(len(tokenizer(row[key], add_special_tokens=False)["input_ids"]) for key in row)
        for row in ROWS
    ]


def test_figures_and_sample(settings):
    report, shown = examine("config.py", settings)
    expected = lengths(settings["tokenizer"])
    facts = report.tokens
    assert list(facts.lengths) == expected
    assert facts.lost == sum(max(0, length - LIMIT) for length in expected) > 0
    assert facts.fullness == pytest.approx((facts.tokens - facts.lost) / facts.places)
    cut = next(one for one in report.scan.findings if one.code == "cut")
    first = next(number for number, length in enumerate(expected) if length > LIMIT)
    assert cut.places[0].line == first + 1
    assert shown.rows[0].segments[-1].text == "Rhine"
    assert shown.rows[0].source.endswith("data.jsonl:1")

    out = io.StringIO()
    print_report(report, Console(file=out, width=80))
    text = out.getvalue()
    assert f"cut at max_length={LIMIT}: {facts.lost} tokens" in text
    assert text.count("█") > 10
    assert max(map(len, text.splitlines())) <= 80
    assert report.as_dict()["tokens"]["longest"] == max(expected)


def test_a_dataset_that_cannot_be_built_is_a_finding(settings):
    report, shown = examine("config.py", {**settings, "error": True})
    (finding,) = report.scan.findings
    assert (finding.code, finding.places[0].detail) == ("cannot-build", "no such column")
    assert shown is None

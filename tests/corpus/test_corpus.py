"""Every case of the tables gives what the table says, in the doctor, in training and in check-cfg.

The tables are data: ``faulty_data.jsonl`` and ``good_data.jsonl`` (the lines of a file, the
findings of the doctor with their lines, and what training makes of it), ``config_mistakes.jsonl``
(edits of the configs in ``tests/errors/base`` and what ``check-cfg`` says) and
``good_configs.jsonl``.
"""

from __future__ import annotations

import logging

import pytest

from tests.corpus import walk
from tests.helpers.tiny import make_tokenizer
from xtuner.doctor.rules import ERROR, RULES


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    logging.getLogger("datasets").setLevel(logging.CRITICAL)


def has_errors(findings: dict[str, list[int]]) -> bool:
    return any(code not in RULES or RULES[code].level == ERROR for code in findings)


@pytest.mark.parametrize("case", walk.rows_of_tables("faulty_data", "good_data"))
def test_data(case, tokenizer):
    dataset = walk.dataset_of(case, tokenizer)
    found, made = walk.doctor(dataset), walk.train(dataset)
    assert found == case["doctor"]
    if isinstance(case["train"], int):
        assert made == case["train"]
        assert not has_errors(found), "the doctor refuses what training takes"
    else:
        assert case["train"] in made.replace("\n", " ")
        assert has_errors(found), "the doctor passes what training refuses"


@pytest.mark.parametrize("case", walk.rows_of_tables("config_mistakes"))
def test_config_mistakes(case):
    found = walk.problems(case)
    codes = case["code"] if isinstance(case["code"], list) else [case["code"]]
    assert [code for code, _ in found] == codes
    assert case["text"] in found[0][1]


@pytest.mark.parametrize("case", walk.rows_of_tables("good_configs"))
def test_good_configs(case):
    assert walk.problems(case) == []


def test_the_tables_are_large_and_name_each_case_once():
    sizes = {"faulty_data": 150, "config_mistakes": 120, "good_data": 60, "good_configs": 40}
    for name, least in sizes.items():
        names = [case["name"] for case in walk.table(name)]
        assert len(set(names)) == len(names) >= least
    for case in walk.table("good_data"):
        assert case["doctor"] == {} and isinstance(case["train"], int)
    for case in walk.table("faulty_data"):
        assert case["doctor"], case["name"]

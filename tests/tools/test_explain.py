"""xtuner explain: every code is explained in both languages, by an example that its rule finds."""

from __future__ import annotations

import json
import re

import pytest

from scripts.codes_page import HEAD, ROOT, page
from tests.config.check.rules import findings
from xtuner.config.check import check, codes, packages, resources
from xtuner.config.check.problem import RULES
from xtuner.doctor.rules import RULES as OF_DATA
from xtuner.entry_point import COMMANDS, main
from xtuner.utils.lang import is_chinese

CODES = {code.code: code for code in codes()}
NOT_A_CONFIG = {"XT0002", "XT0340"}
"""The example or the fix is a command."""
CHINESE = re.compile("[\u4e00-\u9fff]")


@pytest.fixture
def of_the_examples(monkeypatch, tmp_path):
    """What the examples say of the machine: 8 processes, 30 GB, no bitsandbytes, folders."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(packages, "is_missing", {"bitsandbytes"}.__contains__)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resources, "free_bytes", lambda work_dir: 30 * 2**30)
    vocabulary = {"model": {"vocab": {"<|end|>": 0}}}
    new_tokens = {**vocabulary, "added_tokens": [{"content": "<|new|>", "id": 1}]}
    for name, content in (("model", vocabulary), ("with_new_tokens", new_tokens)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    (tmp_path / "model" / "config.json").write_text(json.dumps({**sizes, "vocab_size": 1}))
    (tmp_path / "my.jsonl").write_text("{}")


@pytest.mark.parametrize("code", sorted(RULES))
def test_the_rule_finds_the_example_and_not_the_fix(code, of_the_examples):
    rule = RULES[code]
    assert findings(rule.find, rule.wrong)
    if code not in NOT_A_CONFIG:
        assert not findings(rule.find, rule.right)


def test_the_example_of_a_config_that_cannot_be_read(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CODES["XT0001"].wrong)
    assert [problem.code for problem in check(config)] == ["XT0001"]
    config.write_text(CODES["XT0001"].right)
    assert "XT0001" not in [problem.code for problem in check(config)]


def test_the_example_of_a_config_that_is_not_there(capsys):
    program, *words = CODES["XT0002"].wrong.split()
    assert (program, main(words)) == ("xtuner", 1)
    assert "XT0002" in capsys.readouterr().out
    assert main(CODES["XT0002"].right.split()[1:]) == 0


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_code_is_explained(language, monkeypatch, capsys):
    monkeypatch.setenv("XTUNER_LANG", language)
    for name in (*CODES, *OF_DATA):
        assert main(["explain", name]) == 0
        title, _, text = capsys.readouterr().out.partition("\n")
        known = CODES.get(name) or OF_DATA[name]
        assert title.startswith(name) and known.title in title
        assert text.strip()
        assert bool(CHINESE.search(title)) == is_chinese()


def test_an_explanation_has_the_example_and_the_fix(capsys):
    assert main(["explain", "XT0302"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("XT0302 (warning): batch_size above 1 with packed rows\n")
    assert out.index("batch_size=4") < out.index("Fix:") < out.index("batch_size=1")


@pytest.mark.parametrize("word", ["xt0302", "0302", "302"])
def test_spellings_of_a_code(word, capsys):
    assert main(["explain", word]) == 0
    assert capsys.readouterr().out.startswith("XT0302 ")


def test_a_finding_of_the_data(capsys):
    assert main(["explain", "few_steps"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("few-steps (warning): the run is very short\n")
    assert OF_DATA["few-steps"].advice in out


def test_without_a_code_all_are_listed(capsys):
    assert main(["explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, known in {**CODES, **OF_DATA}.items():
        assert any(line.split() == [name, *known.title.split()] for line in lines), name


@pytest.mark.parametrize(("word", "near"), [("XT0303x", "XT0303"), ("few-step", "few-steps")])
def test_an_unknown_code_is_answered_with_near_ones(word, near, capsys):
    assert main(["explain", word]) == 1
    err = capsys.readouterr().err
    assert f"there is no code '{word}'" in err
    assert near in err


def test_a_code_without_near_ones(capsys):
    assert main(["explain", "qqqqqq"]) == 1
    assert "'xtuner explain' lists all codes." in capsys.readouterr().err


@pytest.mark.parametrize("language", sorted(HEAD))
def test_the_page_has_the_titles_of_the_rules(language):
    written = (ROOT / "docs" / language / "check_cfg.md").read_text("utf-8")
    assert written == page(language), "run python scripts/codes_page.py"
    assert len(re.findall(r"^\| XT\d{4} \|", written, re.M)) == len(CODES)


def test_the_commands_have_it():
    assert COMMANDS["explain"].module == "explain"

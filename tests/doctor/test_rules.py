"""Every code that the doctor uses has a rule, in both languages, and every rule is used."""

import re
from pathlib import Path

import pytest

import xtuner.doctor
from xtuner.doctor.findings import Findings, Place
from xtuner.doctor.rules import ERROR, NOTE, RULES, WARNING

SOURCES = "".join(
    file.read_text("utf-8")
    for file in sorted(Path(xtuner.doctor.__file__).parent.glob("*.py"))
    if file.name != "rules.py"
)


def test_every_rule_is_used():
    assert not [code for code in RULES if f'"{code}"' not in SOURCES]


def test_every_code_has_a_rule():
    used = set(re.findall(r'(?:yield|_add\(|findings\.add\(|append\()\s*"([a-z-]+)"', SOURCES))
    assert len(used) > 20 and used <= set(RULES)


@pytest.mark.parametrize("code", RULES)
def test_a_rule_speaks_both_languages(code, monkeypatch):
    rule = RULES[code]
    monkeypatch.setenv("XTUNER_LANG", "en")
    english = rule.title, rule.advice
    assert all(text.isascii() and text for text in english)
    monkeypatch.setenv("XTUNER_LANG", "zh")
    assert all(re.search("[\u4e00-\u9fff]", text) for text in (rule.title, rule.advice))


def test_findings_with_warnings_are_no_errors():
    assert {rule.level for rule in RULES.values()} == {ERROR, WARNING, NOTE}
    findings = Findings()
    findings.add("very-long", Place("a", 1))
    assert findings.is_clean and not findings.has_errors
    findings.add("duplicate", Place("a", 2))
    assert not findings.is_clean and not findings.has_errors
    findings.add("bad-json", Place("a", 3))
    assert findings.has_errors
    assert [one.code for one in findings] == ["bad-json", "duplicate", "very-long"]

"""Every seeded mistake is found, at its line, with nothing else reported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from xtuner.config.check.checker import RULES, check

FOLDER = Path(__file__).parent
MISTAKES = sorted(FOLDER.glob("*.md"))


@dataclass(frozen=True)
class Mistake:
    """An edit of a base config, and the one problem that it must give."""

    base: str
    old: str
    new: str
    severity: str
    code: str
    line: str
    text: str


def read(path: Path) -> Mistake:
    text = path.read_text("utf-8")
    diff = re.search(r"```diff\n(.*?)```", text, re.S)
    expected = re.search(r"^Expected: (\w+) `(XT\d+)` at `(.*)`$", text, re.M)
    base = re.search(r"^Base: `(\w+)`$", text, re.M)
    assert diff and expected and base, path
    lines = diff[1].splitlines()
    return Mistake(
        base=(FOLDER / "base" / f"{base[1]}.py").read_text("utf-8"),
        old="\n".join(line[1:] for line in lines if line.startswith("-")),
        new="\n".join(line[1:] for line in lines if line.startswith("+")),
        severity=expected[1],
        code=expected[2],
        line=expected[3],
        text=text.rpartition("\n> ")[2].strip(),
    )


def edited(mistake: Mistake) -> str:
    assert mistake.base.count(f"{mistake.old}\n") == 1, f"not once in the base:\n{mistake.old}"
    return mistake.base.replace(f"{mistake.old}\n", f"{mistake.new}\n")


@pytest.mark.parametrize("base", ["qlora", "full", "dpo"])
def test_base_is_clean(base):
    problems = check(FOLDER / "base" / f"{base}.py")
    assert problems == []


@pytest.mark.parametrize("path", MISTAKES, ids=lambda path: path.stem)
def test_mistake_is_found(path, tmp_path):
    mistake = read(path)
    config = tmp_path / "config.py"
    config.write_text(edited(mistake), "utf-8")
    problems = check(config)
    assert [(p.code, p.severity) for p in problems] == [(mistake.code, mistake.severity)], problems
    found = problems[0]
    assert mistake.text in f"{found.message} {found.hint}"
    line = config.read_text("utf-8").splitlines()[found.where.line - 1] if found.where.line else ""
    assert mistake.line in line
    assert bool(mistake.line) == bool(found.where.line)


def test_there_are_sixty():
    assert len(MISTAKES) >= 60


def test_every_rule_has_a_mistake():
    """Rules that need an environment or a local model have tests of their own."""
    check(FOLDER / "base" / "qlora.py")
    elsewhere = {"XT0305", "XT0328", "XT0333", "XT0336", "XT0340", "XT0341"}
    elsewhere |= {"XT0342", "XT0343", "XT0344", "XT0345"}
    assert set(RULES) - {read(path).code for path in MISTAKES} <= elsewhere

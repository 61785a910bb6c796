"""Faulty data and configs through every command that reads them: a message, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.corpus import walk
from tests.corpus.test_corpus import folder  # noqa: F401 (a fixture)
from tests.e2e.test_printed_commands import config_text
from tests.helpers.tiers import few_fast
from xtuner.config.check.checker import ERROR
from xtuner.config.check.checker import RULES as RULES_OF_CONFIGS
from xtuner.crash import INTERNAL_ERROR
from xtuner.doctor.rules import RULES
from xtuner.entry_point import main

COMMANDS = {
    "check-cfg": ["check-cfg", "c.py"],
    "doctor": ["doctor", "c.py"],
    "check-custom-dataset": ["check-custom-dataset", "c.py"],
    "log-dataset": ["log-dataset", "c.py"],
    "preprocess": ["preprocess", "sft", "c.py", "out"],
    "train": ["train", "c.py", "--work-dir", "run"],
}
CASES = [
    case
    for case in walk.table("faulty_data")
    if not isinstance(case["train"], int) and not case.get("settings")
]
"""What training refuses."""
BY_KIND = {" ".join(sorted(case["doctor"])): case for case in CASES}
MISTAKES = [case for case in walk.table("config_mistakes") if not case.get("options")]
WARNINGS = {code for code, rule in RULES_OF_CONFIGS.items() if rule.severity != ERROR}


def config_of(case: dict, base: str) -> str:
    """A whole config that trains on the file of a case, which is written here."""
    Path(case["file"]).write_bytes(walk.content(case))
    text = config_text(
        base, str(case.get("files", case["file"])), case.get("template") or "qwen_chat", False
    )
    more = "".join(f", {name}={value!r}" for name, value in case.get("loader", {}).items())
    text = text.replace('path="json"', f"path={case.get('path', 'json')!r}{more}")
    function = case.get("map_fn")
    if function:
        text = text.replace(
            "import template_map_fn_factory", f"import {function}, template_map_fn_factory"
        )
        text = text.replace("dataset_map_fn=None", f"dataset_map_fn={function}")
    return text


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "case", few_fast(CASES, [*BY_KIND.values()][::4]), ids=[case["name"] for case in CASES]
)
def test_a_fault_through_every_command(case, tiny_llama, capfd):
    Path("c.py").write_text(config_of(case, str(tiny_llama)), "utf-8")
    for name, words in COMMANDS.items():
        status = main(words)
        said = capfd.readouterr()
        assert status != INTERNAL_ERROR, (name, said.err)
        assert "Traceback" not in said.out + said.err, name
        if name in ("check-custom-dataset", "preprocess", "train"):
            assert status == 1, (name, said.out + said.err)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "case", few_fast(MISTAKES, MISTAKES[::60]), ids=[case["name"] for case in MISTAKES]
)
def test_a_config_mistake_through_every_command(case, capfd):
    """The data of the config are on the hub, which is not there: what comes first is said."""
    found = walk.problems(case)
    Path("config.py").rename("c.py")
    has_error = any(code not in WARNINGS for code, _ in found)
    for name, words in COMMANDS.items():
        status = main(words)
        said = capfd.readouterr()
        assert status not in (0, INTERNAL_ERROR) or name in ("check-cfg", "doctor"), (name, said)
        assert status != INTERNAL_ERROR and "Traceback" not in said.out + said.err, (name, said)
        if name == "check-cfg":
            assert status == int(has_error)


def test_the_kinds_are_many():
    found = {code for case in CASES for code in case["doctor"]}
    assert len(CASES) >= 150 and len(MISTAKES) >= 120
    assert len(found & set(RULES)) >= 10

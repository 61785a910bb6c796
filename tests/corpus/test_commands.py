"""Each kind of faulty data through every command that reads it: a message, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.corpus import walk
from tests.corpus.test_corpus import folder  # noqa: F401 (a fixture)
from tests.e2e.test_printed_commands import config_text
from tests.helpers.tiers import few_fast
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
OF_EACH_KIND = 2
"""Cases that are walked for each kind of finding; more take the file over its time."""


def some_of_each_kind() -> list[dict]:
    """The first cases of each finding of the doctor that training refuses."""
    kinds: dict[str, list[dict]] = {}
    for case in walk.table("faulty_data"):
        if not isinstance(case["train"], int) and not case.get("settings"):
            kinds.setdefault(" ".join(sorted(case["doctor"])), []).append(case)
    return [case for cases in kinds.values() for case in cases[:OF_EACH_KIND]]


CASES = some_of_each_kind()


def config_of(case: dict, base: str) -> str:
    """A whole config that trains on the file of a case, which is written here."""
    Path(case["file"]).write_bytes(walk.content(case))
    text = config_text(
        base, str(case.get("files", case["file"])), case.get("template") or "qwen_chat", False
    )
    text = text.replace('path="json"', f"path={case.get('path', 'json')!r}")
    function = case.get("map_fn")
    if function:
        text = text.replace(
            "import template_map_fn_factory", f"import {function}, template_map_fn_factory"
        )
        text = text.replace("dataset_map_fn=None", f"dataset_map_fn={function}")
    return text


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("case", few_fast(CASES, CASES[::6]), ids=[case["name"] for case in CASES])
def test_a_fault_through_every_command(case, tiny_llama, capfd):
    Path("c.py").write_text(config_of(case, str(tiny_llama)), "utf-8")
    for name, words in COMMANDS.items():
        status = main(words)
        said = capfd.readouterr()
        assert status != INTERNAL_ERROR, (name, said.err)
        assert "Traceback" not in said.out + said.err, name
        if name in ("check-custom-dataset", "preprocess", "train"):
            assert status == 1, (name, said.out + said.err)


def test_the_kinds_are_many():
    found = {code for case in CASES for code in case["doctor"]}
    assert len(CASES) >= 15
    assert len(found & set(RULES)) >= 10

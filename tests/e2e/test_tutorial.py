"""The tutorial's commands, line by line; both languages have the same."""

from __future__ import annotations

import json
import re
import shlex
import sys
from io import StringIO
from pathlib import Path

from tests.e2e.test_own_code import say
from xtuner.quickstart.base import make_base

DOCS = Path(__file__).parents[2] / "docs"


def commands(language: str) -> list[str]:
    text = (DOCS / language / "tutorial.md").read_text("utf-8")
    return "".join(re.findall(r"```shell\n(.*?)```", text, re.S)).splitlines()


def test_every_line_runs(tmp_path, monkeypatch, capsys):
    lines = commands("en")
    assert commands("zh_cn") == lines and len(lines) == 7
    row = re.search(r"```json\n(.*?)\n```", (DOCS / "en" / "tutorial.md").read_text("utf-8"))
    assert row
    assert set(json.loads(row[1])) == {"question", "answer"}
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / "my-model")
    Path("my.jsonl").write_text(f"{row[1]}\n" * 60)
    for line in lines:
        typed, _, command = line.rpartition(" | ")
        words = shlex.split(command)[1:]
        if words[0] == "train":  # a tenth of the epochs and short samples
            words += ["--cfg-options", "max_epochs=1", "custom_hooks.1.max_new_tokens=2"]
            said = say(capsys, *words)
            assert "data: 60 rows, " in said
            continue
        if typed:
            text = shlex.split(typed)[1].replace("\\n", "\n")
            monkeypatch.setattr(sys, "stdin", StringIO(text))
            words += ["--max-new-tokens", "3"]
        said = say(capsys, *[word.replace("iter_200", "iter_20") for word in words])
    assert "user: When does the lamp burn?\nassistant: " in said

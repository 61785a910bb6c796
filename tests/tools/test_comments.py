"""The comments of copied configs are in the language of the messages; the code is the same."""

from __future__ import annotations

import ast
import re

import pytest

from xtuner.configs import render
from xtuner.configs.settings import LAYOUT
from xtuner.entry_point import main
from xtuner.tools.config_writers.comments import TEXTS, in_users_language

NAME = "internlm2_5_chat_7b_qlora_alpaca_e3"


def test_every_setting_is_covered():
    comments = {why for _, group in LAYOUT for why in group.values() if why}
    assert comments | {title for title, _ in LAYOUT} <= set(TEXTS)


@pytest.mark.parametrize("name", [NAME, "qwen2_5_7b_instruct_full_custom_sft_e1"])
def test_comments_are_translated_and_the_code_is_not(name, monkeypatch):
    text = render(name)
    monkeypatch.setenv("XTUNER_LANG", "en")
    assert in_users_language(text) == text
    monkeypatch.setenv("XTUNER_LANG", "cn")
    chinese = in_users_language(text)
    assert ast.dump(ast.parse(chinese)) == ast.dump(ast.parse(text))
    assert len(chinese.splitlines()) == len(text.splitlines())
    untranslated = [
        line
        for line in re.findall(r"# (\w.*)", chinese.partition("PART 1")[2])
        if line in TEXTS or re.match(r"[a-z ]+;", line)
    ]
    assert not untranslated


def test_copy_cfg(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XTUNER_LANG", "zh")
    assert main(["copy-cfg", NAME, str(tmp_path)]) == 0
    text = (tmp_path / f"{NAME}_copy.py").read_text("utf-8")
    assert re.search(r"^lr = 2e-4  # .*学习率", text, re.M)
    assert main(["check-cfg", str(tmp_path / f"{NAME}_copy.py")]) == 0

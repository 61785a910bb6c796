"""The comments of copied configs are in the language of the messages; the code is the same."""

from __future__ import annotations

import ast
import io
import re
import tokenize

from xtuner.configs import render
from xtuner.configs.catalogue import names
from xtuner.configs.datasets import DATASETS
from xtuner.configs.settings import LAYOUT
from xtuner.entry_point import main
from xtuner.tools.config_writers.comments import TEXTS, in_users_language

NAME = "internlm2_5_chat_7b_qlora_alpaca_e3"
CODE = re.compile(r"# (ruff: |    | *PART \d|visualizer = |\))|^#+$")


def test_every_setting_is_covered():
    comments = {why for _, group in LAYOUT for why in group.values() if why}
    assert comments | {title for title, _ in LAYOUT} <= set(TEXTS)


def one_of_each() -> list[str]:
    """A name of the catalogue for each dataset, kind of training and family of configs."""
    found = {}
    for name in names():
        kind = re.findall("dpo|orpo|reward|full|lora|llava|internvl|quickstart|_hf|mmlu|_sp", name)
        found[tuple(kind), tuple(data for data in DATASETS if data in name)] = name
    return list(found.values())


def test_all_comments_are_translated_and_the_code_is_not(monkeypatch):
    assert len(one_of_each()) > 60
    for name in one_of_each():
        text = render(name)
        monkeypatch.setenv("XTUNER_LANG", "en")
        assert in_users_language(text) == text
        monkeypatch.setenv("XTUNER_LANG", "cn")
        chinese = in_users_language(text)
        assert ast.dump(ast.parse(chinese)) == ast.dump(ast.parse(text))
        for token in tokenize.generate_tokens(io.StringIO(chinese).readline):
            if token.type == tokenize.COMMENT and not CODE.search(token.string):
                assert re.search(r"[\u4e00-\u9fff]", token.string), f"{name}: {token.string}"


def test_the_first_comment(monkeypatch):
    monkeypatch.setenv("XTUNER_LANG", "cn")
    chinese = in_users_language(render("qwen2_5_vl_3b_instruct_lora_custom_vision_e1"))
    lines = chinese.splitlines()
    assert lines[1] == "# Qwen2.5-VL-3B-Instruct：LoRA，数据：自己的图文数据，1 轮。"
    assert lines[2].startswith('# 一行数据：{"messages": [{"role": "user", "content": "<image>')
    assert lines[3:5] == [
        "#",
        "#     xtuner train qwen2_5_vl_3b_instruct_lora_custom_vision_e1_copy.py",
    ]


def test_copy_cfg(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XTUNER_LANG", "zh")
    assert main(["copy-cfg", NAME, str(tmp_path)]) == 0
    text = (tmp_path / f"{NAME}_copy.py").read_text("utf-8")
    assert re.search(r"^lr = 2e-4  # .*学习率", text, re.M)
    assert main(["check-cfg", str(tmp_path / f"{NAME}_copy.py")]) == 0

"""Messages: the catalogue is complete, fits the source, and is what users see."""

from __future__ import annotations

import ast
import importlib.util
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest
from babel.messages.mofile import read_mo

from xtuner.configs.models import MODELS
from xtuner.utils.lang import LOCALE, N_, is_chinese, tr, translate

ROOT = Path(__file__).parent.parent.parent
PO = LOCALE / "zh_CN" / "LC_MESSAGES" / "xtuner.po"

spec = importlib.util.spec_from_file_location("messages", ROOT / "scripts" / "messages.py")
assert spec and spec.loader
messages = importlib.util.module_from_spec(spec)
sys.modules["messages"] = messages
spec.loader.exec_module(messages)

USES = list(messages.uses())
CATALOGUE = {entry.id: entry for entry in messages.read(PO) if entry.id}

FORMAT = re.compile(r"\{\w+[!:}]")
CHINESE = re.compile(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")
CHINESE_DATA = {
    "apis/datasets.py": "names of published files",
    "configs/datasets.py": "evaluation inputs, system texts and names of published files",
    "configs/llava.py": "evaluation inputs",
    "configs/settings.py": "evaluation inputs",
    "configs/oneoffs/": "evaluation inputs and the name of an assistant",
    "doctor/checks.py": "special tokens of DeepSeek",
    "evaluation/mmbench.py": "the question of the Chinese benchmark",
    "proving/templates.py": "conversations to compare templates with",
}
"""Source files that may hold Chinese characters, and as what."""


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def test_messages_are_literals() -> None:
    wrong = [
        use.place
        for use in USES
        if use.function in ("tr", "N_") and not (use.message and use.message.strip())
    ]
    assert not wrong, f"a message is one non-empty literal, no f-string or variable: {wrong}"


def test_values_are_those_of_the_placeholders() -> None:
    wrong = []
    for use in USES:
        if use.message is None or not use.values:
            continue
        named = placeholders(use.message)
        if None in use.values or named != set(use.values):
            wrong.append(f"{use.place}: {sorted(named)} but values {use.values}")
    assert not wrong, "\n".join(wrong)


def test_a_format_string_gets_its_values() -> None:
    """Without values a message is shown as it is: ``{name}`` in it is most likely a mistake."""
    wrong = [
        f"{use.place}: {use.message}"
        for use in USES
        if use.function == "tr" and not use.values and FORMAT.search(use.message or "")
    ]
    assert not wrong, "\n".join(wrong)


def test_every_message_has_a_chinese_text() -> None:
    used = {use.message for use in USES if use.message}
    missing = {text for text in used if text not in CATALOGUE or not CATALOGUE[text].string}
    assert not missing, f"run `make messages` and translate in {PO}: {sorted(missing)}"
    fuzzy = [text for text, entry in CATALOGUE.items() if entry.fuzzy]
    assert not fuzzy, f"fuzzy entries are not used: check and unmark them: {fuzzy}"


def test_why_a_model_cannot_be_trained_is_a_message() -> None:
    reasons = {reason for card in MODELS.values() for reason in card.unsupported.values()}
    assert reasons and not reasons - CATALOGUE.keys(), "mark them by N_"


def test_no_entry_is_stale() -> None:
    stale = CATALOGUE.keys() - {use.message for use in USES}
    assert not stale, f"run `make messages`: {sorted(stale)}"


def test_chinese_texts_have_the_placeholders_of_the_english() -> None:
    formats = {
        use.message
        for use in USES
        if use.message and (use.values or (use.function == "N_" and FORMAT.search(use.message)))
    }
    wrong = [
        f"{text!r} / {CATALOGUE[text].string!r}"
        for text in sorted(formats & CATALOGUE.keys())
        if placeholders(text) != placeholders(CATALOGUE[text].string)
    ]
    assert not wrong, "\n".join(wrong)


AFTER_CHINESE = re.compile(
    r"[\u4e00-\u9fff）][,;:!?](?!\d)|[A-Za-z}][,;](?=[\u4e00-\u9fff])"
    r"|[\u4e00-\u9fff] ?\(|[\w}\]]: (?=[\u4e00-\u9fff])|[\u4e00-\u9fff] ?(?<!命令 )\.\.\."
)
ONE_TERM = {
    r"图像(?!处理器)": "图片",
    r"(?<!工作)(?<!配置)目录": "文件夹",
    r"[你您]的": "自己的, or nothing",
    r"“(xtuner|--|from|def|\{)": "code in '...', as in English",
    r"(配置|文件夹)里(?!也)": "...中",
    r"\bHub\b": "hub",
    r"张 GPU": "块 GPU",
    r"(?<!_)\bembeddings?\b": "词嵌入",
    r"内核|(?<!liger-)kernel": "算子",
    r"停止词(?!$)": "停止 token, where it is one",
    r"划分": "split",
    r"(?<!图像)(?<!日志)处理器": "processor",
    r"整理函数": "collate 函数",
    r"\d 位": "比特",
}


@pytest.mark.parametrize("pattern", [AFTER_CHINESE.pattern, *ONE_TERM])
def test_chinese_is_written_in_one_way(pattern) -> None:
    """Full-width punctuation between Chinese characters; one term for each concept."""
    wrong = [entry.string for entry in CATALOGUE.values() if re.search(pattern, entry.string)]
    assert not wrong, ONE_TERM.get(pattern, "full-width punctuation")


def test_no_message_is_used_both_with_and_without_values() -> None:
    with_values = {use.message for use in USES if use.values}
    without = {use.message for use in USES if use.message and not use.values}
    assert not with_values & without


def test_the_compiled_catalogue_is_the_one_in_text() -> None:
    with PO.with_suffix(".mo").open("rb") as stream:
        compiled = {entry.id: entry.string for entry in read_mo(stream) if entry.id}
    assert compiled == {text: entry.string for text, entry in CATALOGUE.items()}, (
        "run `make messages`"
    )


def test_only_data_hold_chinese_characters() -> None:
    wrong, needed = [], set()
    for file in sorted((ROOT / "xtuner").rglob("*.py")):
        name = file.relative_to(ROOT / "xtuner").as_posix()
        lines = file.read_text("utf-8").splitlines()
        found = [number for number, line in enumerate(lines, 1) if CHINESE.search(line)]
        allowed = [known for known in CHINESE_DATA if name.startswith(known)]
        needed.update(allowed if found else ())
        wrong += [f"{name}:{number}" for number in found if not allowed]
    assert not wrong, f"Chinese messages belong into {PO.name}: {wrong}"
    assert needed == set(CHINESE_DATA), "exceptions that nothing needs"


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTUNER_LANG", "zh")


def test_both_languages_render(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTUNER_LANG", "en")
    assert tr("there is no folder '{path}'", path="a") == "there is no folder 'a'"
    monkeypatch.setenv("XTUNER_LANG", "zh_CN")
    assert tr("there is no folder '{path}'", path="a") == "没有文件夹 'a'"


def test_every_chinese_text_can_be_formatted(chinese: None) -> None:
    """Format specs survive translation: the same values fit both texts."""
    for text, entry in CATALOGUE.items():
        for use in (use for use in USES if use.message == text and use.values):
            specs = {
                side: {
                    (name, spec, conversion)
                    for _, name, spec, conversion in string.Formatter().parse(side)
                    if name is not None
                }
                for side in (text, str(entry.string))
            }
            assert specs[text] == specs[str(entry.string)], use.place


def test_braces_are_literal_without_values(chinese: None) -> None:
    assert translate(N_("{not} in the catalogue {}")) == "{not} in the catalogue {}"


def test_a_marked_message_is_translated_later(chinese: None) -> None:
    assert translate("the file has no rows") == "文件里没有数据"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"XTUNER_LANG": "en", "LANG": "zh_CN.UTF-8"}, False),
        ({"XTUNER_LANG": "zh", "LANG": "en_US.UTF-8"}, True),
        ({"LC_ALL": "zh_CN.UTF-8", "LANG": "en_US.UTF-8"}, True),
        ({"LANG": "zh_TW.UTF-8"}, True),
        ({"LANG": "C"}, False),
        ({}, False),
    ],
)
def test_the_language_is_that_of_the_environment(
    variables: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XTUNER_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_chinese() == expected


def test_english_reads_no_catalogue() -> None:
    code = (
        "from xtuner.utils import lang\n"
        "lang.LOCALE = lang.LOCALE / 'missing'\n"
        "assert lang.tr('train') == 'train'\n"
    )
    environment = {"XTUNER_LANG": "en", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_no_function_of_that_name_hides_behind_an_attribute() -> None:
    """``lang.tr(...)`` would not be collected."""
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in sorted((ROOT / "xtuner").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("tr", "N_")
    ]
    assert not wrong, wrong

"""Each check on rows and messages of its own: what it finds, and what it leaves alone."""

import pytest

from xtuner.doctor import checks
from xtuner.doctor.layouts import LAYOUTS
from xtuner.doctor.turns import Message

XTUNER, OPENAI, ALPACA = (LAYOUTS[name] for name in ("xtuner", "openai", "alpaca"))


def user(text="q"):
    return Message("user", text)


def assistant(text="a", **settings):
    return Message("assistant", text, **settings)


def codes(check, *arguments):
    return [code for code, _ in check(*arguments)]


def test_a_missing_field_suggests_the_nearest_name():
    row = {"instruction": "i", "input": "", "ouput": "o"}
    assert list(checks.missing_fields(row, ALPACA)) == [
        ("missing-field", "'output' (there is 'ouput')")
    ]
    assert codes(checks.wrong_types, {**row, "input": 5}, ALPACA) == ["not-text"]
    assert codes(checks.wrong_types, {**row, "input": [5]}, ALPACA) == ["wrong-type"]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": None}, ["wrong-type"]),
        ({}, ["missing-field"]),
        ({"tool_calls": [{}]}, []),
        ({"content": [{"type": "text", "text": "a"}]}, []),
        ({"content": 5}, ["not-text"]),
        ({"content": float("nan")}, ["wrong-type"]),
        ({"content": "a", "loss": None}, []),
        ({"content": "a", "loss": "False"}, []),
        ({"content": "a", "loss": "no"}, ["wrong-type"]),
    ],
)
def test_messages(message, expected):
    row = {"messages": [{"role": "assistant", **message}]}
    assert codes(checks.broken_items, row, OPENAI) == expected


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"sep": None, "system": None, "need_eos_token": None, "output_with_loss": None}, []),
        ({"output": None}, ["wrong-type"]),
        ({"need_eos_token": "yes"}, ["wrong-type"]),
        ({"sep": 5}, ["not-text"]),
        ({"sep": []}, ["wrong-type"]),
    ],
)
def test_turns(turn, expected):
    row = {"conversation": [{"input": "q", "output": "a", **turn}]}
    assert codes(checks.broken_items, row, XTUNER) == expected


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user(), assistant()], []),
        ([Message("system", "s"), user(), assistant(), user(), assistant()], []),
        ([user(), assistant(), Message("tool", "1"), Message("tool", "2"), assistant()], []),
        ([assistant(), user()], ["role-order"]),
        ([user(), user(), assistant()], ["role-order"]),
        ([user(), Message("'narrator'", "x"), user()], ["bad-role"]),
    ],
)
def test_the_order_of_roles(messages, expected):
    assert codes(checks.roles, messages, OPENAI) == expected


def test_answers_that_are_missing_or_not_trained():
    assert codes(checks.answers, [user()], OPENAI) == ["no-answer"]
    assert codes(checks.answers, [user(), assistant(trained=False)], OPENAI) == ["not-trained"]
    assert codes(checks.answers, [user(), assistant(), user()], OPENAI) == ["unanswered"]


def test_empty_texts_are_fine_where_an_answer_calls_a_tool_or_a_text_has_no_questions():
    assert codes(checks.empty_texts, [user(" "), assistant("")], OPENAI) == [
        "empty-question",
        "empty-answer",
    ]
    assert not codes(checks.empty_texts, [user(), assistant("", calls_tools=True)], OPENAI)
    assert not codes(checks.empty_texts, [user(""), assistant()], XTUNER)


@pytest.mark.parametrize(
    ("check", "text", "code"),
    [
        (checks.placeholders, " NaN ", "placeholder"),
        (checks.template_tokens, "a <|im_end|> b", "template-token"),
        (checks.characters, "a\u200bb", "invisible"),
        (checks.characters, "a\ufffdb", "broken-unicode"),
        (checks.open_code_blocks, "```python", "open-code-block"),
    ],
)
def test_texts(check, text, code):
    assert codes(check, [user(), assistant(text)], OPENAI) == [code]
    assert not codes(check, [user(), assistant("nan is a word, \u200d joins, ```x```")], OPENAI)


def test_images_and_their_marks(tmp_path):
    (tmp_path / "a.png").touch()
    asked = [user("<image> what?"), assistant()]
    assert not codes(checks.images, {"image": "a.png"}, asked, str(tmp_path))
    row = {"image": ["a.png", "b.png"]}
    assert codes(checks.images, row, asked, str(tmp_path)) == ["missing-image", "image-mark"]
    assert codes(checks.images, {}, asked, str(tmp_path)) == ["image-mark"]

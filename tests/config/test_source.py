"""Where a config's source text gives a key its value, and how its lines are counted."""

import ast

import pytest

from xtuner.config.source import ConfigSource, split_lines
from xtuner.utils.errors import UserError


def test_trace_follows_names():
    text = "n = 3\nlr = n\nbase = dict(lr=lr)\nopt = dict(inner=dict(base, k=1))\n"
    source = ConfigSource(text, "x.py")
    assert [(s.line, s.key) for s in source.trace(["opt", "inner", "lr"])] == [
        (4, "opt.inner"),
        (3, "base.lr"),
        (2, "lr"),
        (1, "n"),
    ]
    assert source.trace(["no"]) == []
    assert source.place(["opt", "inner", "lr"]) == (1, 5)
    assert source.key_place(["opt", "inner", "lr"]) == (3, 13)


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x0c", "\x85", "\x1c", "\x0b"])
def test_lines_are_those_of_the_syntax_tree(odd):
    """``str.splitlines`` would begin a new line at each of these."""
    text = f"a = 'x{odd}y'\nb = dict(\n    lr=1,\n)\n"
    source = ConfigSource(text, "x.py")
    assert source.lines == [f"a = 'x{odd}y'", "b = dict(", "    lr=1,", ")", ""]
    assert source.place(["b", "lr"]) == (3, 8)
    assert source.key_place(["b", "lr"]) == (3, 5)
    assert len(split_lines(text)) == ast.parse(text).body[-1].end_lineno + 1


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(end):
    assert split_lines(f"a = 1{end}b = 2{end}") == ["a = 1", "b = 2", ""]


def test_a_syntax_error_after_an_odd_line_is_shown():
    with pytest.raises(UserError) as error:
        ConfigSource("a = '\u2028'\nb = (1,\nc = 2\n", "x.py")
    assert error.value.where.line == 2
    assert "b = (1," in str(error.value)


def test_find():
    source = ConfigSource("a = dict(b={'c': [1, 2]}, d=e)\na['x'] = 3\n", "x.py")
    assert source.segment(source.find(["a", "b", "c", "1"]).node) == "2"
    inside = source.find(["a", "d", "f", "g"])
    assert (source.segment(inside.node), inside.rest) == ("e", ("f", "g"))
    assert source.find(["nothing"]) is None


def test_a_list_with_unpacking_has_no_places():
    """The index of an item says nothing about its position in the text."""
    span = ConfigSource("a = [*b, 1, 2]\n", "x.py").find(["a", "1"])
    assert span.rest == ("1",)


def test_assignments_of_all_kinds():
    text = "a: int = 1\na += 2\nif a:\n    a, b = 1, 2\nfor c in ():\n    pass\n"
    source = ConfigSource(text + "def f():\n    a = 9\n", "x.py")
    assert [s.lineno for s in source.assignments("a")] == [1, 2, 4]
    assert [source.segment(value) for value in source.values_of("b")] == ["2"]


def test_imports():
    text = "import a.b\nimport c as d\nfrom e import f as g, h\nfrom . import i\nfrom j import *\n"
    source = ConfigSource(text, "x.py")
    assert list(source.imports()) == [
        ("a.b", "a.b", None),
        ("d", "c", None),
        ("g", "e", "f"),
        ("h", "e", "h"),
    ]
    assert source.imported() == {"a", "d", "g", "h", "i", "*"}


def test_the_place_of_a_computed_value_is_its_first_setting():
    source = ConfigSource("n = 2\nlr = n * 3\nopt = dict(lr=lr)\n", "x.py")
    assert source.place(["opt", "lr"]) == (1, 5)


def test_settings_computed_from_each_other_have_a_place():
    source = ConfigSource("a = 1\nb = a * 2\na = b * 2\n", "x.py")
    assert source.place(["a"]) == (2, 5)


def test_the_place_of_a_function_and_an_import():
    source = ConfigSource("from os import path as p\ndef f():\n    pass\n", "x.py")
    assert source.place(["p"]) == (1, 16)
    assert source.place(["f"]) == (2, 1)
    assert source.place(["g"]) is None

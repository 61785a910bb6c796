"""Parts and their holes."""

from __future__ import annotations

import pytest

from xtuner.configs.fragments import Fragment, expression, filled, import_lines, names_in, part


def fill(text: str, **placeholders: object) -> str:
    return filled(Fragment(text, {}), placeholders).text  # type: ignore[arg-type]


def test_a_hole_takes_an_expression_and_keeps_its_indentation() -> None:
    assert fill("x = dict(\n    a=A_HERE,\n)\n", A="dict(\n    b=1,\n)") == (
        "x = dict(\n    a=dict(\n        b=1,\n    ),\n)\n"
    )


def test_a_starred_hole_takes_any_number_of_keyword_arguments() -> None:
    text = "x = dict(\n    a=1,\n    **MORE_HERE,\n)\n"
    assert fill(text, MORE={}) == "x = dict(\n    a=1,\n)\n"
    assert fill(text, MORE={"b": "2", "c": "3"}) == "x = dict(\n    a=1,\n    b=2,\n    c=3,\n)\n"
    assert fill("x = dict(a=1, **MORE_HERE)\n", MORE={"b": "2"}) == "x = dict(a=1, b=2)\n"
    assert fill("x = dict(a=1, **MORE_HERE)\n", MORE={}) == "x = dict(a=1)\n"


def test_a_hole_without_a_value_is_an_error() -> None:
    with pytest.raises(KeyError, match="A"):
        fill("x = A_HERE\n")


def test_a_part_gives_up_its_docstring_and_imports() -> None:
    tokenizer = part("tokenizer")
    assert tokenizer.text.startswith("tokenizer = dict(")
    assert tokenizer.modules == {"AutoTokenizer": "transformers"}
    assert expression(Fragment("x = f(a)\n", {})) == "f(a)"


def test_names_read_leaves_builtins_out() -> None:
    assert names_in("x = int(a) + b + a") == ({"a", "b"}, {"x"})


def test_imports_are_sorted_as_ruff_sorts_them() -> None:
    modules = {"torch": "", "b_fn": "m", "AClass": "m", "CONST": "m", "load": "datasets"}
    assert import_lines(set(modules), modules) == (
        "import torch\nfrom datasets import load\nfrom m import CONST, AClass, b_fn\n"
    )

"""The tools of a chat read what they are given and never run it."""

from __future__ import annotations

import pytest

from xtuner.tools.plugins import make_runner
from xtuner.tools.plugins.calculate import calculate
from xtuner.tools.plugins.calls import read_calls
from xtuner.tools.plugins.search import search
from xtuner.tools.plugins.solve import solve
from xtuner.utils.errors import UserError


@pytest.mark.parametrize(
    ("expression", "value"),
    [("1+2*3", "7.00"), ("2^10", "1024.00"), ("sqrt(2)", "1.41"), ("-(3 - 5) / 3", "0.67")],
)
def test_calculate(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["__import__('os').system('true')", "9**9**9**9", "1/0", "(1).__class__", "x", "", "1" * 5000],
)
def test_calculate_refuses(expression):
    with pytest.raises(UserError, match="cannot calculate"):
        calculate(expression)


@pytest.mark.parametrize(
    ("equations", "solution"),
    [("x^2=4", "[-2, 2]"), ("2x+1=7", "[3]"), ("x+y=3, x-y=1", "{x: 2, y: 1}"), ("x-5", "[5]")],
)
def test_solve(equations, solution):
    assert solve(equations) in (solution, f"[{solution}]") or solution in solve(equations)


@pytest.mark.parametrize(
    "equations", ["__import__('os')=1", "x.__class__=2", "1=1", "x^(10^9)=1", "x==", "a=b=c"]
)
def test_solve_refuses(equations):
    if equations == "x==":
        assert solve(equations) == "[0]"
        return
    with pytest.raises(UserError, match="cannot solve"):
        solve(equations)


def test_search_without_a_key(monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    with pytest.raises(UserError, match="needs a key"):
        search("anything")


def test_calls_of_a_model():
    text = 'Calculate((1+2)*3), Solve("x^2=4"), Unknown(1)'
    assert list(read_calls(text)) == [
        ("Calculate", "(1+2)*3"),
        ("Solve", "x^2=4"),
        ("Unknown", "1"),
    ]
    results = make_runner(["calculate"])(text)
    assert "Calculate((1+2)*3) => 9.00\n" in results
    assert "there is no tool Solve" in results and "there is no tool Unknown" in results
    assert make_runner(["calculate"])("Calculator(1+1)") == "Calculator(1+1) => 2.00\n"  # D11
    assert make_runner(["calculate"])("None") == "None\n"

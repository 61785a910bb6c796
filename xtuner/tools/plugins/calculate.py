"""The calculator: arithmetic read as a syntax tree and computed, never run as code."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

MAX_LENGTH = 1000

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(math, name)
    for name in ("sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tan", "floor", "ceil")
} | {"abs": abs, "round": round, "min": min, "max": max}
_CONSTANTS = {"pi": math.pi, "e": math.e}


def calculate(expression: str) -> str:
    """The value of an expression, to two decimals; ``^`` is the power.

    Raises:
        UserError: when it is no arithmetic, or has no finite value.
    """
    text = expression.replace("^", "**").replace("×", "*").replace("÷", "/").strip()
    try:
        if len(text) > MAX_LENGTH:
            raise ValueError("too long")
        value = float(_value(ast.parse(text, mode="eval").body))
        if not math.isfinite(value):
            raise ValueError("not finite")
    except (ValueError, SyntaxError, TypeError, ArithmeticError, RecursionError) as error:
        raise UserError(
            tr("cannot calculate {expression!r}: {error}", expression=expression, error=error)
        ) from error
    return f"{value:.2f}"


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return float(_OPERATORS[type(node.op)](_value(node.operand)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return math.pow(_value(node.left), _value(node.right))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return float(_OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        function = _FUNCTIONS.get(node.func.id)
        if function is not None:
            return float(function(*map(_value, node.args)))
    raise ValueError(tr("not an arithmetic expression"))

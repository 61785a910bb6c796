"""The equation solver: a syntax tree turned into sympy's objects, never run as code."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any

from xtuner.utils.errors import UserError, require
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from sympy import Expr

MAX_LENGTH = 300
MAX_POWER = 20
_FUNCTIONS = ("sqrt", "exp", "log", "sin", "cos", "tan", "Abs")


def solve(equations: str) -> str:
    """Solve one or several equations, separated by commas.

    Args:
        equations: for example ``x^2=4`` or ``x+y=3, x-y=1``; without ``=`` it is set to zero.

    Returns:
        The solutions as sympy writes them, for example ``[-2, 2]``.

    Raises:
        UserError: when they cannot be read or solved.
    """
    require("sympy", extra="all", purpose="Solve")
    import sympy

    try:
        if len(equations) > MAX_LENGTH:
            raise ValueError(tr("too long"))
        sides = [_difference(equation) for equation in equations.split(",") if equation.strip()]
        unknowns = sorted({symbol for side in sides for symbol in side.free_symbols}, key=str)
        if not unknowns:
            raise ValueError(tr("there is no variable to solve for"))
        solution = sympy.solve(sides if len(sides) > 1 else sides[0], unknowns)
    except (ValueError, SyntaxError, TypeError, NotImplementedError, RecursionError) as error:
        raise UserError(
            tr("cannot solve {equations!r}: {error}", equations=equations, error=error)
        ) from error
    return str(solution)


def _difference(equation: str) -> Any:
    """Left side minus right side."""
    text = re.sub(r"(?<=\d)(?=[A-Za-z(])", "*", equation.replace("^", "**").replace("==", "="))
    left, _, right = text.strip().partition("=")
    if "=" in right:
        raise ValueError(tr("more than one '='"))
    return _expression(left) - _expression(right or "0")


def _expression(text: str) -> Any:
    return _convert(ast.parse(text.strip(), mode="eval").body)


def _convert(node: ast.AST) -> Any:
    import sympy

    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return sympy.nsimplify(str(node.value))
    if isinstance(node, ast.Name) and node.id.isalpha() and len(node.id) <= 8:
        return sympy.pi if node.id == "pi" else sympy.Symbol(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_convert(node.operand)
    if isinstance(node, ast.BinOp):
        return _combine(node.op, _convert(node.left), _convert(node.right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1:
        name = "Abs" if node.func.id == "abs" else node.func.id
        if name in _FUNCTIONS:
            return getattr(sympy, name)(_convert(node.args[0]))
    raise ValueError(tr("not an equation"))


def _combine(operation: ast.operator, left: Expr, right: Expr) -> Expr:
    if isinstance(operation, ast.Add):
        return left + right
    if isinstance(operation, ast.Sub):
        return left - right
    if isinstance(operation, ast.Mult):
        return left * right
    if isinstance(operation, ast.Div):
        return left / right
    if isinstance(operation, ast.Pow):
        if right.is_number and abs(right) > MAX_POWER:
            raise ValueError(tr("the power is too large"))
        return left**right
    raise ValueError(tr("not an equation"))

"""Formulas of symbolic sizes, as a worker sends them for the shapes of a call's outputs.

Imports no framework.
"""

import ast
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

from bridge_wire.errors import ProtocolError

# Returns a size from named sizes of any type that computes, such as torch's symbolic ones.
Formula = Callable[[Mapping[str, Any]], Any]
Functions = Mapping[str, Callable[[Any, Any], Any]]

_LONGEST = 10_000
_MOST_POWER = 64
_OPERATORS: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.USub: operator.neg,
}


def formula(text: str, functions: Functions) -> Formula:
    """Return the function of an expression of the protocol's `Shape`.

    Args:
      functions: `max` and `min` for sizes of these types.
    Raises:
      ProtocolError: the text is no such expression.
    """
    every = {"floordiv": operator.floordiv, "mod": operator.mod, **functions}
    try:
        if len(text) > _LONGEST:
            raise ProtocolError(
                f"the formula of a size has {len(text)} characters; at most {_LONGEST} are read"
            )
        expression = text.replace("^", "**").strip()
        parsed = ast.parse(expression, mode="eval")
        return _read(parsed.body, every)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ProtocolError(
            f"the formula {text[:80]!r} of a size is not an expression"
        ) from error


def _read(node: ast.expr, functions: Functions) -> Formula:
    read = functools.partial(_read, functions=functions)
    match node:
        case ast.Constant(value=int() as number) if type(number) is int:
            return lambda sizes: number
        case ast.Name(id=name):
            return lambda sizes: sizes[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _applied(_OPERATORS[type(op)], [read(operand)])
        case ast.BinOp(
            left=base, op=ast.Pow(), right=ast.Constant(value=int() as exponent)
        ) if exponent <= _MOST_POWER:
            return _applied(lambda size: size**exponent, [read(base)])
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _applied(_OPERATORS[type(op)], [read(left), read(right)])
        case ast.Call(func=ast.Name(id=name), args=[left, right], keywords=[]) if (
            name in functions
        ):
            return _applied(functions[name], [read(left), read(right)])
    raise ProtocolError(
        f"the formula of a size contains {ast.unparse(node)[:80]!r}; expected integers, names, +,"
        " -, *, ^, and calls of floordiv, mod, max and min"
    )


def _applied(function: Callable[..., Any], operands: list[Formula]) -> Formula:
    return lambda sizes: function(*(operand(sizes) for operand in operands))

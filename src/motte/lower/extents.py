"""Size expressions (:mod:`motte.capture.sizes`) in any arithmetic: symbolic integers, or nodes of an ONNX graph."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Final, TypeVar

from motte.capture.graph import Extent
from motte.errors import GraphError

T = TypeVar("T")

_SIGNS: Final[dict[type[ast.operator], str]] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%",
}  # fmt: skip
EXTREMES: Final = ("max", "min")


def calculate(
    size: Extent, *, constant: Callable[[int], T], name: Callable[[str], T], operation: Callable[[str, T, T], T]
) -> T:
    """What ``size``, an extent of a **verified** graph, is in another arithmetic.

    Args:
        constant, name: what an integer and what a dimension are there.
        operation: applies one of ``+ - * // % max min``; ``//`` and ``%`` are Python's, which round down.

    Raises:
        GraphError: another operation.
    """
    if isinstance(size, int):
        return constant(size)

    def walk(node: ast.expr) -> T:
        match node:
            case ast.Constant(value=int(value)):
                return constant(value)
            case ast.Name(id=text):
                return name(text)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
                return constant(-value)
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return operation("-", constant(0), walk(inner))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _SIGNS:
                return operation(_SIGNS[type(op)], walk(left), walk(right))
            case ast.Call(func=ast.Name(id=text), args=[left, right]) if text in EXTREMES:
                return operation(text, walk(left), walk(right))
            case _:
                raise GraphError("not allowed in a size", where=size.text, got=ast.unparse(node)[:80])

    return walk(ast.parse(size.text, mode="eval").body)

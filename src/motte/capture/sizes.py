"""Arithmetic of sizes: what a dynamic dimension makes of a shape, without sympy and without ``eval``.

Grammar: integers, names of dimensions, ``+ - * // %``, unary minus, parentheses, ``max(a, b)`` and ``min(a, b)``.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from functools import lru_cache

from motte.capture.graph import DTYPE_BYTES, Extent, TensorType
from motte.errors import GraphError
from motte.limits import MAX_NAME_BYTES, MAX_TENSOR_BYTES

_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_CALLS: dict[str, Callable[[int, int], int]] = {"max": max, "min": min}
_MAX_VALUE = 1 << 62


# Nothing else reaches Python's parser: "1if x" would make it warn, and "~" or "." have no meaning here.
_CHARACTERS = re.compile(r"[a-z0-9_ +\-*/%(),]*")
_JOINED = re.compile(r"\d[a-z_]|\*\*")
_MAX_DEPTH = 64


@lru_cache(maxsize=4096)
def _parse(text: str) -> ast.expr:
    if len(text) > MAX_NAME_BYTES:
        raise GraphError(
            "size expression too long", expected=f"at most {MAX_NAME_BYTES} characters", got=str(len(text))
        )
    if not _CHARACTERS.fullmatch(text) or _JOINED.search(text):
        raise GraphError("not a size expression", got=repr(text)[:80])
    try:
        parsed = ast.parse(text, mode="eval").body
        _bound_depth(parsed)
        return parsed
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
        raise GraphError("not a size expression", got=repr(text)[:80]) from problem


def _bound_depth(expression: ast.expr) -> None:
    # Whatever walks an expression recurses; a deep one never gets that far.
    level: list[ast.AST] = [expression]
    for _ in range(_MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return
    raise GraphError("size expression nested too deeply", expected=f"at most {_MAX_DEPTH} levels")


def evaluate(size: Extent, dims: Mapping[str, int]) -> int:
    """The integer that ``size`` stands for when the named dimensions have the values ``dims``.

    Raises:
        GraphError: another operation, an unknown name, a division by zero or a number beyond 2^62.
    """
    if isinstance(size, int):
        return size

    def walk(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(value)) if type(value) is int:
                result = value
            case ast.Name(id=name) if name in dims:
                result = dims[name]
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                result = -walk(inner)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                a, b = walk(left), walk(right)
                if b == 0 and isinstance(op, ast.FloorDiv | ast.Mod):
                    raise GraphError("division by zero in a size", where=size.text)
                result = _BINARY[type(op)](a, b)
            case ast.Call(func=ast.Name(id=name), args=[a_node, b_node], keywords=[]) if name in _CALLS:
                result = _CALLS[name](walk(a_node), walk(b_node))
            case _:
                raise GraphError("not allowed in a size", where=size.text, got=ast.unparse(node)[:80])
        if abs(result) > _MAX_VALUE:
            raise GraphError("size too large", where=size.text)
        return result

    return walk(_parse(size.text))


def shape_of(type_: TensorType, dims: Mapping[str, int]) -> tuple[int, ...]:
    """The concrete shape.

    Raises:
        GraphError: a negative extent.
    """
    shape = tuple(evaluate(extent, dims) for extent in type_.shape)
    if any(extent < 0 for extent in shape):
        raise GraphError("negative extent", got=str(shape))
    return shape


def bytes_of(type_: TensorType, dims: Mapping[str, int]) -> int:
    """Bytes of a contiguous tensor of this type.

    Raises:
        GraphError: more than ``MAX_TENSOR_BYTES``.
    """
    count = DTYPE_BYTES[type_.dtype]
    for extent in shape_of(type_, dims):
        count *= extent
    if count > MAX_TENSOR_BYTES:
        raise GraphError("tensor too large", expected=f"at most {MAX_TENSOR_BYTES} bytes", got=f"{count} bytes")
    return count

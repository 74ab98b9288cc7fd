"""torch's symbolic sizes -> the size expressions of a graph (:mod:`motte.capture.sizes`). Imports torch and sympy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.utils._sympy import functions

from motte.capture.graph import Extent, Size
from motte.errors import CaptureError
from motte.limits import MAX_NAME_BYTES

_FLOOR_DIVISIONS = (functions.FloorDiv, functions.CleanDiv)
_REMAINDERS = (functions.PythonMod, functions.Mod, sympy.Mod)
_EXTREMES = ((functions.Max, sympy.Max, "max"), (functions.Min, sympy.Min, "min"))
_MAX_POWER = 8


def extent(value: int | torch.SymInt, names: Mapping[sympy.Symbol, str]) -> Extent:
    """``value`` as an integer or as an expression over the named dimensions.

    Args:
        value: an int, or a symbolic one that export made.
        names: the dimension behind each symbol of export.

    Raises:
        CaptureError: it depends on the *values* of a tensor, or uses a function that sizes do not know.
    """
    if isinstance(value, int):
        return value
    expression = value.node.expr
    if expression.is_Integer:
        return int(expression)
    text = _text(expression, names)
    if len(text) > MAX_NAME_BYTES:
        raise CaptureError(
            "a size became too complicated", got=text[:80] + "...", hint="capture with this dimension static"
        )
    return Size(text)


def _text(expression: Any, names: Mapping[sympy.Symbol, str]) -> str:
    if expression.is_Integer:
        return str(int(expression)) if expression >= 0 else f"({int(expression)})"
    if expression.is_Symbol:
        if expression not in names:
            raise CaptureError(
                "a size depends on the values in a tensor",
                got=str(expression),
                hint="shapes must follow from the shapes of the inputs; replace nonzero, item() and boolean masks "
                "that select elements by where() or multiplication",
            )
        return names[expression]
    parts = [_text(argument, names) for argument in expression.args]
    if expression.is_Add:
        return "(" + " + ".join(parts) + ")"
    if expression.is_Mul and not any(argument.is_Rational and not argument.is_Integer for argument in expression.args):
        return "*".join(parts)
    if expression.is_Pow and expression.exp.is_Integer and 2 <= expression.exp <= _MAX_POWER:
        return "*".join([parts[0]] * int(expression.exp))
    if isinstance(expression, _FLOOR_DIVISIONS):
        return f"({parts[0]} // {parts[1]})"
    if isinstance(expression, _REMAINDERS):
        return f"({parts[0]} % {parts[1]})"
    for ours, theirs, name in _EXTREMES:
        if isinstance(expression, (ours, theirs)):
            text = parts[0]
            for part in parts[1:]:
                text = f"{name}({text}, {part})"
            return text
    raise CaptureError(
        "a size uses a function that graphs do not know",
        got=str(expression)[:120],
        hint="capture with the dynamic dimension that it depends on static",
    )

"""A graph -> ONNX through ``torch.export``, without its weights. Imports torch and onnxscript.

The graph's nodes run once on fake tensors, weights being inputs like any other: whatever the exporter does, it cannot
store or fold a weight's value, since it is never given one. A weight has its **stored** shape, dimensions in memory
order, and is permuted back where it is read.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import onnx_ir as ir
import sympy
import torch
from onnx_ir.passes.common import InlinePass
from torch import nn
from torch.export import Dim as ExportDim

from motte.capture import tensors
from motte.capture.graph import Arg, DType, Extent, Graph, MemoryFormat, Node, Ref, Size, Weight, WeightRef
from motte.capture.ops import OPS
from motte.capture.sizes import shape_of
from motte.capture.symbols import extent
from motte.engines.checks import used_weights
from motte.errors import CaptureError
from motte.lower.extents import calculate
from motte.lower.spellings import SPELLINGS

OPSET: Final = 18
"""The version of ONNX's operators that the exporter's translations are written in; no conversion comes behind them."""

_ARITHMETIC: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "%": operator.mod,
    "max": torch.sym_max, "min": torch.sym_min,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Traced:
    """A whole graph as ONNX, unoptimised, with the graph's own words for its values.

    Attributes:
        graph: nodes of ONNX's own operators only; functions are inlined.
        values: the ONNX value behind each graph input and each value asked for; several may have the same one.
        weights: the names of the weights by their ONNX values.
        numbers: ONNX values that are one integer, a size.
        extents: what each symbolic size that torch may print is in the graph's grammar.
    """

    graph: ir.Graph
    values: Mapping[str, ir.Value]
    weights: Mapping[ir.Value, str]
    numbers: Mapping[ir.Value, Extent]
    extents: Mapping[str, Extent] = field(repr=False)

    def shape(self, value: ir.Value) -> tuple[Extent, ...] | None:
        """The shape of an ONNX value; None where it is not known in the graph's grammar."""
        if value.shape is None:
            return None
        found = [dim if isinstance(dim, int) else self.extents.get(str(dim.value)) for dim in value.shape]
        return None if None in found else tuple(extent for extent in found if extent is not None)


def trace(graph: Graph, names: tuple[str, ...], sizes: Mapping[str, int], *, dynamic: bool = True) -> Traced:
    """Export ``graph`` (a **verified** one); its weights are not read.

    Args:
        names: the values that are wanted, inputs or results of nodes; at least one.
        sizes: a value of every dimension to trace with, at least 2 where it may vary (torch takes 1 for a constant).
        dynamic: whether dimensions stay dynamic; otherwise they are fixed at ``sizes``.

    Raises:
        Exception: whatever the exporter raises; :func:`reason` puts it in a line.
    """
    fixed = {dim.name: sizes[dim.name] for dim in graph.dims if not dynamic or dim.low == dim.high}
    # `low` itself: torch knows that nothing is smaller than 0, and needs a range with room.
    free = {dim.name: ExportDim(dim.name, min=dim.low, max=dim.high) for dim in graph.dims if dim.name not in fixed}
    weights = [graph.weights[name] for name in used_weights(graph)]
    shapes = [shape_of(value.type, sizes) for value in graph.inputs] + [stored_shape(weight) for weight in weights]
    # Memory that is never touched takes none.
    example = tuple(
        torch.empty(shape, dtype=tensors.DTYPES[dtype])
        for shape, dtype in zip(
            shapes, [*(v.type.dtype for v in graph.inputs), *(w.dtype for w in weights)], strict=True
        )
    )
    dynamic_shapes = tuple(
        {axis: _dynamic(size, free, fixed) for axis, size in enumerate(value.type.shape) if isinstance(size, Size)}
        for value in graph.inputs
    ) + ({},) * len(weights)
    with quiet():
        program = torch.export.export(
            _Straight(graph, names, fixed).eval(), example, dynamic_shapes=(dynamic_shapes,), strict=False
        )
        made = torch.onnx.export(program, (), dynamo=True, optimize=False, verbose=False, opset_version=OPSET)
        if made is None:
            raise RuntimeError("the exporter gave nothing")
        return _describe(made, graph, names)


def reason(problem: BaseException) -> str:
    """What an exception of the exporter says, in one line: the operation, if it is known, and its own words."""
    op, innermost = "", problem
    while True:
        op = op or str(innermost).partition("target=torch.ops.")[2].partition("]")[0]
        if innermost.__cause__ is None:
            break
        innermost = innermost.__cause__
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip()]
    words = f"{type(innermost).__name__}: {lines[0]}" if lines else type(innermost).__name__
    text = f"{op}: {words}" if op else words
    return "".join(char if char.isprintable() else " " for char in text)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what the exporter, its optimisers and torch say about their own internals from the user."""
    roots = ("torch", "onnxscript", "onnx_ir", "onnx")
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in roots]
    loggers = [logging.getLogger(name) for name in names]
    states = [logger.disabled for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger, state in zip(loggers, states, strict=True):
                logger.disabled = state


class _Straight(nn.Module):
    """Runs the nodes of a graph in order, on its inputs and behind them the weights that it reads, as stored."""

    def __init__(self, graph: Graph, names: tuple[str, ...], fixed: Mapping[str, int]) -> None:
        super().__init__()
        self._graph, self._names, self._fixed = graph, names, fixed
        self._weights = [graph.weights[name] for name in used_weights(graph)]

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Every value asked for."""
        count = len(self._graph.inputs)
        found = _Held(
            dict(zip((value.name for value in self._graph.inputs), given, strict=False)),
            {weight.name: _shaped(stored, weight) for weight, stored in zip(self._weights, given[count:], strict=True)},
            dict(self._fixed),
        )
        for value, tensor in zip(self._graph.inputs, given, strict=False):
            for axis, size in enumerate(value.type.shape):
                if isinstance(size, Size) and size.text.isidentifier():
                    found.dims.setdefault(size.text, tensor.shape[axis])
        for node in self._graph.nodes:
            found.values.update(_run(node, found))
        return tuple(found.values[name] for name in self._names)


@dataclass(frozen=True, slots=True)
class _Held:
    """What a node may read, by name."""

    values: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    dims: dict[str, Any]


def _run(node: Node, held: _Held) -> dict[str, torch.Tensor]:
    call = SPELLINGS.get(node.op, tensors.overload(node.op))
    args = [_plain(arg, held) for arg in node.args]
    kwargs = {key: _plain(arg, held) for key, arg in node.kwargs.items()}
    result = call(*args, **kwargs)
    spec = OPS[node.op]
    results = [result] if spec.results == 1 and not spec.returns_list else list(result)
    return {value.name: tensor for value, tensor in zip(node.outputs, results, strict=True) if value is not None}


def _plain(arg: Arg, held: _Held) -> Any:
    match arg:
        case Ref(name=name):
            return held.values[name]
        case WeightRef(name=name):
            return held.weights[name]
        case Size():
            return calculate(
                arg, constant=int, name=held.dims.__getitem__, operation=lambda sign, a, b: _ARITHMETIC[sign](a, b)
            )
        case DType() | MemoryFormat():
            return tensors.plain_argument(arg)
        case tuple():
            return [_plain(item, held) for item in arg]
        case _:
            return arg


def stored_shape(weight: Weight) -> tuple[int, ...]:
    """The extents of ``weight`` in memory order."""
    return tuple(weight.shape[dim] for dim in weight.order)


def _shaped(stored: torch.Tensor, weight: Weight) -> torch.Tensor:
    back = sorted(range(len(weight.order)), key=weight.order.__getitem__)
    return stored if back == list(range(len(back))) else stored.permute(back)


def _dynamic(size: Size, free: Mapping[str, Any], fixed: Mapping[str, int]) -> Any:
    if size.text in fixed or not free:
        return None
    # An extent that is an expression follows from the dimensions that stand alone elsewhere.
    return free.get(size.text, ExportDim.AUTO)


def _describe(made: torch.onnx.ONNXProgram, graph: Graph, names: tuple[str, ...]) -> Traced:
    """The graph's words for what the exporter made."""
    model, program = made.model, made.exported_program
    if program is None:
        raise RuntimeError("the exporter does not say what it exported")
    InlinePass()(model)
    shown = {node.name: node.meta.get("val") for node in program.graph.nodes}
    symbols: dict[sympy.Symbol, str] = {}
    for value, name in zip(graph.inputs, program.graph_signature.user_inputs, strict=False):
        for axis, size in enumerate(value.type.shape):
            found = shown[name].shape[axis]
            if isinstance(size, Size) and size.text.isidentifier() and isinstance(found, torch.SymInt):
                symbols[found.node.expr] = size.text
    extents: dict[str, Extent] = {}
    for item in shown.values():
        _collect(item, symbols, extents)
    numbers = {}
    for output in (output for node in model.graph for output in node.outputs):
        number = shown.get(output.name or "")
        if isinstance(number, torch.SymInt) and str(number.node) in extents:
            numbers[output] = extents[str(number.node)]
    given = [*(value.name for value in graph.inputs), *used_weights(graph)]
    inputs = dict(enumerate(zip(given, model.graph.inputs, strict=True)))
    count = len(graph.inputs)
    values = {name: value for index, (name, value) in inputs.items() if index < count}
    values.update(zip(names, model.graph.outputs, strict=True))
    weights = {value: name for index, (name, value) in inputs.items() if index >= count}
    return Traced(model.graph, values, weights, numbers, extents)


def _collect(value: Any, symbols: Mapping[sympy.Symbol, str], extents: dict[str, Extent]) -> None:
    """Note what each symbolic size of ``value`` (a tensor, a size, or several) is in the graph's grammar."""
    if isinstance(value, torch.Tensor):
        for size in value.shape:
            _collect(size, symbols, extents)
    elif isinstance(value, tuple | list):
        for item in value:
            _collect(item, symbols, extents)
    elif isinstance(value, torch.SymInt) and str(value.node) not in extents:
        # A size that the grammar cannot say stays what the exporter made of it.
        with contextlib.suppress(CaptureError):
            extents[str(value.node)] = extent(value, symbols)

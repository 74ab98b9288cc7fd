"""The rules that a graph must keep, one function each. Whatever reads or makes a graph runs them all. Needs no torch.

Rules R1 to R8 are those of docs/spec/graph.md.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterator
from typing import Final

from motte.capture.graph import (
    DTYPE_BYTES,
    Arg,
    DType,
    Extent,
    Graph,
    MemoryFormat,
    Node,
    Ref,
    Size,
    TensorType,
    Value,
    WeightRef,
    references,
)
from motte.capture.ops import ABSENT, FORCED, OPS, OpSpec, Parameter
from motte.capture.sizes import evaluate
from motte.errors import GraphError
from motte.limits import (
    MAX_DIM_SIZE,
    MAX_GRAPH_DIMS,
    MAX_GRAPH_NODES,
    MAX_GRAPH_WEIGHTS,
    MAX_LIST_ITEMS,
    MAX_NAME_BYTES,
    MAX_TENSOR_BYTES,
)

MEMORY_FORMATS: Final = ("contiguous", "preserve", "channels_last", "channels_last_3d")
_DIM_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_MAX_INT: Final = (1 << 63) - 1


def check_graph(graph: Graph) -> None:
    """Check every rule on an **unverified** graph.

    Raises:
        GraphError: the first rule that it breaks.
    """
    for rule in RULES:
        rule(graph)


def check_name(name: object, where: str) -> None:
    """A name is printable, not empty, without spaces, and at most ``MAX_NAME_BYTES`` of UTF-8.

    Raises:
        GraphError: it is not.
    """
    good = isinstance(name, str) and name != "" and name.isprintable() and " " not in name
    if not good or len(str(name).encode()) > MAX_NAME_BYTES:
        expected = f"1 to {MAX_NAME_BYTES} bytes, no spaces"
        raise GraphError("not a name", where=where, got=repr(name)[:80], expected=expected)


def check_dim_name(name: object) -> None:
    """The name of a dynamic dimension: lower-case letters, digits and underscores, no word of the size grammar.

    Raises:
        GraphError: another name.
    """
    if not isinstance(name, str) or not _DIM_NAME.fullmatch(name) or keyword.iskeyword(name) or name in ("max", "min"):
        raise GraphError("not a name of a dimension", got=repr(name)[:80], expected="lower-case letters, digits and _")


def rule_bounds(graph: Graph) -> None:
    """R1: the counts of everything are within the limits."""
    counts = (
        ("nodes", len(graph.nodes), MAX_GRAPH_NODES),
        ("weights", len(graph.weights), MAX_GRAPH_WEIGHTS),
        ("dimensions", len(graph.dims), MAX_GRAPH_DIMS),
        ("inputs", len(graph.inputs), MAX_LIST_ITEMS),
        ("outputs", len(graph.outputs), MAX_LIST_ITEMS),
    )
    for what, count, bound in counts:
        if count > bound:
            raise GraphError(f"too many {what}", expected=f"at most {bound}", got=str(count))
    for node in graph.nodes:
        if len(node.outputs) > MAX_LIST_ITEMS:
            raise GraphError("too many results", where=node.name, expected=f"at most {MAX_LIST_ITEMS}")


def rule_names(graph: Graph) -> None:
    """R2: names are well formed; values have different names, and so have nodes, dimensions, weights and outputs."""
    check_name(graph.name, "name")
    for node in graph.nodes:
        check_name(node.name, "nodes")
        for text, what in ((node.module, "module"), (node.source, "source")):
            if len(text.encode("utf-8", "replace")) > MAX_NAME_BYTES or not text.isprintable():
                raise GraphError(f"not a {what}", where=node.name, got=repr(text)[:80])
    groups = (
        ("dimension", [dim.name for dim in graph.dims]),
        ("value", [value.name for value in _defined(graph)]),
        ("node", [node.name for node in graph.nodes]),
        ("weight", [name for weight in graph.weights.values() for name in (weight.name, *weight.aliases)]),
        ("output", list(graph.output_names)),
    )
    for what, names in groups:
        seen: set[str] = set()
        for name in names:
            check_name(name, what)
            if name in seen:
                raise GraphError(f"two of one name: {what}", got=name)
            seen.add(name)


def rule_dims(graph: Graph) -> None:
    """R3: dimensions have a legal name and a range 1 <= low <= high <= ``MAX_DIM_SIZE``."""
    for dim in graph.dims:
        check_dim_name(dim.name)
        if not 1 <= dim.low <= dim.high <= MAX_DIM_SIZE:
            raise GraphError("not a range", where=f"dimension {dim.name}", got=f"{dim.low} to {dim.high}")


def rule_types(graph: Graph) -> None:
    """R4: every value has a known element type, at most ``MAX_GRAPH_DIMS`` dimensions, and extents that make sense."""
    for value in _defined(graph):
        _check_type(graph, value.type, value.name)


def rule_weights(graph: Graph) -> None:
    """R5: weights are listed under their own name; type, order and slice are consistent; none is too large."""
    for key, weight in graph.weights.items():
        where = f"weight {key}"
        if key != weight.name:
            raise GraphError("weight listed under another name", where=where, got=weight.name)
        _check_type(graph, TensorType(weight.dtype, weight.shape), where)
        if any(not isinstance(extent, int) for extent in weight.shape):
            raise GraphError("a weight's shape is fixed", where=where)
        if sorted(weight.order) != list(range(len(weight.shape))):
            raise GraphError("not an order of the dimensions", where=where, got=str(weight.order))
        if weight.bytes > MAX_TENSOR_BYTES:
            bound = f"at most {MAX_TENSOR_BYTES} bytes"
            raise GraphError("weight too large", where=where, expected=bound, got=str(weight.bytes))
        part = weight.slice
        if part is None:
            continue
        check_name(part.source, where)
        fits = 0 <= part.axis < len(weight.shape) and 0 <= part.start < part.stop <= MAX_DIM_SIZE
        if not fits or weight.shape[part.axis] != part.stop - part.start:
            found = f"{part.axis}: {part.start} to {part.stop}"
            raise GraphError("slice does not fit the weight", where=where, got=found)


def rule_order(graph: Graph) -> None:
    """R6: what a node reads is an input, an earlier result or a listed weight."""
    known = {value.name for value in graph.inputs}
    for node in graph.nodes:
        for ref in references(node):
            if isinstance(ref, Ref) and ref.name not in known:
                raise GraphError("read before it is defined", where=node.name, got=ref.name)
            if isinstance(ref, WeightRef) and ref.name not in graph.weights:
                raise GraphError("no such weight", where=node.name, got=ref.name)
        known.update(value.name for value in node.outputs if value is not None)


def rule_operations(graph: Graph) -> None:
    """R7: operations are in the table; arguments and results fit the schema; nothing is random or writes."""
    for node in graph.nodes:
        spec = OPS.get(node.op)
        if spec is None:
            raise GraphError("operation not in the table", where=node.name, got=node.op[:80])
        bound = _bind(node, spec)
        for parameter in spec.parameters:
            if parameter.name in bound:
                _check_argument(graph, node, spec, parameter, bound[parameter.name])
        _check_pure(node, bound)
        if spec.returns_list:
            good = len(node.outputs) >= 1
        else:
            good = len(node.outputs) == spec.results
        if not good:
            expected = "at least 1" if spec.returns_list else str(spec.results)
            raise GraphError("wrong number of results", where=node.name, expected=expected, got=str(len(node.outputs)))


def rule_outputs(graph: Graph) -> None:
    """R8: there is an output; each is a value, and each has a name."""
    known = {value.name for value in _defined(graph)}
    if not graph.outputs or len(graph.outputs) != len(graph.output_names):
        expected = f"{len(graph.outputs)}, not 0"
        raise GraphError("outputs and their names do not match", expected=expected, got=str(len(graph.output_names)))
    for name in graph.outputs:
        if name not in known:
            raise GraphError("no such value", where="outputs", got=repr(name)[:80])


RULES: Final[tuple[Callable[[Graph], None], ...]] = (
    rule_bounds,
    rule_names,
    rule_dims,
    rule_types,
    rule_weights,
    rule_order,
    rule_operations,
    rule_outputs,
)


def _defined(graph: Graph) -> Iterator[Value]:
    yield from graph.inputs
    for node in graph.nodes:
        yield from (value for value in node.outputs if value is not None)


def _check_type(graph: Graph, type_: TensorType, where: str) -> None:
    if type_.dtype not in DTYPE_BYTES:
        raise GraphError("unknown element type", where=where, got=repr(type_.dtype)[:80])
    if len(type_.shape) > MAX_GRAPH_DIMS:
        bound = f"at most {MAX_GRAPH_DIMS}"
        raise GraphError("too many dimensions", where=where, expected=bound, got=str(len(type_.shape)))
    for extent in type_.shape:
        _check_extent(graph, extent, where)


def _check_extent(graph: Graph, extent: Extent, where: str) -> None:
    # Evaluated at the largest sizes only: smaller ones may be illegal for a reason that running finds.
    try:
        value = evaluate(extent, {dim.name: dim.high for dim in graph.dims})
    except GraphError as problem:
        raise GraphError(problem.message, where=where, expected=problem.expected, got=problem.got) from problem
    if not 0 <= value <= MAX_TENSOR_BYTES:
        raise GraphError("not an extent", where=where, got=str(value))


# --- arguments ------------------------------------------------------------------------------------------------------


def _bind(node: Node, spec: OpSpec) -> dict[str, Arg]:
    positional = [parameter for parameter in spec.parameters if not parameter.keyword_only]
    if len(node.args) > len(positional):
        raise GraphError(
            "too many arguments", where=node.name, expected=f"at most {len(positional)}", got=str(len(node.args))
        )
    bound: dict[str, Arg] = {parameter.name: arg for parameter, arg in zip(positional, node.args, strict=False)}
    names = {parameter.name for parameter in spec.parameters} - ABSENT
    for key, arg in node.kwargs.items():
        if key not in names or key in bound:
            raise GraphError("unknown or repeated argument", where=node.name, got=repr(key)[:80])
        bound[key] = arg
    needed = [item.name for item in spec.parameters if not item.has_default and item.name not in ABSENT]
    missing = [name for name in needed if name not in bound]
    if missing:
        raise GraphError("missing argument", where=node.name, expected=missing[0])
    return bound


def _check_argument(graph: Graph, node: Node, spec: OpSpec, parameter: Parameter, arg: Arg) -> None:
    first = parameter is spec.parameters[0]
    if isinstance(arg, tuple):
        if not parameter.is_list or len(arg) > MAX_LIST_ITEMS:
            raise _mismatch(node, parameter, arg)
        for item in arg:
            if item is None:
                good = parameter.item_optional
            else:
                good = _fits(graph, parameter.kind, item, numbers=False)
            if not good:
                raise _mismatch(node, parameter, item)
        return
    if arg is None:
        good = parameter.optional
    elif parameter.is_list:
        good = parameter.list_size is not None and _fits(graph, parameter.kind, arg, numbers=False)
    else:
        good = _fits(graph, parameter.kind, arg, numbers=not first)
    if not good:
        raise _mismatch(node, parameter, arg)


def _fits(graph: Graph, kind: str, arg: Arg, *, numbers: bool) -> bool:
    """Whether ``arg`` may stand for a parameter of ``kind``; ``numbers``: a number may stand for a tensor."""
    if isinstance(arg, Size):
        _check_extent_argument(graph, arg)
        return kind in ("SymInt", "int", "Scalar") or (kind == "Tensor" and numbers)
    if isinstance(arg, bool):
        return kind in ("bool", "Scalar") or (kind == "Tensor" and numbers)
    if isinstance(arg, int):
        allowed = kind in ("SymInt", "int", "Scalar", "float") or (kind == "Tensor" and numbers)
        return allowed and abs(arg) <= _MAX_INT
    if isinstance(arg, float):
        return kind in ("Scalar", "float") or (kind == "Tensor" and numbers)
    if isinstance(arg, str):
        return kind == "str" and len(arg.encode("utf-8", "replace")) <= MAX_NAME_BYTES
    if isinstance(arg, Ref | WeightRef):
        return kind == "Tensor"
    if isinstance(arg, DType):
        return kind == "ScalarType" and arg.name in DTYPE_BYTES
    if isinstance(arg, MemoryFormat):
        return kind == "MemoryFormat" and arg.name in MEMORY_FORMATS
    return False


def _check_extent_argument(graph: Graph, arg: Size) -> None:
    evaluate(arg, {dim.name: dim.high for dim in graph.dims})


def _mismatch(node: Node, parameter: Parameter, arg: Arg) -> GraphError:
    kind = parameter.kind + ("[]" if parameter.is_list else "") + ("?" if parameter.optional else "")
    return GraphError(
        "argument does not fit the operation", where=f"{node.name}, {parameter.name}", expected=kind, got=repr(arg)[:80]
    )


def _check_pure(node: Node, bound: dict[str, Arg]) -> None:
    for key, value in FORCED.items():
        if key in bound and bound[key] != value:
            raise GraphError("random operation", where=node.name, expected=f"{key}={value}", got=repr(bound[key])[:80])
    statistics = (bound.get("running_mean"), bound.get("running_var"))
    if node.op == "aten.instance_norm.default" and bound["use_input_stats"] is True and statistics != (None, None):
        raise GraphError("operation writes to its running statistics", where=node.name)

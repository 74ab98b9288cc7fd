"""A graph as text: strict, readable, versioned JSON, one node a line (docs/spec/graph.md). Needs no torch.

>>> loads(dumps(graph)) == graph  # doctest: +SKIP
True
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from motte.capture.checks import check_graph
from motte.capture.graph import (
    GRAPH_VERSION,
    Arg,
    Dim,
    DType,
    Extent,
    Graph,
    MemoryFormat,
    Node,
    Ref,
    Size,
    Slice,
    TensorType,
    Value,
    Weight,
    WeightRef,
)
from motte.digests import sha256
from motte.errors import GraphError
from motte.limits import (
    MAX_DIM_SIZE,
    MAX_GRAPH_DIMS,
    MAX_GRAPH_NODES,
    MAX_GRAPH_TEXT_BYTES,
    MAX_GRAPH_WEIGHTS,
    MAX_LIST_ITEMS,
    MAX_NAME_BYTES,
    MAX_TENSOR_BYTES,
)
from motte.strict_json import Fields, parse

_SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_Tagged = Ref | WeightRef | Size | DType | MemoryFormat
_TAGS: Mapping[str, Callable[[str], _Tagged]] = {
    "value": Ref,
    "weight": WeightRef,
    "size": Size,
    "dtype": DType,
    "format": MemoryFormat,
}


def dumps(graph: Graph) -> str:
    """The text of ``graph``; equal graphs have equal texts, on every machine."""
    lines = [
        f'{{"motte_graph": {GRAPH_VERSION},',
        f'"name": {_json(graph.name)},',
        f'"dims": {_json([[dim.name, dim.low, dim.high] for dim in graph.dims])},',
        f'"inputs": {_lines([_value_json(value) for value in graph.inputs])},',
        f'"weights": {_lines([_weight_json(weight) for weight in graph.weights.values()])},',
        f'"nodes": {_lines([_node_json(node) for node in graph.nodes])},',
        f'"outputs": {_lines([list(pair) for pair in zip(graph.outputs, graph.output_names, strict=True)])}}}',
    ]
    return "\n".join(lines) + "\n"


def digest(graph: Graph) -> str:
    """SHA-256 of the text of ``graph``, hexadecimal."""
    return sha256(dumps(graph).encode("ascii")).hex()


def loads(text: str | bytes) -> Graph:
    """Read **unverified** text, and check the graph that it holds against every rule.

    Raises:
        GraphError: the text does not follow docs/spec/graph.md, or the graph breaks a rule.
    """
    value = parse(text, max_bytes=MAX_GRAPH_TEXT_BYTES, what="graph", error=GraphError)
    fields = Fields(value, where="graph", error=GraphError)
    fields.integer("motte_graph", low=GRAPH_VERSION, high=GRAPH_VERSION)
    weights = fields.items("weights", max_items=MAX_GRAPH_WEIGHTS, read=_weight)
    outputs = fields.items("outputs", max_items=MAX_LIST_ITEMS, read=_output)
    graph = Graph(
        name=fields.text("name", max_bytes=MAX_NAME_BYTES),
        dims=tuple(fields.items("dims", max_items=MAX_GRAPH_DIMS, read=_dim)),
        inputs=tuple(fields.items("inputs", max_items=MAX_LIST_ITEMS, read=_value)),
        weights=_by_name(weights),
        nodes=tuple(fields.items("nodes", max_items=MAX_GRAPH_NODES, read=_node)),
        outputs=tuple(name for name, _ in outputs),
        output_names=tuple(label for _, label in outputs),
    )
    fields.done()
    check_graph(graph)
    return graph


# --- writing --------------------------------------------------------------------------------------------------------


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False)


def _lines(items: list[Any]) -> str:
    return "[]" if not items else "[\n" + ",\n".join(_json(item) for item in items) + "\n]"


def _extent_json(extent: Extent) -> int | str:
    return extent.text if isinstance(extent, Size) else extent


def _value_json(value: Value) -> list[Any]:
    return [value.name, value.type.dtype, [_extent_json(extent) for extent in value.type.shape]]


def _weight_json(weight: Weight) -> dict[str, Any]:
    body: dict[str, Any] = {
        "name": weight.name,
        "dtype": weight.dtype,
        "shape": list(weight.shape),
        "order": list(weight.order),
    }
    if weight.aliases:
        body["aliases"] = list(weight.aliases)
    if weight.slice is not None:
        body["slice"] = [weight.slice.source, weight.slice.axis, weight.slice.start, weight.slice.stop]
    return body


def _node_json(node: Node) -> dict[str, Any]:
    body: dict[str, Any] = {"name": node.name, "op": node.op, "args": [_arg_json(arg) for arg in node.args]}
    if node.kwargs:
        body["kwargs"] = {key: _arg_json(node.kwargs[key]) for key in sorted(node.kwargs)}
    body["outputs"] = [None if value is None else _value_json(value) for value in node.outputs]
    if node.module:
        body["module"] = node.module
    if node.source:
        body["source"] = node.source
    return body


def _arg_json(arg: Arg) -> Any:
    if isinstance(arg, tuple):
        return [_arg_json(item) for item in arg]
    if isinstance(arg, float) and not math.isfinite(arg):
        return {"float": "nan" if math.isnan(arg) else "inf" if arg > 0 else "-inf"}
    if isinstance(arg, Size):
        return {"size": arg.text}
    if isinstance(arg, Ref | WeightRef | DType | MemoryFormat):
        return {_TAG_OF[type(arg)]: arg.name}
    return arg


_TAG_OF = {Ref: "value", WeightRef: "weight", DType: "dtype", MemoryFormat: "format"}


# --- reading --------------------------------------------------------------------------------------------------------


def _list(value: object, where: str, length: int | None = None, most: int = MAX_LIST_ITEMS) -> list[Any]:
    if not isinstance(value, list) or len(value) > most or (length is not None and len(value) != length):
        expected = f"a list of {length}" if length is not None else f"a list of at most {most}"
        raise GraphError("not such a list", where=where, expected=expected, got=repr(value)[:80])
    return value


def _integer(value: object, where: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise GraphError("not an integer in range", where=where, expected=f"{low} to {high}", got=repr(value)[:80])
    return value


def _count(value: object, where: str) -> int:
    return _integer(value, where, 0, MAX_TENSOR_BYTES)


def _string(value: object, where: str) -> str:
    lone = isinstance(value, str) and any(0xD800 <= ord(char) <= 0xDFFF for char in value[: MAX_NAME_BYTES + 1])
    if not isinstance(value, str) or len(value) > MAX_NAME_BYTES or lone:
        raise GraphError("not a string", where=where, expected=f"at most {MAX_NAME_BYTES} bytes", got=repr(value)[:80])
    return value


def _dim(value: object, where: str) -> Dim:
    name, low, high = _list(value, where, 3)
    return Dim(_string(name, where), _integer(low, where, 1, MAX_DIM_SIZE), _integer(high, where, 1, MAX_DIM_SIZE))


def _extent(value: object, where: str) -> Extent:
    return Size(_string(value, where)) if isinstance(value, str) else _integer(value, where, 0, MAX_TENSOR_BYTES)


def _value(value: object, where: str) -> Value:
    name, dtype, shape = _list(value, where, 3)
    extents = tuple(_extent(extent, where) for extent in _list(shape, where, most=MAX_GRAPH_DIMS))
    return Value(_string(name, where), TensorType(_string(dtype, where), extents))


def _result(value: object, where: str) -> Value | None:
    return None if value is None else _value(value, where)


def _output(value: object, where: str) -> tuple[str, str]:
    name, label = _list(value, where, 2)
    return _string(name, where), _string(label, where)


def _weight(value: object, where: str) -> Weight:
    fields = Fields(value, where=where, error=GraphError)
    weight = Weight(
        name=fields.text("name", max_bytes=MAX_NAME_BYTES),
        dtype=fields.text("dtype", max_bytes=MAX_NAME_BYTES),
        shape=tuple(fields.items("shape", max_items=MAX_GRAPH_DIMS, read=_count)),
        order=tuple(fields.items("order", max_items=MAX_GRAPH_DIMS, read=_count)),
        aliases=tuple(fields.items("aliases", max_items=MAX_LIST_ITEMS, read=_string)) if fields.has("aliases") else (),
        slice=_slice(fields.any("slice"), f"{where}.slice") if fields.has("slice") else None,
    )
    fields.done()
    return weight


def _slice(value: object, where: str) -> Slice:
    source, axis, start, stop = _list(value, where, 4)
    return Slice(
        _string(source, where),
        _integer(axis, where, 0, MAX_GRAPH_DIMS),
        _integer(start, where, 0, MAX_DIM_SIZE),
        _integer(stop, where, 0, MAX_DIM_SIZE),
    )


def _by_name(weights: list[Weight]) -> Mapping[str, Weight]:
    found = {weight.name: weight for weight in weights}
    if len(found) != len(weights):
        raise GraphError("two of one name: weight", where="graph.weights")
    return found


def _node(value: object, where: str) -> Node:
    fields = Fields(value, where=where, error=GraphError)
    kwargs = fields.any("kwargs") if fields.has("kwargs") else {}
    if not isinstance(kwargs, dict) or len(kwargs) > MAX_LIST_ITEMS:
        raise GraphError("not an object", where=f"{where}.kwargs", got=repr(kwargs)[:80])
    node = Node(
        name=fields.text("name", max_bytes=MAX_NAME_BYTES),
        op=fields.text("op", max_bytes=MAX_NAME_BYTES),
        args=tuple(fields.items("args", max_items=MAX_LIST_ITEMS, read=_arg)),
        kwargs={_string(key, where): _arg(arg, f"{where}.kwargs") for key, arg in kwargs.items()},
        outputs=tuple(fields.items("outputs", max_items=MAX_LIST_ITEMS, read=_result)),
        module=fields.text("module", max_bytes=MAX_NAME_BYTES) if fields.has("module") else "",
        source=fields.text("source", max_bytes=MAX_NAME_BYTES) if fields.has("source") else "",
    )
    fields.done()
    return node


def _arg(value: object, where: str, *, inner: bool = False) -> Arg:
    if isinstance(value, list):
        if inner or len(value) > MAX_LIST_ITEMS:
            expected = f"one level of at most {MAX_LIST_ITEMS}"
            raise GraphError("a list too deep or too long", where=where, expected=expected)
        return tuple(_arg(item, where, inner=True) for item in value)
    if isinstance(value, dict):
        return _tagged(value, where)
    if isinstance(value, str):
        return _string(value, where)
    if isinstance(value, float) and not math.isfinite(value):
        raise GraphError("number too large", where=where, hint='infinity is {"float": "inf"}')
    if value is None or isinstance(value, bool | float):
        return value
    return _integer(value, where, -(1 << 63) + 1, (1 << 63) - 1)


def _tagged(value: dict[str, Any], where: str) -> Arg:
    if len(value) == 1:
        (tag, content), *_ = value.items()
        if tag == "float" and isinstance(content, str) and content in _SPECIAL:
            return _SPECIAL[content]
        if tag in _TAGS and isinstance(content, str):
            return _TAGS[tag](_string(content, where))
    expected = " ".join([*_TAGS, "float"])
    raise GraphError("unknown kind of argument", where=where, expected=expected, got=repr(value)[:80])

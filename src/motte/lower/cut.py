"""One part of a traced graph, or the whole, as ONNX messages without weights. Imports onnx_ir and onnxscript.

A part is what its outputs need, back to its inputs and weights. What a node needs of another part's tensor is at most
its size, and a size follows from the dynamic dimensions: it is computed anew from the shapes of the part's own inputs,
or where none of these has the dimension alone, from an extra input that carries it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript import optimizer

from motte.capture.graph import Extent, Graph, Size, TensorType, Weight
from motte.engines.checks import used_weights
from motte.engines.interface import OnnxProgram, dim_input
from motte.errors import UnsupportedError
from motte.lower.extents import calculate
from motte.lower.trace import OPSET, Traced, stored_shape

IR_VERSION = 10
"""Version of the file format; the first that has every element type here is 4, and every engine reads 10."""
LARGEST_FOLDED = 16_384
"""Elements of the largest constant that is computed ahead rather than where the program runs; those of a zero bias,
which then goes."""
_DTYPES = {
    "f64": ir.DataType.DOUBLE, "f32": ir.DataType.FLOAT, "f16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16,
    "i64": ir.DataType.INT64, "i32": ir.DataType.INT32, "i16": ir.DataType.INT16, "i8": ir.DataType.INT8,
    "u8": ir.DataType.UINT8, "bool": ir.DataType.BOOL,
}  # fmt: skip
_OPERATORS = {"+": "Add", "-": "Sub", "*": "Mul", "%": "Mod", "max": "Max", "min": "Min"}


def program(traced: Traced, graph: Graph) -> OnnxProgram:
    """The program of ``graph``: the traced graph itself, or a part of it.

    Raises:
        UnsupportedError: it needs a tensor that ``graph`` does not have.
    """
    part = _Cut(traced, graph)
    model = ir.Model(part.build(), ir_version=IR_VERSION)
    optimizer.optimize(model, input_size_limit=LARGEST_FOLDED, output_size_limit=LARGEST_FOLDED)
    ClearMetadataAndDocStringPass()(model)
    dims = _finish(model.graph, graph)
    others = sorted({node.domain for node in _every_node(model.graph)} - {""})
    if others:
        raise UnsupportedError("operators that are not ONNX's own", got=", ".join(others))
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    proto.producer_name = proto.producer_version = ""
    weights = [graph.weights[name] for name in used_weights(graph)]
    return OnnxProgram(
        core=proto.SerializeToString(deterministic=True),
        weight_inputs=_weight_inputs(weights).SerializeToString(deterministic=True),
        weight_initializers=_weight_initializers(weights).SerializeToString(deterministic=True),
        dims=dims,
    )


@dataclass(slots=True)
class _Found:
    """What the outputs need: nodes, and the values that come from elsewhere."""

    nodes: set[ir.Node] = field(default_factory=set)
    weights: dict[ir.Value, None] = field(default_factory=dict)
    sizes: dict[ir.Value, tuple[Extent, ...] | Extent] = field(default_factory=dict)
    constants: dict[ir.Value, None] = field(default_factory=dict)


class _Cut:
    """Cuts one graph out of the traced one."""

    def __init__(self, traced: Traced, graph: Graph) -> None:
        self._traced, self._graph = traced, graph
        self._given: dict[ir.Value, str] = {}
        for value in graph.inputs:
            self._given.setdefault(traced.values[value.name], value.name)

    def build(self) -> ir.Graph:
        """A graph of its own, with inputs, dimensions and weights as its inputs, in that order."""
        outputs = [self._traced.values[name] for name in self._graph.outputs]
        found = self._collect(outputs)
        # A weight or a constant may be an output itself.
        leaves = [*self._given, *found.weights, *found.sizes]
        nodes = [node for node in self._traced.graph if node in found.nodes]
        view = ir.GraphView(
            leaves,
            outputs,
            nodes=nodes,
            initializers=tuple(found.constants),
            opset_imports={"": OPSET},
            name="main",
        )
        cut = view.clone()
        copies = dict(zip(leaves, list(cut.inputs), strict=True))
        inputs = self._inputs(copies)
        sizes = _Sizes(cut, self._graph, inputs)
        for original, size in found.sizes.items():
            ir.convenience.replace_all_uses_with(copies[original], sizes.value(size), replace_graph_outputs=True)
        sizes.insert()
        weights = [self._weight(copies, value) for value in found.weights]
        cut.inputs[:] = [*inputs, *sizes.dims.values(), *weights]
        for index, output in enumerate(cut.outputs):
            if output in cut.inputs or output in cut.outputs[:index] or output.is_initializer():
                cut.outputs[index] = _identity(cut, output)
        return cut

    def _collect(self, outputs: Iterable[ir.Value]) -> _Found:
        found = _Found()
        seen: set[ir.Value] = set()
        waiting = list(reversed(list(outputs)))
        while waiting:
            value = waiting.pop()
            if value in seen or value in self._given:
                continue
            seen.add(value)
            size = self._size(value)
            node = value.producer()
            if value in self._traced.weights:
                name = self._traced.weights[value]
                if name not in self._graph.weights:
                    raise UnsupportedError("it reads a weight of another part", got=name)
                found.weights[value] = None
            elif size is not None:
                found.sizes[value] = size
            elif node is not None:
                found.nodes.add(node)
                waiting += list(_reads(node, self._traced.graph))
            elif value.const_value is not None:
                found.constants[value] = None
            else:
                raise UnsupportedError("it reads a tensor of another part", got=str(value.name))
        return found

    def _size(self, value: ir.Value) -> tuple[Extent, ...] | Extent | None:
        """What ``value`` is if it is only a size, or several: a number, or a vector of them."""
        if value in self._traced.numbers:
            return self._traced.numbers[value]
        node = value.producer()
        if node is None or node.op_type != "Shape" or node.domain != "" or node.inputs[0] is None:
            return None
        shape = self._traced.shape(node.inputs[0])
        if shape is None:
            return None
        start, end = (node.attributes.get(name) for name in ("start", "end"))
        return shape[start.as_int() if start else None : end.as_int() if end else None]

    def _inputs(self, copies: dict[ir.Value, ir.Value]) -> list[ir.Value]:
        inputs = []
        for value in self._graph.inputs:
            original = self._traced.values[value.name]
            # Two inputs may have been one tensor where they were made.
            own = self._given.get(original) == value.name
            copy = copies[original] if own else ir.Value()
            _declare(copy, value.name, value.type)
            inputs.append(copy)
        return inputs

    def _weight(self, copies: dict[ir.Value, ir.Value], value: ir.Value) -> ir.Value:
        weight = self._graph.weights[self._traced.weights[value]]
        _declare(copies[value], weight.name, TensorType(weight.dtype, stored_shape(weight)))
        return copies[value]


class _Sizes:
    """Computes sizes in the graph ``cut``, each once, as vectors of one int64 until they are used."""

    def __init__(self, cut: ir.Graph, graph: Graph, inputs: Sequence[ir.Value]) -> None:
        self.dims: dict[str, ir.Value] = {}
        self._cut, self._graph, self._inputs = cut, graph, inputs
        self._nodes: list[ir.Node] = []
        self._made: dict[object, ir.Value] = {}

    def insert(self) -> None:
        """Put the nodes in front of the graph's own; its inputs are in the order of its dimensions."""
        if len(self._cut):
            self._cut.insert_before(self._cut[0], self._nodes)
        else:
            self._cut.extend(self._nodes)
        self.dims = {dim.name: self.dims[dim.name] for dim in self._graph.dims if dim.name in self.dims}

    def value(self, size: tuple[Extent, ...] | Extent) -> ir.Value:
        """A vector of several sizes, or one as a number."""
        if isinstance(size, tuple):
            if all(isinstance(extent, int) for extent in size):
                return self._constant(np.array(size, np.int64))
            return self._node("Concat", [self._vector(extent) for extent in size], axis=0)
        if isinstance(size, int):
            return self._constant(np.array(size, np.int64))
        return self._node("Squeeze", [self._vector(size), self._constant(np.array([0], np.int64))])

    def _vector(self, size: Extent) -> ir.Value:
        return calculate(
            size,
            constant=lambda number: self._constant(np.array([number], np.int64)),
            name=self._dim,
            operation=self._operation,
        )

    def _operation(self, sign: str, a: ir.Value, b: ir.Value) -> ir.Value:
        if sign == "//":
            # ONNX divides towards zero, a size rounds down. Mod has the sign of the divisor, as here.
            return self._node("Div", [self._operation("-", a, self._operation("%", a, b)), b])
        return self._node(_OPERATORS[sign], [a, b])

    def _dim(self, name: str) -> ir.Value:
        for value, given in zip(self._graph.inputs, self._inputs, strict=True):
            for axis, extent in enumerate(value.type.shape):
                if isinstance(extent, Size) and extent.text == name:
                    return self._node("Shape", [given], start=axis, end=axis + 1)
        if name not in self.dims:
            self.dims[name] = ir.Value(name=dim_input(name), shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
        return self._node("Unsqueeze", [self.dims[name], self._constant(np.array([0], np.int64))])

    def _constant(self, array: np.ndarray) -> ir.Value:
        key = (array.shape, array.tobytes())
        if key not in self._made:
            self._made[key] = self._append(ir.node("Constant", [], {"value": ir.tensor(array)}))
        return self._made[key]

    def _node(self, op: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        key = (op, tuple(inputs), tuple(attributes.items()))
        if key not in self._made:
            self._made[key] = self._append(ir.node(op, inputs, attributes))
        return self._made[key]

    def _append(self, node: ir.Node) -> ir.Value:
        self._nodes.append(node)
        return node.outputs[0]


def _reads(node: ir.Node, graph: ir.Graph) -> Iterator[ir.Value]:
    """The values of ``graph`` that ``node`` reads, those inside its branches included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inner: Sequence[ir.Graph] = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            inner = attribute.as_graphs()
        else:
            continue
        for body in inner:
            for step in ir.traversal.RecursiveGraphIterator(body):
                yield from (value for value in step.inputs if value is not None and value.graph is graph)


def _every_node(graph: ir.Graph) -> Iterator[ir.Node]:
    return iter(ir.traversal.RecursiveGraphIterator(graph))


def _declare(value: ir.Value, name: str, type_: TensorType) -> None:
    value.name = name
    value.metadata_props.clear()
    value.type = ir.TensorType(_DTYPES[type_.dtype])
    value.shape = ir.Shape([size if isinstance(size, int) else size.text for size in type_.shape])


def _identity(graph: ir.Graph, value: ir.Value) -> ir.Value:
    node = ir.node("Identity", [value])
    graph.append(node)
    made = node.outputs[0]
    made.type, made.shape = value.type, value.shape
    return made


def _finish(cut: ir.Graph, graph: Graph) -> tuple[str, ...]:
    """Leave only inputs and dimensions that are read as inputs, name everything; the names of the dimensions."""
    given = {value.name for value in graph.inputs}
    weights = set(used_weights(graph))
    by_input = {dim_input(dim.name): dim.name for dim in graph.dims}
    for index, output in enumerate(cut.outputs):
        if output in cut.inputs or output in cut.outputs[:index] or output.producer() is None:
            cut.outputs[index] = _identity(cut, output)
    kept = [value for value in cut.inputs if value.name in given or (value.name in by_input and value.uses())]
    taken = given | weights | set(by_input)
    values = graph.values()
    for name, output in zip(graph.outputs, cut.outputs, strict=True):
        fresh = name
        while fresh in taken:
            fresh += "'"
        taken.add(fresh)
        _declare(output, fresh, values[name].type)
    _rename(cut, taken)
    cut.inputs[:] = kept
    return tuple(by_input[value.name] for value in kept if value.name in by_input)


def _rename(cut: ir.Graph, taken: set[str]) -> None:
    """Short names for what is neither input nor output, in order; none for nodes."""
    settled = {*cut.inputs, *cut.outputs}
    count = 0

    def fresh() -> str:
        nonlocal count
        count += 1
        while f"~{count}" in taken:
            count += 1
        # openvino calls tensors that it merges by the first of their names in order: "~" is behind every letter.
        return f"~{count}"

    constants = list(cut.initializers.values())
    cut.initializers.clear()
    for value in constants:
        value.name = fresh()
        cut.initializers.add(value)
    for node in _every_node(cut):
        node.name = ""
        for output in node.outputs:
            if output not in settled:
                output.name = fresh()


def _weight_inputs(weights: Sequence[Weight]) -> onnx.ModelProto:
    model = onnx.ModelProto()
    for weight in weights:
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(weight.name, int(_DTYPES[weight.dtype]), stored_shape(weight))
        )
    return model


def _weight_initializers(weights: Sequence[Weight]) -> onnx.ModelProto:
    model = onnx.ModelProto()
    for weight in weights:
        tensor = model.graph.initializer.add()
        tensor.name = weight.name
        tensor.dims.extend(stored_shape(weight))
        tensor.data_type = int(_DTYPES[weight.dtype])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (("location", "weights"), ("offset", "0"), ("length", str(weight.bytes))):
            tensor.external_data.add(key=key, value=text)
    return model

"""Lowered programs by hand: ONNX nodes for a small graph, whose inputs, outputs and weights say the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from motte.capture.graph import Graph, Node, Size, TensorType, Value, Weight
from motte.engines.checks import used_weights
from motte.engines.interface import OnnxProgram, dim_input

TYPES = {
    "f64": TensorProto.DOUBLE, "f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16,
    "i64": TensorProto.INT64, "i32": TensorProto.INT32, "i16": TensorProto.INT16, "i8": TensorProto.INT8,
    "u8": TensorProto.UINT8, "bool": TensorProto.BOOL,
}  # fmt: skip


def stored_shape(weight: Weight) -> list[int]:
    return [weight.shape[dim] for dim in weight.order]


def op(kind: str, reads: Sequence[str], *makes: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, list(reads), list(makes), **attributes)


def number(name: str, array: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def lowered(
    graph: Graph, nodes: Sequence[onnx.NodeProto], constants: Sequence[onnx.TensorProto] = (), dims: Sequence[str] = ()
) -> OnnxProgram:
    """``nodes`` make the graph's outputs, by name, from its inputs, ``dims`` and weights."""
    values = graph.values()
    inputs = [_info(value.name, value.type) for value in graph.inputs]
    inputs += [helper.make_tensor_value_info(dim_input(name), TensorProto.INT64, []) for name in dims]
    outputs = [_info(name, values[name].type) for name in graph.outputs]
    core = helper.make_model(
        helper.make_graph(list(nodes), "main", inputs, outputs, list(constants)),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    given, initial = onnx.ModelProto(), onnx.ModelProto()
    for name in used_weights(graph):
        weight = graph.weights[name]
        shape = stored_shape(weight)
        given.graph.input.append(helper.make_tensor_value_info(name, TYPES[weight.dtype], shape))
        tensor = initial.graph.initializer.add()
        tensor.name, tensor.data_type, tensor.data_location = name, TYPES[weight.dtype], TensorProto.EXTERNAL
        tensor.dims.extend(shape)
        tensor.external_data.add(key="location", value="weights")
    return OnnxProgram(core.SerializeToString(), given.SerializeToString(), initial.SerializeToString(), tuple(dims))


def _info(name: str, type_: TensorType) -> onnx.ValueInfoProto:
    shape = [size.text if isinstance(size, Size) else size for size in type_.shape]
    return helper.make_tensor_value_info(name, TYPES[type_.dtype], shape)


def one_node(
    kind: str, reads: Sequence[Any], type_: TensorType, *, inputs: Sequence[Value], weights: Sequence[Weight] = (),
    dims: Sequence[Any] = (),
) -> Graph:  # fmt: skip
    """A graph of one node with the result ``y``; for programs that only its inputs, weights and output matter to."""
    node = Node("y", kind, tuple(reads), {}, (Value("y", type_),))
    return Graph("tiny", tuple(dims), tuple(inputs), {w.name: w for w in weights}, (node,), ("y",), ("y",))

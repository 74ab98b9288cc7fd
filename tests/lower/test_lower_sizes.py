"""Sizes in another arithmetic: what an ONNX graph computes equals what the graph's own grammar says."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from motte.capture.graph import Dim, Graph, Size, TensorType, Value
from motte.capture.sizes import evaluate
from motte.engines.interface import dim_input
from motte.errors import GraphError
from motte.lower.cut import _Sizes
from motte.lower.extents import calculate

TEXTS = (
    "batch", "h", "4*batch", "batch*(1 + (((-1) + h) // 2))", "((-h) // 3)", "(h - 7) // 2 + 1", "-h % 5",
    "(3 - h) % 4", "max(h, batch) + min(2, h)", "-(batch - h)", "max(min(h, 6), 3)*2 - 1",
)  # fmt: skip


def test_onnx_rounds_down_as_sizes_do() -> None:
    graph = Graph(
        "sizes",
        (Dim("batch", 1, 64), Dim("h", 1, 64)),
        (Value("x", TensorType("f32", (3, Size("h")))),),
        {},
        (),
        (),
        (),
    )
    x = ir.Value(name="x", shape=ir.Shape([3, "h"]), type=ir.TensorType(ir.DataType.FLOAT))
    cut = ir.Graph([x], [], nodes=[], opset_imports={"": 18}, name="main")
    sizes = _Sizes(cut, graph, [x])
    vector = sizes.value(tuple(Size(text) for text in TEXTS))
    single = sizes.value(Size("h"))
    # "h" is an extent of an input; "batch" is not, and becomes an input of its own.
    assert list(sizes.dims) == ["batch"]
    sizes.insert()
    cut.inputs.extend(sizes.dims.values())
    for name, value in (("vector", vector), ("single", single)):
        value.name = name
        value.type = ir.TensorType(ir.DataType.INT64)
        cut.outputs.append(value)
    model = ir.to_proto(ir.Model(cut, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    for batch, h in ((1, 1), (2, 7), (5, 3), (64, 64), (3, 8)):
        given = {"x": np.zeros((3, h), np.float32), dim_input("batch"): np.array(batch, np.int64)}
        found, one = session.run(None, given)
        assert found.tolist() == [evaluate(Size(text), {"batch": batch, "h": h}) for text in TEXTS]
        assert one.shape == ()
        assert one == h


def test_another_operation_is_refused() -> None:
    for text in ("batch / 2", "abs(batch)", "batch[0]"):
        with pytest.raises(GraphError, match="not allowed in a size"):
            calculate(Size(text), constant=int, name=lambda name: 1, operation=lambda sign, a, b: a)

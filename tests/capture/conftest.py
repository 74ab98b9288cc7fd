"""A small hand-made graph that holds one of everything, for the tests of this folder."""

from __future__ import annotations

import math

import pytest

from motte.capture.graph import (
    Dim,
    DType,
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


def make_graph() -> Graph:
    """Every kind of argument, a slice, an alias, an unused result, a list of results, two outputs."""
    batch = Size("batch")
    images = TensorType("f32", (batch, 4, 8, 8))
    flat = TensorType("f32", (batch, Size("4*batch + (batch // 2)")))
    nodes = (
        Node(
            "conv",
            "aten.conv2d.default",
            (Ref("x"), WeightRef("conv.weight"), None, (1, 1), (1, 1)),
            {},
            (Value("conv", images),),
            "features.conv",
            "net.py:12",
        ),
        Node(
            "bn",
            "aten._native_batch_norm_legit_no_training.default",
            (Ref("conv"), WeightRef("a"), WeightRef("a"), WeightRef("a"), WeightRef("a"), 0.1, 1e-05),
            {},
            (Value("bn", images), None, None),
        ),
        Node("lowest", "aten.full.default", ((batch, 4), -math.inf), {"dtype": DType("f32")}, (Value("lowest", flat),)),
        Node(
            "clone",
            "aten.clone.default",
            (Ref("bn"),),
            {"memory_format": MemoryFormat("contiguous")},
            (Value("clone", images),),
        ),
        Node(
            "split", "aten.split.Tensor", (Ref("clone"), 2, 1), {}, (Value("split", images), Value("split:1", images))
        ),
        Node("cat", "aten.cat.default", ((Ref("split"), Ref("split:1")), 1), {}, (Value("cat", images),)),
        Node("scaled", "aten.mul.Tensor", (Ref("cat"), Size("batch")), {}, (Value("scaled", images),)),
        Node("index", "aten.index.Tensor", (Ref("scaled"), (None, WeightRef("i"))), {}, (Value("index", images),)),
        Node("pad", "aten.pad.default", (Ref("index"), (0, 0), "constant", math.nan), {}, (Value("pad", images),)),
    )
    weights = {
        "conv.weight": Weight(
            "conv.weight", "f32", (4, 4, 3, 3), (0, 2, 3, 1), ("tied.weight",), Slice("whole", 0, 4, 8)
        ),
        "a": Weight("a", "f32", (4,), (0,)),
        "i": Weight("i", "i64", (4,), (0,)),
    }
    return Graph(
        name="net",
        dims=(Dim("batch", 1, 16),),
        inputs=(Value("x", images),),
        weights=weights,
        nodes=nodes,
        outputs=("pad", "lowest", "x"),
        output_names=("logits", "lowest", "input"),
    )


@pytest.fixture
def graph() -> Graph:
    return make_graph()

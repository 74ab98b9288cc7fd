"""Each rule of docs/spec/graph.md, broken alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from motte.capture import checks
from motte.capture.checks import RULES, check_graph
from motte.capture.graph import (
    Arg,
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
from motte.errors import GraphError

Change = Callable[[Graph], Graph]
F32 = TensorType("f32", (2, 4, 3))


def nodes(*made: Node) -> Change:
    """The graph with these nodes after its own."""
    return lambda graph: replace(graph, nodes=(*graph.nodes, *made))


def call(op: str, *args: Arg, outputs: tuple[Value | None, ...] | None = None, **kwargs: Arg) -> Change:
    made = (Value("new", F32),) if outputs is None else outputs
    return nodes(Node("new", f"aten.{op}", args, kwargs, made))


def weight(**fields: Any) -> Change:
    """The graph with a further weight ``w``, changed."""
    made = replace(Weight("w", "f32", (2, 4), (0, 1)), **fields)
    return lambda graph: replace(graph, weights={**graph.weights, "w": made})


def typed(dtype: str, *shape: int | Size) -> Change:
    return lambda graph: replace(graph, inputs=(*graph.inputs, Value("y", TensorType(dtype, shape))))


BROKEN: dict[str, tuple[Callable[[Graph], None], Change]] = {
    "too many dimensions": (checks.rule_bounds, lambda g: replace(g, dims=tuple(Dim(f"d{i}", 1, 2) for i in "x" * 17))),
    "too many results": (checks.rule_bounds, call("unbind.int", Ref("x"), outputs=(None,) * 4097)),
    "empty name": (checks.rule_names, lambda g: replace(g, name="")),
    "name with a space": (checks.rule_names, lambda g: replace(g, inputs=(Value("a b", F32),))),
    "unprintable name": (checks.rule_names, lambda g: replace(g, output_names=("a\x00", "b", "c"))),
    "long name": (checks.rule_names, lambda g: replace(g, name="n" * 513)),
    "long source": (checks.rule_names, nodes(Node("n", "aten.relu.default", (Ref("x"),), {}, (None,), "", "s" * 513))),
    "unprintable module": (checks.rule_names, nodes(Node("n", "aten.relu.default", (Ref("x"),), {}, (None,), "a\nb"))),
    "two values of one name": (checks.rule_names, call("relu.default", Ref("x"), outputs=(Value("conv", F32),))),
    "value named as an input": (checks.rule_names, call("relu.default", Ref("x"), outputs=(Value("x", F32),))),
    "two nodes of one name": (checks.rule_names, nodes(Node("conv", "aten.relu.default", (Ref("x"),), {}, (None,)))),
    "two outputs of one name": (checks.rule_names, lambda g: replace(g, output_names=("a", "a", "b"))),
    "alias is a weight": (checks.rule_names, weight(aliases=("a",))),
    "two dimensions of one name": (checks.rule_names, lambda g: replace(g, dims=(*g.dims, *g.dims))),
    "dimension named as a function": (checks.rule_dims, lambda g: replace(g, dims=(*g.dims, Dim("max", 1, 2)))),
    "dimension named as a keyword": (checks.rule_dims, lambda g: replace(g, dims=(*g.dims, Dim("if", 1, 2)))),
    "dimension in capitals": (checks.rule_dims, lambda g: replace(g, dims=(*g.dims, Dim("Batch", 1, 2)))),
    "empty range": (checks.rule_dims, lambda g: replace(g, dims=(Dim("batch", 5, 4),))),
    "range from 0": (checks.rule_dims, lambda g: replace(g, dims=(Dim("batch", 0, 4),))),
    "huge range": (checks.rule_dims, lambda g: replace(g, dims=(Dim("batch", 1, 1 << 40),))),
    "unknown element type": (checks.rule_types, typed("c64", 2)),
    "17 dimensions": (checks.rule_types, typed("f32", *[1] * 17)),
    "negative extent": (checks.rule_types, typed("f32", -1)),
    "extent of an unknown dimension": (checks.rule_types, typed("f32", Size("width"))),
    "extent that is no expression": (checks.rule_types, typed("f32", Size("batch +"))),
    "huge extent": (checks.rule_types, typed("f32", 1 << 50)),
    "weight under another name": (
        checks.rule_weights, lambda g: replace(g, weights={**g.weights, "b": g.weights["a"]}),
    ),
    "weight of unknown type": (checks.rule_weights, weight(dtype="q8")),
    "weight with a dynamic shape": (checks.rule_weights, weight(shape=(Size("batch"), 4))),
    "order too short": (checks.rule_weights, weight(order=(0,))),
    "order with a repeat": (checks.rule_weights, weight(order=(0, 0))),
    "weight too large": (checks.rule_weights, weight(shape=(1 << 35, 4))),
    "slice of another length": (checks.rule_weights, weight(slice=Slice("v", 0, 0, 3))),
    "slice of no such axis": (checks.rule_weights, weight(slice=Slice("v", 2, 0, 2))),
    "slice backwards": (checks.rule_weights, weight(slice=Slice("v", 0, 2, 0))),
    "slice of a nameless weight": (checks.rule_weights, weight(slice=Slice("", 0, 0, 2))),
    "read before definition": (checks.rule_order, call("add.Tensor", Ref("x"), Ref("new"))),
    "read of an unused result": (checks.rule_order, call("relu.default", Ref("bn:1"))),
    "unknown weight": (checks.rule_order, call("mul.Tensor", Ref("x"), WeightRef("b"))),
    "unknown weight in a list": (checks.rule_order, call("cat.default", (Ref("x"), WeightRef("b")))),
    "operation not in the table": (checks.rule_operations, call("nonzero.default", Ref("x"))),
    "in-place operation": (checks.rule_operations, call("relu_.default", Ref("x"))),
    "random operation": (checks.rule_operations, call("rand_like.default", Ref("x"))),
    "too many arguments": (checks.rule_operations, call("relu.default", Ref("x"), 1)),
    "missing argument": (checks.rule_operations, call("linear.default", Ref("x"))),
    "unknown argument": (checks.rule_operations, call("relu.default", Ref("x"), inplace=True)),
    "argument given twice": (checks.rule_operations, call("relu.default", Ref("x"), self=Ref("x"))),
    "device": (checks.rule_operations, call("zeros.default", (2,), device="cuda")),
    "layout by position": (checks.rule_operations, call("zeros.default", (2,), layout=None)),
    "number for a first tensor": (checks.rule_operations, call("add.Tensor", 1, Ref("x"))),
    "text for a tensor": (checks.rule_operations, call("add.Tensor", Ref("x"), "y")),
    "text for a number": (checks.rule_operations, call("softmax.int", Ref("x"), "0")),
    "fraction for an integer": (checks.rule_operations, call("softmax.int", Ref("x"), 0.5)),
    "truth value for an integer": (checks.rule_operations, call("softmax.int", Ref("x"), True)),
    "integer for a truth value": (checks.rule_operations, call("cumsum.default", Ref("x"), 0, dtype=True)),
    "number in a list of tensors": (checks.rule_operations, call("cat.default", (Ref("x"), 1))),
    "list for a tensor": (checks.rule_operations, call("relu.default", (Ref("x"),))),
    "list for an integer": (checks.rule_operations, call("softmax.int", Ref("x"), (0,))),
    "integer for a list": (checks.rule_operations, call("view.default", Ref("x"), 4)),
    "nothing for a tensor": (checks.rule_operations, call("relu.default", None)),
    "nothing in a list of tensors": (checks.rule_operations, call("cat.default", (Ref("x"), None))),
    "size that is no expression": (checks.rule_operations, call("view.default", Ref("x"), (Size("a b"),))),
    "size for a truth value": (
        checks.rule_operations, call("mean.dim", Ref("x"), (1,), Size("batch")),
    ),
    "unknown element type argument": (checks.rule_operations, call("zeros.default", (2,), dtype=DType("c64"))),
    "element type for a memory format": (
        checks.rule_operations, call("clone.default", Ref("x"), memory_format=DType("f32")),
    ),
    "unknown memory format": (
        checks.rule_operations, call("clone.default", Ref("x"), memory_format=MemoryFormat("sparse")),
    ),
    "integer beyond 64 bits": (checks.rule_operations, call("view.default", Ref("x"), (1 << 63,))),
    "long text": (checks.rule_operations, call("einsum.default", "i" * 513, (Ref("x"),))),
    "long list": (checks.rule_operations, call("view.default", Ref("x"), (1,) * 4097)),
    "nested list": (checks.rule_operations, call("view.default", Ref("x"), ((1,),))),
    "random dropout in attention": (
        checks.rule_operations,
        call("scaled_dot_product_attention.default", Ref("x"), Ref("x"), Ref("x"), None, 0.5),
    ),
    "training recurrence": (
        checks.rule_operations,
        call("gru.input", Ref("x"), Ref("x"), (Ref("x"),), True, 1, 0.0, True, False, False,
             outputs=(Value("new", F32), None)),
    ),
    "running statistics written": (
        checks.rule_operations,
        call("instance_norm.default", Ref("x"), None, None, WeightRef("a"), WeightRef("a"), True, 0.1, 1e-5, False),
    ),
    "too few results": (checks.rule_operations, call("topk.default", Ref("x"), 1)),
    "too many results for one": (checks.rule_operations, call("relu.default", Ref("x"), outputs=(None, None))),
    "no result of a list": (checks.rule_operations, call("split.Tensor", Ref("x"), 2, outputs=())),
    "no output": (checks.rule_outputs, lambda g: replace(g, outputs=(), output_names=())),
    "output without a name": (checks.rule_outputs, lambda g: replace(g, output_names=("a", "b"))),
    "unknown output": (checks.rule_outputs, lambda g: replace(g, outputs=("pad", "lowest", "nothing"))),
    "output that is a weight": (checks.rule_outputs, lambda g: replace(g, outputs=("pad", "lowest", "a"))),
}  # fmt: skip


def test_the_graph_keeps_every_rule(graph: Graph) -> None:
    check_graph(graph)


@pytest.mark.parametrize("flaw", BROKEN)
def test_rule_is_broken_alone(graph: Graph, flaw: str) -> None:
    rule, change = BROKEN[flaw]
    broken = change(graph)
    with pytest.raises(GraphError):
        rule(broken)
    with pytest.raises(GraphError):
        check_graph(broken)


def test_every_rule_has_a_flaw_that_breaks_it() -> None:
    assert {rule for rule, _ in BROKEN.values()} == set(RULES)


@pytest.mark.parametrize(
    "change",
    [
        call("add.Tensor", Ref("x"), 1),
        call("mul.Tensor", Ref("x"), 0.5),
        call("add.Tensor", Ref("x"), Size("batch")),
        call("mean.dim", Ref("x"), None),
        call("sum.dim_IntList", Ref("x"), 1),
        call("max_pool2d.default", Ref("x"), 2),
        call("linear.default", input=Ref("x"), weight=WeightRef("a")),
        call("full.default", (Size("batch"), 2), Size("2*batch")),
        call("arange.default", Size("batch"), dtype=None),
        call("instance_norm.default", Ref("x"), None, None, None, None, True, 0.1, 1e-5, False),
        call("unbind.int", Ref("x"), outputs=(Value("new", F32),) + (None,) * 15),
        call("relu.default", Ref("x"), outputs=(None,)),
    ],
)
def test_legal_calls(graph: Graph, change: Change) -> None:
    check_graph(change(graph))

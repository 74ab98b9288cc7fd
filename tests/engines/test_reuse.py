"""Reusing memory: chosen only where nobody can see it, and never another bit than without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from motte.capture.checks import check_graph
from motte.capture.graph import Arg, Graph, Node, Ref, TensorType, Value, Weight, WeightRef
from motte.engines.reuse import reusable
from motte.engines.torch_engine import TorchProgram

SQUARE = TensorType("f32", (4, 4))
HALF = TensorType("f32", (4, 2))
WEIGHTS = {"w": Weight("w", "f32", (4, 4), (0, 1)), "t": Weight("t", "f32", (4, 4), (1, 0))}


def node(name: str, op: str, *args: Arg, type_: TensorType = SQUARE, **kwargs: Arg) -> Node:
    return Node(name, f"aten.{op}", args, kwargs, (Value(name, type_),))


def graph(*nodes: Node, outputs: tuple[str, ...]) -> Graph:
    made = Graph(
        "g",
        (),
        (Value("x", SQUARE), Value("z", SQUARE)),
        WEIGHTS,
        nodes,
        outputs,
        tuple(f"o{i}" for i in range(len(outputs))),
    )
    check_graph(made)
    return made


EXP = node("e", "exp.default", Ref("x"))
CASES: dict[str, tuple[Graph, set[str]]] = {
    "chain": (graph(EXP, node("r", "relu.default", Ref("e")), outputs=("r",)), {"r"}),
    "twice": (
        graph(EXP, node("r", "relu.default", Ref("e")), node("s", "sigmoid.default", Ref("r")), outputs=("s",)),
        {"r", "s"},
    ),
    "residual": (graph(EXP, node("a", "add.Tensor", Ref("e"), Ref("x")), outputs=("a",)), {"a"}),
    "with a number": (graph(EXP, node("a", "mul.Tensor", Ref("e"), 2.0), outputs=("a",)), {"a"}),
    "input": (graph(node("r", "relu.default", Ref("x")), outputs=("r",)), set()),
    "weight": (graph(node("r", "relu.default", WeightRef("w")), outputs=("r",)), set()),
    "read later": (
        graph(
            EXP, node("r", "relu.default", Ref("e")), node("a", "add.Tensor", Ref("x"), Ref("e")), outputs=("r", "a")
        ),
        set(),
    ),
    "output": (graph(EXP, node("r", "relu.default", Ref("e")), outputs=("r", "e")), set()),
    "both arguments": (graph(EXP, node("a", "add.Tensor", Ref("e"), Ref("e")), outputs=("a",)), set()),
    "second argument a weight": (graph(EXP, node("a", "add.Tensor", Ref("e"), WeightRef("w")), outputs=("a",)), set()),
    "view of the input": (
        graph(node("t", "t.default", Ref("x")), node("r", "relu.default", Ref("t")), outputs=("r",)),
        set(),
    ),
    "view of a weight": (
        graph(node("t", "t.default", WeightRef("w")), node("r", "relu.default", Ref("t")), outputs=("r",)),
        set(),
    ),
    "view of own memory": (
        graph(EXP, node("t", "t.default", Ref("e")), node("r", "relu.default", Ref("t")), outputs=("r",)),
        {"r"},
    ),
    "view still alive": (
        graph(
            EXP,
            node("t", "t.default", Ref("e")),
            node("r", "relu.default", Ref("e")),
            node("a", "sub.Tensor", Ref("x"), Ref("t")),
            outputs=("r", "a"),
        ),
        set(),
    ),
    "base still alive": (
        graph(
            EXP,
            node("t", "t.default", Ref("e")),
            node("r", "relu.default", Ref("t")),
            node("a", "sub.Tensor", Ref("x"), Ref("e")),
            outputs=("r", "a"),
        ),
        set(),
    ),
    "view is an output": (
        graph(EXP, node("t", "t.default", Ref("e")), node("r", "relu.default", Ref("e")), outputs=("r", "t")),
        set(),
    ),
    "view of a view": (
        graph(
            EXP,
            node("t", "t.default", Ref("e")),
            node("u", "t.default", Ref("t")),
            node("r", "relu.default", Ref("e")),
            outputs=("r", "u"),
        ),
        set(),
    ),
    "view as the second argument": (
        graph(EXP, node("t", "t.default", Ref("e")), node("a", "add.Tensor", Ref("e"), Ref("t")), outputs=("a",)),
        set(),
    ),
    "result read through a view made before": (
        graph(
            EXP,
            node("r", "relu.default", Ref("e")),
            node("t", "t.default", Ref("r")),
            node("s", "neg.default", Ref("r")),
            node("a", "sub.Tensor", Ref("x"), Ref("t")),
            outputs=("s", "a"),
        ),
        {"r"},
    ),
    "broadcast": (
        graph(
            node("s", "sum.dim_IntList", Ref("x"), (1,), True, type_=TensorType("f32", (4, 1))),
            node("a", "add.Tensor", Ref("s"), Ref("x")),
            outputs=("a",),
        ),
        set(),
    ),
    "promotion": (
        graph(
            node("c", "gt.Scalar", Ref("x"), 0, type_=TensorType("bool", (4, 4))),
            node("a", "mul.Tensor", Ref("c"), 2.0),
            outputs=("a",),
        ),
        set(),
    ),
    "no in-place form": (graph(EXP, node("r", "softplus.default", Ref("e")), outputs=("r",)), set()),
    "result that nobody reads": (
        graph(EXP, Node("r", "aten.relu.default", (Ref("e"),), {}, (None,)), outputs=("x",)),
        set(),
    ),
    "two results of one operation": (
        graph(
            Node(
                "m", "aten.sort.default", (Ref("x"),), {}, (Value("m", SQUARE), Value("m:1", TensorType("i64", (4, 4))))
            ),
            node("r", "relu.default", Ref("m")),
            outputs=("r", "m:1"),
        ),
        set(),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_chosen_nodes(case: str) -> None:
    made, expected = CASES[case]
    assert reusable(made) == expected


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transposed", [False, True])
def test_same_bits_and_strides_as_the_plain_interpreter(
    case: str, transposed: bool, interpret: Callable[..., Any]
) -> None:
    compare(CASES[case][0], interpret, transposed)


def compare(made: Graph, interpret: Callable[..., Any], transposed: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(4, 4, generator=generator) for _ in made.inputs]
    if transposed:
        inputs[0] = inputs[0].t()
    weights = {"w": torch.randn(4, 4, generator=generator), "t": torch.randn(4, 4, generator=generator).t()}
    before = [tensor.clone() for tensor in (*inputs, *weights.values())]
    expected = interpret(made, inputs, weights, {})
    # Values first: a program that wrote over an input would otherwise spoil what it is compared with.
    kept = [tensor.clone() for tensor in expected]
    found = TorchProgram(made).run(list(inputs), weights, {})
    assert all(torch.equal(a, b) for a, b in zip(kept, found, strict=True))
    assert [tensor.stride() for tensor in expected] == [tensor.stride() for tensor in found]
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, *weights.values()), strict=True))


@st.composite
def random_graphs(draw: st.DrawFn) -> Graph:
    """Up to 14 operations over 4x4 tensors: element-wise ones, views, splits, joins; some values are outputs."""
    values = ["x", "z"]
    halves: list[str] = []
    nodes: list[Node] = []
    for index in range(draw(st.integers(2, 14))):
        name = f"n{index}"
        pick = lambda: Ref(draw(st.sampled_from(values[-5:])))  # noqa: E731
        kind = draw(st.sampled_from(["unary", "unary", "binary", "binary", "view", "split", "join", "weight", "flip"]))
        if kind == "unary":
            op = draw(
                st.sampled_from(["relu.default", "sigmoid.default", "neg.default", "silu.default", "exp.default"])
            )
            nodes.append(node(name, op, pick()))
        elif kind == "binary":
            op = draw(st.sampled_from(["add.Tensor", "sub.Tensor", "mul.Tensor"]))
            other: Arg = draw(st.sampled_from([2.0, 1])) if draw(st.booleans()) else pick()
            nodes.append(node(name, op, pick(), other))
        elif kind == "weight":
            nodes.append(node(name, "add.Tensor", pick(), WeightRef(draw(st.sampled_from(["w", "t"])))))
        elif kind == "view":
            op, *rest = draw(
                st.sampled_from(
                    [("t.default",), ("view.default", (4, 4)), ("alias.default",), ("slice.Tensor", 0, 0, 4)]
                )
            )
            # view() of a transposed tensor is refused by torch: only of what is surely contiguous.
            source = Ref("x") if op == "view.default" else pick()
            nodes.append(node(name, op, source, *rest))
        elif kind == "flip":
            nodes.append(node(name, "flip.default", pick(), (0,)))
        elif kind == "split":
            outputs = (Value(name, HALF), Value(f"{name}:1", HALF))
            nodes.append(Node(name, "aten.split.Tensor", (pick(), 2, 1), {}, outputs))
            halves += [name, f"{name}:1"]
            continue
        elif len(halves) < 2:
            continue
        else:
            left, right = (Ref(draw(st.sampled_from(halves))) for _ in range(2))
            nodes.append(node(name, "cat.default", (left, right), 1))
        values.append(name)
    outputs = tuple(dict.fromkeys([values[-1], *draw(st.lists(st.sampled_from([*values, *halves]), max_size=3))]))
    return graph(*nodes, outputs=outputs)


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(made=random_graphs())
def test_generated_graphs(made: Graph, interpret: Callable[..., Any]) -> None:
    compare(made, interpret, transposed=False)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 4, 4), (2, 3, 1, 1), (1, 1, 4, 4), (2, 1, 3, 3), (0, 3, 4, 4)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced"])
@pytest.mark.parametrize("op", ["relu", "add", "add contiguous"])
def test_strides_are_those_without_reuse(
    shape: tuple[int, ...], layout: str, op: str, interpret: Callable[..., Any]
) -> None:
    type_ = TensorType("f32", shape)
    wide = TensorType("f32", (shape[0], shape[1], shape[2], 2 * shape[3]))
    source = wide if layout == "sliced" else type_
    first = node("c", "exp.default", Ref("x"), type_=source)
    own: tuple[Node, ...] = (first,)
    if layout == "sliced":
        own = (first, node("s", "slice.Tensor", Ref("c"), 3, 0, shape[3], type_=type_))
    last = Ref(own[-1].name)
    other = Ref("y") if op == "add contiguous" else last
    if op == "relu":
        result = node("r", "relu.default", last, type_=type_)
    else:
        own = (*own, node("d", "exp.default", other, type_=type_))
        result = node("r", "add.Tensor", last, Ref("d"), type_=type_)
    inputs = (Value("x", source), Value("y", type_))
    made = Graph("g", (), inputs, {}, (*own, result), ("r",), ("o",))
    check_graph(made)
    x = torch.randn(source.shape)  # type: ignore[arg-type]
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "permuted":
        x = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    y = torch.randn(shape)
    assert "r" in reusable(made)
    expected = interpret(made, [x, y], {}, {})[0]
    found = TorchProgram(made).run([x, y], {}, {})[0]
    assert torch.equal(expected, found)
    assert expected.stride() == found.stride()

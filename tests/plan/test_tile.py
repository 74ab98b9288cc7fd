"""Tiled operations against the untiled ones, over generated shapes; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from motte.capture.graph import Graph, Node, Ref, Slice, TensorType, Value, Weight, WeightRef
from motte.capture.text import dumps, loads
from motte.errors import PlanError
from motte.plan.plan import Tile
from motte.plan.tile import apply_tiles, check_tile, tileable
from motte.split.oracle import TILED_TOLERANCE, relative_difference, weights_of


def one_op(op: str, args: tuple[Any, ...], weights: dict[str, torch.Tensor], x: torch.Tensor, out: torch.Size) -> Graph:
    stored = {}
    for name, tensor in weights.items():
        # Outermost in memory first; equal strides (extent 1) in any order.
        order = tuple(sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d)))
        stored[name] = Weight(name, "f32", tuple(tensor.shape), order)
    dtype = "i64" if x.dtype == torch.int64 else "f32"
    made = Value("y", TensorType("f32", tuple(out)))
    nodes = (
        Node("y", op, args, {}, (made,), "net.0"),
        Node("z", "aten.relu.default", (Ref("y"),), {}, (Value("z", made.type),), "net.1"),
    )
    return Graph("one", (), (Value("x", TensorType(dtype, tuple(x.shape))),), stored, nodes, ("z", "y"), ("z", "y"))


def compare(interpreter: Any, graph: Graph, weights: dict[str, torch.Tensor], x: torch.Tensor, count: int) -> Graph:
    """The tiled graph, after it gave the untiled answer and passed the reader of graphs."""
    tiled = apply_tiles(graph, [Tile("y", count)])
    assert loads(dumps(tiled)) == tiled
    sliced = weights_of(tiled, weights)
    for name, tensor in sliced.items():
        assert tuple(tensor.shape) == tiled.weights[name].shape
        assert tensor.permute(tiled.weights[name].order).is_contiguous()
    wanted = interpreter(graph).run([x], weights, {})
    found = interpreter(tiled).run([x], sliced, {})
    for value, reference in zip(found, wanted, strict=True):
        assert value.dtype == reference.dtype
        assert value.shape == reference.shape
        assert relative_difference(value, reference) <= TILED_TOLERANCE
    return tiled


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[int, dict[str, Any]]:
    rank = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 5))
    case = {
        "groups": groups,
        "inside": groups * draw(st.integers(1, 3)),
        "outside": groups * draw(st.integers(1, 4)),
        "kernel": draw(st.integers(1, 3)),
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.sampled_from([0, 1, "same", "valid"])),
        "batch": draw(st.sampled_from([0, 1, 2])),
        "bias": draw(st.booleans()),
        "channels_last": draw(st.booleans()),
        "size": draw(st.integers(3, 6)),
        "count": draw(st.integers(2, 20)),
    }
    return rank, case


@given(convolutions(), st.integers(0, 2**20))
def test_convolutions_of_every_kind(random_graphs: ModuleType, case: tuple[int, dict[str, Any]], seed: int) -> None:
    rank, c = case
    torch.manual_seed(seed)
    weights = {"w": torch.randn(c["outside"], c["inside"] // c["groups"], *[c["kernel"]] * rank)}
    if c["channels_last"] and rank == 2:
        weights["w"] = weights["w"].to(memory_format=torch.channels_last)
    if c["bias"]:
        weights["b"] = torch.randn(c["outside"])
    x = torch.randn(*([c["batch"]] if c["batch"] else []), c["inside"], *[c["size"]] * rank)
    named = isinstance(c["padding"], str)
    stride = 1 if c["padding"] == "same" else c["stride"]
    padding = c["padding"] if named else (c["padding"],) * rank
    op = f"aten.conv{rank}d.{'padding' if named else 'default'}"
    bias = WeightRef("b") if c["bias"] else None
    args = (Ref("x"), WeightRef("w"), bias, (stride,) * rank, padding, (1,) * rank, c["groups"])
    y = random_graphs.operation(op)(x, weights["w"], weights.get("b"), *args[3:])
    graph = one_op(op, args, weights, x, y.shape)
    most = c["groups"] if c["groups"] > 1 else c["outside"]
    found = tileable(graph, graph.nodes[0])
    assert not isinstance(found, str)
    assert found.most == most
    if c["count"] > most:
        with pytest.raises(PlanError, match="no such number of tiles"):
            apply_tiles(graph, [Tile("y", c["count"])])
        return
    tiled = compare(random_graphs.Interpreter, graph, weights, x, c["count"])
    tiles = [node for node in tiled.nodes if node.op == op]
    assert len(tiles) == c["count"]
    widths = [tiled.weights[node.args[1].name].shape[0] for node in tiles]
    assert sum(widths) == c["outside"]
    assert max(widths) - min(widths) <= found.step
    assert {node.module for node in tiled.nodes[:-1]} == {"net.0"}


@given(st.integers(1, 9), st.integers(2, 40), st.sampled_from([(), (1,), (3,), (2, 3)]), st.booleans(), st.data())
def test_linear_layers(
    random_graphs: ModuleType, inside: int, outside: int, batch: tuple[int, ...], bias: bool, data: st.DataObject
) -> None:
    torch.manual_seed(inside * outside)
    weights = {"w": torch.randn(outside, inside)} | ({"b": torch.randn(outside)} if bias else {})
    x = torch.randn(*batch, inside)
    args = (Ref("x"), WeightRef("w"), WeightRef("b")) if bias else (Ref("x"), WeightRef("w"))
    graph = one_op("aten.linear.default", args, weights, x, torch.Size((*batch, outside)))
    compare(random_graphs.Interpreter, graph, weights, x, data.draw(st.integers(2, outside)))


@given(st.integers(1, 9), st.integers(2, 30), st.integers(1, 4), st.data())
def test_matrix_products(random_graphs: ModuleType, inside: int, outside: int, rows: int, data: st.DataObject) -> None:
    torch.manual_seed(inside * outside)
    weights = {"w": torch.randn(inside, outside), "b": torch.randn(outside)}
    x = torch.randn(rows, inside)
    count = data.draw(st.integers(2, outside))
    for op, args, used in (
        ("aten.mm.default", (Ref("x"), WeightRef("w")), {"w": weights["w"]}),
        ("aten.addmm.default", (WeightRef("b"), Ref("x"), WeightRef("w")), weights),
    ):
        graph = one_op(op, args, used, x, torch.Size((rows, outside)))
        compare(random_graphs.Interpreter, graph, used, x, count)


@given(st.integers(2, 9), st.integers(2, 30), st.data())
def test_embeddings_are_tiled_by_column(random_graphs: ModuleType, rows: int, width: int, data: st.DataObject) -> None:
    weights = {"w": torch.randn(rows, width)}
    x = torch.randint(0, rows, (2, 5))
    graph = one_op("aten.embedding.default", (WeightRef("w"), Ref("x"), 0), weights, x, torch.Size((2, 5, width)))
    count = data.draw(st.integers(2, width))
    tiled = compare(random_graphs.Interpreter, graph, weights, x, count)
    assert all(weight.shape[0] == rows for weight in tiled.weights.values())
    assert next(iter(tiled.weights)).startswith("w[:,0:")


def linear(outside: int = 8, **changes: Any) -> Graph:
    weights = {"w": torch.zeros(outside, 4), "b": torch.zeros(outside)}
    args = (Ref("x"), WeightRef("w"), WeightRef("b"))
    graph = one_op("aten.linear.default", args, weights, torch.zeros(2, 4), torch.Size((2, outside)))
    return replace(graph, **changes)


def test_names_and_slices() -> None:
    tiled = apply_tiles(linear(), [Tile("y", 3)])
    assert [node.name for node in tiled.nodes] == ["y_tile0", "y_tile1", "y_tile2", "y", "z"]
    assert list(tiled.weights) == ["w[0:3]", "b[0:3]", "w[3:6]", "b[3:6]", "w[6:8]", "b[6:8]"]
    assert tiled.weights["w[3:6]"].slice == Slice("w", 0, 3, 6)
    assert tiled.outputs == ("z", "y")
    joined = tiled.nodes[3]
    assert joined.op == "aten.cat.default"
    assert joined.args == ((Ref("y_tile0"), Ref("y_tile1"), Ref("y_tile2")), 1)


def test_a_name_in_use_is_avoided() -> None:
    graph = linear()
    named = replace(graph.nodes[1], name="y_tile0", outputs=(Value("z", graph.nodes[1].outputs[0].type),))
    tiled = apply_tiles(replace(graph, nodes=(graph.nodes[0], named)), [Tile("y", 2)])
    assert [node.name for node in tiled.nodes] == ["y_tile0_", "y_tile1", "y", "y_tile0"]


def test_a_weight_that_another_node_reads_whole_stays() -> None:
    graph = linear(outside=4)
    again = Node("v", "aten.linear.default", (Ref("z"), WeightRef("w")), {}, (Value("v", TensorType("f32", (2, 4))),))
    tiled = apply_tiles(
        replace(graph, nodes=(*graph.nodes, again), outputs=("v",), output_names=("v",)), [Tile("y", 2)]
    )
    assert list(tiled.weights) == ["w", "w[0:2]", "b[0:2]", "w[2:4]", "b[2:4]"]


def test_nothing_to_tile_changes_nothing() -> None:
    graph = linear()
    assert apply_tiles(graph, ()) is graph


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        ([Tile("q", 2)], "no such node"),
        ([Tile("z", 2)], "cannot be tiled"),
        ([Tile("y", 2), Tile("y", 2)], "tiled twice"),
        ([Tile("y", 9)], "no such number of tiles"),
        ([Tile("y", 1)], "no such number of tiles"),
        ([Tile("y", 0)], "no such number of tiles"),
    ],
)
def test_wrong_tiles_are_refused(tiles: list[Tile], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        apply_tiles(linear(), tiles)


def test_why_a_node_cannot_be_tiled() -> None:
    graph = linear()
    node = graph.nodes[0]
    tiled = apply_tiles(graph, [Tile("y", 2)])
    sliced = Node("y", node.op, (Ref("x"), WeightRef("w[0:4]")), {}, node.outputs)
    cases = [
        (graph, graph.nodes[1], "no convolution"),
        (graph, replace(node, args=(Ref("x"), Ref("x"))), "its weight is computed"),
        (graph, replace(node, args=(Ref("x"), WeightRef("w"), Ref("x"))), "its bias is computed"),
        (graph, replace(node, args=(Ref("x"), WeightRef("w"), WeightRef("w"))), "not one number per output feature"),
        (graph, replace(node, args=(Ref("x"),), kwargs={"weight": WeightRef("w")}), "named arguments"),
        (graph, replace(node, outputs=(None,)), "its result is not used"),
        (tiled, sliced, "a tile already"),
    ]
    for holder, refused, reason in cases:
        with pytest.raises(PlanError, match="cannot be tiled") as error:
            check_tile(holder, refused, 2)
        assert reason in str(error.value.got)


def test_a_weight_with_the_name_of_a_tile_is_refused() -> None:
    graph = linear()
    taken = {**graph.weights, "w[0:4]": Weight("w[0:4]", "f32", (1,), (0,))}
    with pytest.raises(PlanError, match="has the name of a tile"):
        apply_tiles(replace(graph, weights=taken), [Tile("y", 2)])

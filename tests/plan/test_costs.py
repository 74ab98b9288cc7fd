"""Costs against what a run of torch really holds, and against counts made by hand."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from motte.capture.graph import Dim, Graph, Node, Ref, Size, TensorType, Value, Weight, WeightRef
from motte.errors import PlanError
from motte.plan.costs import costs_of
from motte.plan.storage import weight_views

BATCH = Size("batch")


def value(name: str, *shape: int | Size, dtype: str = "f32") -> Value:
    return Value(name, TensorType(dtype, shape))


def weight(name: str, *shape: int) -> Weight:
    return Weight(name, "f32", shape, tuple(range(len(shape))))


def graph_of(
    inputs: list[Value], weights: list[Weight], nodes: list[Node], *outputs: str, batch: bool = False
) -> Graph:
    dims = (Dim("batch", 1, 64),) if batch else ()
    return Graph("hand", dims, tuple(inputs), {w.name: w for w in weights}, tuple(nodes), outputs, outputs)


def node(name: str, op: str, *args: Any, out: Value | None = None, outs: tuple[Value | None, ...] = ()) -> Node:
    return Node(name, f"aten.{op}", args, {}, outs or (out,))


@given(st.integers(0, 2**32), st.integers(3, 20), st.integers(1, 16))
def test_activations_are_never_below_a_measured_run(
    random_graphs: ModuleType, seed: int, count: int, batch: int
) -> None:
    graph = random_graphs.random_graph(seed, count)
    dims = {"batch": batch}
    run = random_graphs.Interpreter(graph)
    run.run(random_graphs.random_inputs(graph, dims), random_graphs.random_weights(graph), dims)
    costs = costs_of(graph, dims)
    assert len(run.held_bytes) == len(costs.live_bytes)
    for measured, counted in zip(run.held_bytes, costs.live_bytes, strict=True):
        assert measured <= counted


UNCERTAIN = ("aten.reshape.default", "aten.split.Tensor", "aten.slice.Tensor")
"""May copy or not, or gives views of a part, which an engine may overwrite or not."""


def test_activations_are_exact_where_nothing_is_uncertain(random_graphs: ModuleType) -> None:
    """Elsewhere the count is the measured one: conservative does not mean padded."""
    exact = 0
    for seed in range(400):
        graph = random_graphs.random_graph(seed, 10)
        if any(n.op in UNCERTAIN or None in n.outputs for n in graph.nodes):
            continue
        run = random_graphs.Interpreter(graph)
        run.run(random_graphs.random_inputs(graph, {"batch": 3}), random_graphs.random_weights(graph), {"batch": 3})
        counted = list(costs_of(graph, {"batch": 3}).live_bytes)
        # An input that nobody reads counts through the first node; the interpreter drops it before.
        assert run.held_bytes[1:] == counted[1:]
        exact += 1
    assert exact > 20


def chain() -> Graph:
    """x -> a -> (b, c views of halves of a) -> d reads c; b is returned."""
    return graph_of(
        [value("x", BATCH, 8)],
        [weight("w", 16, 8)],
        [
            node("a", "linear.default", Ref("x"), WeightRef("w"), out=value("a", BATCH, 16)),
            node("bc", "split.Tensor", Ref("a"), 8, 1, outs=(value("b", BATCH, 8), value("c", BATCH, 8))),
            node("d", "relu.default", Ref("c"), out=value("d", BATCH, 8)),
        ],
        "b",
        "d",
        batch=True,
    )


def test_live_sets_by_hand() -> None:
    costs = costs_of(chain(), {"batch": 2})
    x, a, d = 2 * 8 * 4, 2 * 16 * 4, 2 * 8 * 4
    # b is a view: it holds all of a to the end, and across every later cut a counts once for b and c.
    assert costs.cut_bytes == (x, a, a, a + d)
    assert costs.live_bytes == (x + a, a, a + d)
    assert costs.weights == (("w",), (), ())
    assert costs.weight_bytes(range(3)) == 16 * 8 * 4


def test_a_weight_counts_once_in_a_part_and_again_in_another() -> None:
    graph = graph_of(
        [value("x", 2, 4)],
        [weight("w", 4, 4)],
        [
            node("a", "linear.default", Ref("x"), WeightRef("w"), out=value("a", 2, 4)),
            node("b", "linear.default", Ref("a"), WeightRef("w"), out=value("b", 2, 4)),
        ],
        "b",
    )
    costs = costs_of(graph, {})
    assert costs.weight_bytes([0, 1]) == costs.weight_bytes([0]) == costs.weight_bytes([1]) == 64


def test_a_view_of_a_weight_holds_the_weight_and_no_activation() -> None:
    graph = graph_of(
        [value("x", 2, 4)],
        [weight("w", 6, 4)],
        [
            node("v", "t.default", WeightRef("w"), out=value("v", 4, 6)),
            node("y", "relu.default", Ref("x"), out=value("y", 2, 4)),
            node("z", "mm.default", Ref("y"), Ref("v"), out=value("z", 2, 6)),
        ],
        "z",
    )
    costs = costs_of(graph, {})
    assert weight_views(graph).keys() == {"v"}
    assert costs.weights == (("w",), (), ("w",))
    assert costs.cut_bytes == (32, 32, 32, 48)
    assert costs.copy_bytes == (0, 0, 96)


def test_unused_results_count_while_their_node_runs() -> None:
    graph = graph_of(
        [value("x", 1, 2, 8, 8)],
        [],
        [
            node("m", "max_pool2d_with_indices.default", Ref("x"), (2, 2), outs=(value("m", 1, 2, 4, 4), None)),
            node("r", "relu.default", Ref("m"), out=value("r", 1, 2, 4, 4)),
        ],
        "r",
    )
    x, m = 128 * 4, 32 * 4
    assert costs_of(graph, {}).live_bytes == (x + m + 32 * 8, m + m)


FLOPS: list[tuple[str, tuple[Any, ...], list[Value], list[Weight], Value, int]] = [
    (
        "conv2d.default",
        (Ref("x"), WeightRef("w")),
        [value("x", 2, 4, 9, 9)],
        [weight("w", 6, 4, 3, 3)],
        value("y", 2, 6, 7, 7),
        2 * (2 * 6 * 49) * (4 * 9),
    ),
    (
        "conv2d.default",
        (Ref("x"), WeightRef("w"), None, (1, 1), (0, 0), (1, 1), 2),
        [value("x", 1, 4, 5, 5)],
        [weight("w", 6, 2, 3, 3)],
        value("y", 1, 6, 3, 3),
        2 * 54 * 18,
    ),
    (
        "conv1d.default",
        (Ref("x"), WeightRef("w")),
        [value("x", 1, 3, 10)],
        [weight("w", 5, 3, 4)],
        value("y", 1, 5, 7),
        2 * 35 * 12,
    ),
    (
        "conv3d.default",
        (Ref("x"), WeightRef("w")),
        [value("x", 1, 1, 3, 3, 3)],
        [weight("w", 2, 1, 2, 2, 2)],
        value("y", 1, 2, 2, 2, 2),
        2 * 16 * 8,
    ),
    (
        "conv_transpose2d.input",
        (Ref("x"), WeightRef("w")),
        [value("x", 1, 4, 3, 3)],
        [weight("w", 4, 5, 2, 2)],
        value("y", 1, 5, 4, 4),
        2 * 36 * 20,
    ),
    (
        "linear.default",
        (Ref("x"), WeightRef("w")),
        [value("x", 3, 8)],
        [weight("w", 5, 8)],
        value("y", 3, 5),
        2 * 15 * 8,
    ),
    (
        "matmul.default",
        (Ref("x"), Ref("z")),
        [value("x", 2, 3, 4), value("z", 2, 4, 5)],
        [],
        value("y", 2, 3, 5),
        2 * 30 * 4,
    ),
    (
        "bmm.default",
        (Ref("x"), Ref("z")),
        [value("x", 2, 3, 4), value("z", 2, 4, 5)],
        [],
        value("y", 2, 3, 5),
        2 * 30 * 4,
    ),
    (
        "baddbmm.default",
        (Ref("b"), Ref("x"), Ref("z")),
        [value("b", 2, 3, 5), value("x", 2, 3, 4), value("z", 2, 4, 5)],
        [],
        value("y", 2, 3, 5),
        2 * 30 * 4,
    ),
    (
        "addmm.default",
        (WeightRef("b"), Ref("x"), WeightRef("w")),
        [value("x", 3, 4)],
        [weight("b", 5), weight("w", 4, 5)],
        value("y", 3, 5),
        2 * 15 * 4,
    ),
    (
        "scaled_dot_product_attention.default",
        (Ref("q"), Ref("k"), Ref("v")),
        [value("q", 1, 2, 3, 8), value("k", 1, 2, 5, 8), value("v", 1, 2, 5, 4)],
        [],
        value("y", 1, 2, 3, 4),
        2 * 2 * 3 * 5 * 8 + 2 * 2 * 3 * 5 * 4,
    ),
    ("relu.default", (Ref("x"),), [value("x", 3, 4)], [], value("y", 3, 4), 12),
    ("mean.dim", (Ref("x"), (1,)), [value("x", 3, 4)], [], value("y", 3), 12),
    ("permute.default", (Ref("x"), (1, 0)), [value("x", 3, 4)], [], value("y", 4, 3), 0),
]


@pytest.mark.parametrize(
    ("op", "args", "inputs", "weights", "out", "flops"), FLOPS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_flops(
    op: str, args: tuple[Any, ...], inputs: list[Value], weights: list[Weight], out: Value, flops: int
) -> None:
    graph = graph_of(inputs, weights, [node("n", op, *args, out=out)], "y")
    assert costs_of(graph, {}).flops == (flops,)


def test_flops_of_a_convolution_agree_with_torch() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        torch.conv2d(torch.zeros(2, 4, 9, 9), torch.zeros(6, 2, 3, 3), groups=2)
    graph = graph_of(
        [value("x", 2, 4, 9, 9)],
        [weight("w", 6, 2, 3, 3)],
        [
            node(
                "n",
                "conv2d.default",
                Ref("x"),
                WeightRef("w"),
                None,
                (1, 1),
                (0, 0),
                (1, 1),
                2,
                out=value("y", 2, 6, 7, 7),
            )
        ],
        "y",
    )
    assert sum(costs_of(graph, {}).flops) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({}, "no value"),
        ({"batch": 65}, "out of its range"),
        ({"batch": 0}, "out of its range"),
        ({"batch": 1, "beam": 2}, "no such dimension"),
    ],
)
def test_dims_that_do_not_fit_are_refused(dims: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        costs_of(chain(), dims)

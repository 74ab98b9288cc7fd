"""The oracle agrees with good parts and names the first value that a bad engine changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from motte.capture.graph import Graph, Node, Ref, TensorType, Value, Weight, WeightRef
from motte.engines.torch_engine import TorchEngine
from motte.errors import InputError, MismatchError, PlanError
from motte.plan.plan import Tile
from motte.plan.planner import plan_parts, plan_under
from motte.split.oracle import check_parts, relative_difference, weights_of

DIMS = {"batch": 3}


class LyingEngine(TorchEngine):
    """Runs honestly, but changes what one node of a *part* gives; the whole model is left alone."""

    def __init__(self, node: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._node, self._change = node, change

    def compile(self, graph: Graph) -> Any:
        program = super().compile(graph)
        if ".part" not in graph.name or self._node not in graph.outputs:
            return program
        place, change = graph.outputs.index(self._node), self._change

        class Changed:
            def run(self, inputs: list[Any], weights: Mapping[str, Any], dims: Mapping[str, int]) -> list[Any]:
                made = program.run(inputs, weights, dims)
                made[place] = change(made[place])
                return made

        return Changed()


def chain(length: int = 5, width: int = 8) -> Graph:
    nodes, weights, previous = [], {}, "x"
    for index in range(length):
        weights[f"w{index}"] = Weight(f"w{index}", "f32", (width, width), (0, 1))
        out = Value(f"n{index}", TensorType("f32", (2, width)))
        nodes.append(Node(out.name, "aten.linear.default", (Ref(previous), WeightRef(f"w{index}")), {}, (out,)))
        previous = out.name
    inputs = (Value("x", TensorType("f32", (2, width))),)
    return Graph("chain", (), inputs, weights, tuple(nodes), (previous,), ("output",))


def values(graph: Graph, scale: float = 0.3) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weights = {name: scale * torch.randn(w.shape, generator=generator) for name, w in graph.weights.items()}
    return weights, [torch.randn(2, 8, generator=generator)]


@given(st.integers(0, 2**32), st.integers(3, 14), st.integers(1, 4))
def test_good_parts_agree(random_graphs: ModuleType, seed: int, count: int, parts: int) -> None:
    graph = random_graphs.random_graph(seed, count)
    if len(graph.nodes) < parts:
        parts = len(graph.nodes)
    plan = plan_parts(graph, parts=parts, objective="boundary", dims=DIMS)
    inputs = random_graphs.random_inputs(graph, DIMS)
    agreement = check_parts(graph, plan, TorchEngine(), random_graphs.random_weights(graph), inputs)
    assert len(inputs) == len(graph.inputs)
    assert agreement.parts == parts
    assert agreement.values >= len(graph.outputs)
    assert agreement.tiled_difference == 0.0


def one_bit(x: torch.Tensor) -> torch.Tensor:
    changed = x.clone()
    changed.view(-1)[3] = torch.nextafter(changed.view(-1)[3], torch.tensor(9.0))
    return changed


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (one_bit, "other bits"),
        (lambda x: x.double(), "another dtype"),
        (lambda x: x[:, :4], "another shape"),
        (lambda x: x.t().contiguous().t(), "another strides"),
        (lambda x: x.nan_to_num() * float("nan"), "other bits"),
    ],
)
def test_the_first_changed_value_is_named(change: Callable[[torch.Tensor], torch.Tensor], what: str) -> None:
    graph = chain()
    weights, inputs = values(graph)
    plan = plan_parts(graph, parts=5, objective="weights", dims={})
    with pytest.raises(MismatchError, match=what) as refused:
        check_parts(graph, plan, LyingEngine("n4", change), weights, inputs)
    assert refused.value.where == "value n4, made by part 5 of 5"


def test_a_change_in_the_middle_is_named_where_it_happens() -> None:
    graph = chain()
    weights, inputs = values(graph)
    plan = plan_parts(graph, parts=5, objective="weights", dims={})
    with pytest.raises(MismatchError) as refused:
        check_parts(graph, plan, LyingEngine("n1", one_bit), weights, inputs)
    assert refused.value.where == "value n1, made by part 2 of 5"
    assert "1 of 16 elements differ" in str(refused.value.got)


def test_minus_zero_is_another_bit_and_a_nan_equals_itself() -> None:
    graph = chain(2)
    weights, inputs = values(graph)
    plan = plan_parts(graph, parts=2, objective="weights", dims={})
    weights["w0"][0] = float("nan")
    check_parts(graph, plan, TorchEngine(), weights, inputs)
    weights["w0"] = torch.zeros(8, 8)
    with pytest.raises(MismatchError, match="other bits"):
        check_parts(graph, plan, LyingEngine("n0", lambda x: -x), weights, inputs)


def test_tiled_parts_agree_to_the_tolerance_and_a_lie_is_found() -> None:
    graph = chain()
    weights, inputs = values(graph)
    plan = plan_under(graph, max_part_bytes=192, objective="weights", dims={})
    assert {tile.node for tile in plan.tiles} == {node.name for node in graph.nodes}
    agreement = check_parts(graph, plan, TorchEngine(), weights, inputs)
    assert 0 <= agreement.tiled_difference <= 1e-6


def test_a_tile_that_is_not_the_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts and tiled graph agree with each other; only the comparison with the untiled graph can notice."""
    from motte.plan.tile import Tileable

    graph = chain(1)
    weights, inputs = values(graph)
    plan = replace(plan_parts(graph, parts=1, objective="weights", dims={}), tiles=(Tile("n0", 2),))
    check_parts(graph, plan, TorchEngine(), weights, inputs)
    monkeypatch.setattr(Tileable, "spans", lambda self, count: [(4, 8), (0, 4)])
    with pytest.raises(MismatchError, match="too far from the whole") as refused:
        check_parts(graph, plan, TorchEngine(), weights, inputs)
    assert refused.value.where == "output output"


def test_wrong_inputs_and_plans_are_refused() -> None:
    graph = chain()
    weights, inputs = values(graph)
    plan = plan_parts(graph, parts=2, objective="weights", dims={})
    with pytest.raises(InputError):
        check_parts(graph, plan, TorchEngine(), weights, [inputs[0][:, :4]])
    with pytest.raises(InputError):
        check_parts(graph, plan, TorchEngine(), weights, [])
    with pytest.raises(PlanError):
        check_parts(graph, replace(plan, graph_digest="0" * 64), TorchEngine(), weights, inputs)


def test_slices_keep_the_memory_order() -> None:
    source = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    graph = Graph(
        "one",
        (),
        (Value("x", TensorType("f32", (1, 4, 5, 5))),),
        {"w": Weight("w", "f32", (6, 4, 3, 3), (0, 2, 3, 1))},
        (
            Node(
                "y",
                "aten.conv2d.default",
                (Ref("x"), WeightRef("w")),
                {},
                (Value("y", TensorType("f32", (1, 6, 3, 3))),),
            ),
        ),
        ("y",),
        ("y",),
    )
    from motte.plan.tile import apply_tiles

    tiled = apply_tiles(graph, [Tile("y", 4)])
    for name, tensor in weights_of(tiled, {"w": source}).items():
        cut = tiled.weights[name].slice
        assert cut is not None
        assert torch.equal(tensor, source[cut.start : cut.stop])
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_relative_difference() -> None:
    assert relative_difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])) == 0
    assert relative_difference(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == 0.25
    assert relative_difference(torch.tensor([1.0]), torch.tensor([0.0])) == float("inf")
    assert not relative_difference(torch.tensor([float("nan")]), torch.tensor([1.0])) <= 1
    assert relative_difference(torch.empty(0), torch.empty(0)) == 0

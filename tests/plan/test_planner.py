"""Plans against brute force over every partition of random graphs; bounds, streams and chosen cuts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.capture.graph import Dim, Graph, Node, Ref, TensorType, Value, Weight, WeightRef
from motte.errors import PlanError
from motte.plan.costs import Costs, costs_of
from motte.plan.plan import Plan, Tile
from motte.plan.planner import OPTIMISED, plan_cuts, plan_parts, plan_streamed, plan_under
from motte.plan.rules import check_plan
from motte.plan.streamed import ARENA_SLACK_BYTES, PartNeed, aligned, copy_bytes, streamed_need
from motte.plan.tile import apply_tiles
from motte.split.layout import lay_out
from motte.split.split import split

seeds = st.integers(0, 2**32)


def ends_of(plan: Plan, graph: Graph) -> list[int]:
    names = [node.name for node in apply_tiles(graph, plan.tiles).nodes]
    return [*(names.index(name) + 1 for name in plan.cut_after), len(names)]


def weights(costs: Costs, start: int, end: int) -> int:
    held = {name for index in range(start, end) for name in costs.weights[index]}
    return sum(aligned(costs.weight_sizes[name]) for name in held)


def part_cost(costs: Costs, objective: str, times: dict[str, float], graph: Graph, start: int, end: int) -> int:
    """Each objective as it is defined, without any incremental bookkeeping."""
    match objective:
        case "weights":
            return weights(costs, start, end)
        case "memory":
            return weights(costs, start, end) + max(costs.live_bytes[start:end])
        case "time":
            return sum(round(times[node.name] * 1e9) for node in graph.nodes[start:end])
        case _:
            return costs.cut_bytes[start] + costs.cut_bytes[end]


def quality(costs: Costs, objective: str, times: dict[str, float], graph: Graph, ends: list[int]) -> tuple[int, int]:
    worst = max(part_cost(costs, objective, times, graph, a, b) for a, b in pairwise([0, *ends]))
    return worst, sum(costs.cut_bytes[end] for end in ends[:-1])


@given(seeds, st.integers(2, 7), st.sampled_from(OPTIMISED), st.integers(1, 4), st.data())
def test_optimal_on_random_graphs(
    random_graphs: ModuleType, seed: int, count: int, objective: str, batch: int, data: st.DataObject
) -> None:
    graph = random_graphs.random_graph(seed, count)
    costs = costs_of(graph, {"batch": batch})
    times = {node.name: data.draw(st.integers(0, 9)) * 1e-3 for node in graph.nodes}
    nodes = len(graph.nodes)
    parts = data.draw(st.integers(1, nodes))
    plan = plan_parts(
        graph, parts=parts, objective=objective, dims={"batch": batch}, times=times if objective == "time" else None
    )
    check_plan(plan, graph)
    assert plan.parts == parts
    every = ([*ends, nodes] for ends in combinations(range(1, nodes), parts - 1))
    best = min(quality(costs, objective, times, graph, ends) for ends in every)
    assert quality(costs, objective, times, graph, ends_of(plan, graph)) == best


def planned_or_refused(make: Callable[[], Plan]) -> Plan | PlanError:
    try:
        return make()
    except PlanError as refused:
        return refused


@given(seeds, st.integers(2, 12), st.sampled_from(["memory", "weights"]), st.floats(0.1, 1.1))
def test_under_a_bound_uses_the_fewest_parts(
    random_graphs: ModuleType, seed: int, count: int, objective: str, share: float
) -> None:
    graph = random_graphs.random_graph(seed, count)
    dims = {"batch": 2}
    bound = int(share * part_cost(costs_of(graph, dims), objective, {}, graph, 0, len(graph.nodes)))
    plan = planned_or_refused(lambda: plan_under(graph, max_part_bytes=bound, objective=objective, dims=dims))
    if isinstance(plan, PlanError):
        assert None not in (plan.where, plan.got, plan.hint)
        return
    check_plan(plan, graph)
    tiled = apply_tiles(graph, plan.tiles)
    costs = costs_of(tiled, dims)
    worst, _ = quality(costs, objective, {}, tiled, ends_of(plan, graph))
    assert worst <= bound
    if plan.parts > 1 and len(tiled.nodes) <= 12:
        fewer = ([*e, len(tiled.nodes)] for e in combinations(range(1, len(tiled.nodes)), plan.parts - 2))
        assert all(quality(costs, objective, {}, tiled, ends)[0] > bound for ends in fewer)
    for tile in plan.tiles:
        # One tile fewer would not do (nor, for two, none at all).
        index = next(i for i, node in enumerate(graph.nodes) if node.name == tile.node)
        whole = costs_of(graph, dims)
        live = whole.live_bytes[index] if objective == "memory" else 0
        assert weights(whole, index, index + 1) + live > bound
        if tile.count > 2:
            coarser = apply_tiles(graph, [Tile(tile.node, tile.count - 1)])
            at = costs_of(coarser, dims)
            tiles = [i for i, node in enumerate(coarser.nodes) if node.name.startswith(f"{tile.node}_tile")]
            lives = at.live_bytes if objective == "memory" else [0] * len(coarser.nodes)
            assert max(weights(at, i, i + 1) + lives[i] for i in tiles) > bound


def needs(plan: Plan, graph: Graph) -> list[PartNeed]:
    """As the trusted worker counts: laid-out bytes and the engine's copy, from the parts themselves."""
    return [PartNeed(lay_out(part.graph).bytes, copy_bytes(part.graph)) for part in split(graph, plan)]


@given(seeds, st.integers(2, 15), st.floats(0.1, 1.5))
def test_streamed_plans_keep_the_rule(random_graphs: ModuleType, seed: int, count: int, share: float) -> None:
    graph = random_graphs.random_graph(seed, count)
    memory = ARENA_SLACK_BYTES + int(share * weights(costs_of(graph, {"batch": 2}), 0, len(graph.nodes)))
    plan = planned_or_refused(lambda: plan_streamed(graph, weight_memory_bytes=memory, dims={"batch": 2}))
    if isinstance(plan, PlanError):
        assert plan.message == "one node alone is above the bound"
        return
    check_plan(plan, graph)
    assert streamed_need(needs(plan, graph)) <= memory


def test_streamed_need_is_cyclic_and_counts_the_copy() -> None:
    assert streamed_need([]) == ARENA_SLACK_BYTES
    assert streamed_need([PartNeed(100, 7)]) == 107 + ARENA_SLACK_BYTES
    assert streamed_need([PartNeed(100, 1), PartNeed(10, 2), PartNeed(90, 30)]) == 90 + 100 + 30 + ARENA_SLACK_BYTES


def value(name: str, *shape: int, dtype: str = "f32") -> Value:
    return Value(name, TensorType(dtype, shape))


def linears(*widths: int) -> Graph:
    """linear layers l0, l1, ... of these widths in modules net.0, net.1, ..., each with a relu behind it."""
    nodes: list[Node] = []
    stored: dict[str, Weight] = {}
    previous = "x"
    for index, (before, after) in enumerate(pairwise(widths)):
        stored[f"w{index}"] = Weight(f"w{index}", "f32", (after, before), (0, 1))
        args: tuple[Any, ...] = (Ref(previous), WeightRef(f"w{index}"))
        layer, active = value(f"l{index}", 1, after), value(f"r{index}", 1, after)
        nodes.append(Node(f"l{index}", "aten.linear.default", args, {}, (layer,), f"net.{index}.fc"))
        nodes.append(Node(f"r{index}", "aten.relu.default", (Ref(layer.name),), {}, (active,), f"net.{index}.act"))
        previous = f"r{index}"
    return Graph("linears", (), (value("x", 1, widths[0]),), stored, tuple(nodes), (previous,), ("output",))


def test_a_large_layer_is_tiled_until_it_streams() -> None:
    graph = linears(64, 64, 1024, 64)
    memory = 96 * 1024 + ARENA_SLACK_BYTES
    plan = plan_streamed(graph, weight_memory_bytes=memory, dims={})
    assert [tile.node for tile in plan.tiles] == ["l1", "l2"]
    assert streamed_need(needs(plan, graph)) <= memory


def test_a_model_that_fits_whole_streams_as_one_part() -> None:
    graph = linears(16, 16, 16)
    plan = plan_streamed(graph, weight_memory_bytes=3 * 1024 + ARENA_SLACK_BYTES, dims={})
    assert plan.parts == 1
    assert plan_streamed(graph, weight_memory_bytes=3 * 1024 + ARENA_SLACK_BYTES - 1, dims={}).parts > 1


def test_published_cuts_name_modules() -> None:
    graph = linears(8, 8, 8, 8)
    plan = plan_cuts(graph, cut_after=("net.0", "net.1.fc", "r1"), objective="published", dims={})
    assert plan.cut_after == ("r0", "l1", "r1")
    assert plan.objective == "published"
    check_plan(plan, graph)


def test_no_cut_is_one_part() -> None:
    plan = plan_cuts(linears(8, 8), cut_after=(), dims={})
    assert plan.parts == 1
    assert plan.objective == "chosen"


@pytest.mark.parametrize(
    ("cuts", "message", "hint"),
    [
        (("net.7",), "no node or module", "net."),
        (("nett.1.fc",), "no node or module", "net.1.fc"),
        (("net.1", "net.0"), "cuts out of order", "in the order"),
        (("net.0", "r0"), "two cuts in one place", "in the order"),
        (("net",), "nothing is left", None),
        (("net.0", "r2"), "nothing is left", None),
    ],
)
def test_wrong_cuts_are_refused(cuts: tuple[str, ...], message: str, hint: str | None) -> None:
    with pytest.raises(PlanError, match=message) as refused:
        plan_cuts(linears(8, 8, 8, 8), cut_after=cuts, dims={})
    assert hint is None or hint in str(refused.value.hint)


def test_wrong_requests_are_refused() -> None:
    graph = linears(8, 8, 8)
    with pytest.raises(PlanError, match="no such number of parts") as refused:
        plan_parts(graph, parts=5, objective="weights", dims={})
    assert refused.value.expected == "1 to 4 (the model has 4 nodes)"
    with pytest.raises(PlanError, match="no such number of parts"):
        plan_parts(graph, parts=0, objective="weights", dims={})
    with pytest.raises(PlanError, match="unknown objective"):
        plan_parts(graph, parts=2, objective="published", dims={})
    with pytest.raises(PlanError, match="unknown objective"):
        plan_under(graph, max_part_bytes=1000, objective="time", dims={})
    with pytest.raises(PlanError, match="unknown objective"):
        plan_cuts(graph, cut_after=(), objective="memory", dims={})
    with pytest.raises(PlanError, match="needs the time of every node"):
        plan_parts(graph, parts=2, objective="time", dims={})
    with pytest.raises(PlanError, match="a node has no time"):
        plan_parts(graph, parts=2, objective="time", dims={}, times={"l0": 1.0})
    with pytest.raises(PlanError, match="not a time in seconds"):
        plan_parts(graph, parts=2, objective="time", dims={}, times={n.name: float("nan") for n in graph.nodes})


def test_activations_above_the_bound_name_the_node() -> None:
    graph = linears(8, 4096, 8)
    with pytest.raises(PlanError, match="activations at one node alone") as refused:
        plan_under(graph, max_part_bytes=20_000, dims={})
    assert refused.value.where == "r0, aten.relu.default, module net.0.act"
    assert refused.value.got == "32768 bytes of activations"
    assert "a smaller batch" in str(refused.value.hint)


def test_a_node_that_cannot_be_tiled_finely_enough_is_named() -> None:
    with pytest.raises(PlanError, match="one node alone is above the bound") as refused:
        plan_under(linears(4096, 4), max_part_bytes=8_000, objective="weights", dims={})
    assert "l0" in str(refused.value.where)
    assert "cannot be tiled finely enough" in str(refused.value.hint)


def test_the_plan_states_its_dimensions(random_graphs: ModuleType) -> None:
    graph = random_graphs.random_graph(3, 6)
    assert plan_parts(graph, parts=2, objective="memory", dims={"batch": 5}).dims == (("batch", 5),)
    assert graph.dims == (Dim("batch", 1, 16),)

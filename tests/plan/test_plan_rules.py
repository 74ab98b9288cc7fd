"""Every rule of a plan is proved able to fail, and shows the line."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.capture.graph import Graph, WeightRef
from motte.errors import PlanError
from motte.limits import MAX_PARTS
from motte.plan.costs import costs_of
from motte.plan.offload import OffloadPlan, PlannedGpuReference, PlannedLayer, PlannedRank, nothing_leaves
from motte.plan.plan import Plan, Tile
from motte.plan.planner import plan_parts
from motte.plan.rules import RULES, check_plan
from motte.plan.table import plan_table


def some(random_graphs: ModuleType) -> tuple[Graph, Plan]:
    for seed in range(100):
        graph = random_graphs.random_graph(seed, 8)
        linear = [node.name for node in graph.nodes if node.op == "aten.linear.default"]
        if len(linear) > 1 and linear[0] != graph.nodes[0].name:
            graph = tied(graph)
            plan = plan_parts(graph, parts=3, objective="memory", dims={"batch": 2})
            return graph, replace(plan, tiles=(Tile(linear[0], 2), Tile(linear[1], 2)))
    raise AssertionError("no seed gives two linear layers")


def test_a_good_plan_passes_every_rule(random_graphs: ModuleType) -> None:
    graph, plan = some(random_graphs)
    check_plan(plan, graph)
    assert [rule.__doc__.split(":")[0] for rule in RULES.values()] == list(RULES)  # type: ignore[union-attr]


def tied(graph: Graph) -> Graph:
    """The weight of the first linear layer has a second name, ``tied.weight``."""
    name = first_weight(graph)
    return replace(graph, weights={**graph.weights, name: replace(graph.weights[name], aliases=("tied.weight",))})


def first_weight(graph: Graph) -> str:
    node = next(node for node in graph.nodes if node.op == "aten.linear.default")
    weight = node.args[1]
    assert isinstance(weight, WeightRef)
    return weight.name


MEASURED = (PlannedGpuReference("550.90.07", "96.00.9F.00.01", ((1, ("01" * 48,)),)),)


def section(*layers: PlannedLayer) -> dict[str, Any]:
    rank = PlannedRank("fixed", (2,))
    return {
        "offload": OffloadPlan(
            rank=rank,
            iterations=1,
            decomposition="als",
            residual_dtype="same",
            noise=None,
            integrity="freivalds",
            integrity_vectors=2,
            layers=layers,
        )
    }


def broken(plan: Plan, graph: Graph) -> list[tuple[str, dict[str, Any], str]]:
    """(rule, change, line that must be marked)."""
    last = graph.nodes[-1].name
    first, second = plan.cut_after
    one, two = plan.tiles
    weight = first_weight(graph)
    untiled = (PlannedLayer(weight, "inside", "why"), PlannedLayer("tied", "split", "why"))
    uncut = {"cut_after": ()}
    on_gpu = (PlannedLayer(weight, "confidential-gpu", "why"),)
    inside, split = PlannedLayer(weight, "inside", "why"), PlannedLayer(weight, "split", "why")
    many = tuple(f"n{i}" for i in range(MAX_PARTS))
    return [
        ("P-1", {"graph_digest": "0" * 64}, "graph 0000"),
        ("P-2", {"objective": "speed"}, "objective speed"),
        ("P-3", {"dims": ()}, f"objective {plan.objective}"),
        ("P-3", {"dims": (("beam", 2),)}, "dim beam 2"),
        ("P-3", {"dims": (("batch", 2), ("beam", 2))}, "dim beam 2"),
        ("P-3", {"dims": (("batch", 17),)}, "dim batch 17"),
        ("P-4", {"tiles": (Tile("nowhere", 2),)}, "tile nowhere 2"),
        ("P-4", {"tiles": (one, one)}, f"tile {one.node} 2"),
        ("P-4", {"tiles": (two, one)}, f"tile {one.node} 2"),
        ("P-4", {"tiles": (replace(one, count=99),)}, f"tile {one.node} 99"),
        ("P-5", {"cut_after": many}, f"cut {MAX_PARTS} after n{MAX_PARTS - 1}"),
        ("P-6", {"cut_after": (first, "nowhere")}, "cut 2 after nowhere"),
        ("P-7", {"cut_after": (second, first)}, f"cut 2 after {first}"),
        ("P-7", {"cut_after": (first, first)}, f"cut 2 after {first}"),
        ("P-8", {"cut_after": (first, last)}, f"cut 2 after {last}"),
        ("P-9", section(PlannedLayer("nowhere", "inside", "why")), "layer nowhere inside why"),
        ("P-9", section(PlannedLayer(graph.nodes[-1].name, "split", "why")), "split why"),
        ("P-10", section(PlannedLayer(weight, "split", "why")), f"layer {weight} split why"),
        ("P-11", section(*untiled) | {"tiles": ()} | uncut, "layer tied split why"),
        ("P-12", {"offload": nothing_leaves(on_gpu)} | {"tiles": ()} | uncut, f"layer {weight} confidential-gpu why"),
        ("P-12", {"offload": nothing_leaves((inside,), MEASURED)} | {"tiles": ()} | uncut, "offload trusted"),
        ("P-13", {"offload": nothing_leaves((split,))} | {"tiles": ()} | uncut, f"layer {weight} split why"),
    ]


def test_every_rule_can_fail_and_marks_its_line(random_graphs: ModuleType) -> None:
    graph, plan = some(random_graphs)
    cases = broken(plan, graph)
    assert {rule for rule, _, _ in cases} == set(RULES)
    for rule, change, line in cases:
        with pytest.raises(PlanError) as refused:
            check_plan(replace(plan, **change), graph)
        assert str(refused.value.where).endswith(f"rule {rule}")
        (marked,) = (text for text in str(refused.value.hint).splitlines() if text.startswith(">"))
        assert line in marked


@given(st.integers(0, 2**32), st.integers(3, 12), st.integers(1, 3))
def test_the_table_adds_up(random_graphs: ModuleType, seed: int, count: int, parts: int) -> None:
    graph = random_graphs.random_graph(seed, count)
    plan = plan_parts(graph, parts=parts, objective="weights", dims={"batch": 3})
    table = plan_table(plan, graph)
    costs = costs_of(graph, {"batch": 3})
    assert [row.part for row in table.rows] == list(range(1, parts + 1))
    assert table.totals.ops == len(graph.nodes) == sum(row.ops for row in table.rows)
    assert table.totals.flops == sum(costs.flops)
    assert table.totals.peak_activation_bytes == max(costs.live_bytes)
    assert table.totals.largest_memory_bytes == max(row.weight_bytes + row.peak_activation_bytes for row in table.rows)
    assert table.totals.distinct_weight_bytes <= table.totals.weight_bytes
    assert table.totals.cut_bytes == sum(row.entering_bytes for row in table.rows[1:])
    assert tuple(row.last_node for row in table.rows[:-1]) == plan.cut_after


def test_the_table_at_other_dimensions(random_graphs: ModuleType) -> None:
    graph = random_graphs.random_graph(5, 8)
    plan = plan_parts(graph, parts=2, objective="memory", dims={"batch": 1})
    small, large = plan_table(plan, graph), plan_table(plan, graph, {"batch": 8})
    assert large.dims == {"batch": 8}
    assert large.totals.peak_activation_bytes == 8 * small.totals.peak_activation_bytes
    with pytest.raises(PlanError, match="made for another graph"):
        plan_table(replace(plan, graph_digest="0" * 64), graph)

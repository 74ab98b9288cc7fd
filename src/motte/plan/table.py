"""A plan as a table: what each part holds, makes and sends. Data only; the command line prints it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from motte.capture.graph import Graph
from motte.plan.costs import Costs, costs_of
from motte.plan.plan import Plan
from motte.plan.rules import check_plan
from motte.plan.tile import apply_tiles


@dataclass(frozen=True, slots=True)
class PartRow:
    """One part; ``part`` counts from 1.

    ``weight_bytes``: distinct weights. ``peak_activation_bytes``: the most activations held while it runs, values that
    only pass by it included. ``entering_bytes`` and ``leaving_bytes``: distinct storages live across its two ends.
    ``copy_bytes``: the engine's largest own copy of a weight.
    """

    part: int
    first_node: str
    last_node: str
    ops: int
    weight_bytes: int
    peak_activation_bytes: int
    flops: int
    entering_bytes: int
    leaving_bytes: int
    copy_bytes: int

    @property
    def memory_bytes(self) -> int:
        """What the objective ``memory`` counts: weights plus peak activations."""
        return self.weight_bytes + self.peak_activation_bytes


@dataclass(frozen=True, slots=True)
class Totals:
    """``weight_bytes`` sums the parts, so a weight that two parts hold counts twice; ``distinct_weight_bytes`` once.

    ``cut_bytes``: everything that crosses the cuts between parts, in one run.
    """

    ops: int
    weight_bytes: int
    distinct_weight_bytes: int
    largest_weight_bytes: int
    largest_memory_bytes: int
    peak_activation_bytes: int
    flops: int
    cut_bytes: int


@dataclass(frozen=True, slots=True)
class PlanTable:
    """The rows in order, the totals, and the dimensions at which activations and FLOPs were counted."""

    rows: tuple[PartRow, ...]
    totals: Totals
    dims: Mapping[str, int]


def plan_table(plan: Plan, graph: Graph, dims: Mapping[str, int] | None = None) -> PlanTable:
    """The table of ``plan`` for the captured ``graph``, at ``dims`` (default: the plan's own).

    Raises:
        PlanError: the plan breaks a rule, or the dims do not fit the graph.
    """
    check_plan(plan, graph)
    tiled = apply_tiles(graph, plan.tiles)
    stated = dict(plan.dims) if dims is None else dict(dims)
    costs = costs_of(tiled, stated)
    position = {node.name: index for index, node in enumerate(tiled.nodes)}
    ends = [*(position[name] + 1 for name in plan.cut_after), len(tiled.nodes)]
    starts = [0, *ends[:-1]]
    rows = tuple(
        _row(tiled, costs, index, start, end) for index, (start, end) in enumerate(zip(starts, ends, strict=True), 1)
    )
    return PlanTable(rows, _totals(costs, rows), stated)


def _row(graph: Graph, costs: Costs, part: int, start: int, end: int) -> PartRow:
    return PartRow(
        part=part,
        first_node=graph.nodes[start].name,
        last_node=graph.nodes[end - 1].name,
        ops=end - start,
        weight_bytes=costs.weight_bytes(range(start, end)),
        peak_activation_bytes=max(costs.live_bytes[start:end]),
        flops=sum(costs.flops[start:end]),
        entering_bytes=costs.cut_bytes[start],
        leaving_bytes=costs.cut_bytes[end],
        copy_bytes=max(costs.copy_bytes[start:end]),
    )


def _totals(costs: Costs, rows: tuple[PartRow, ...]) -> Totals:
    return Totals(
        ops=sum(row.ops for row in rows),
        weight_bytes=sum(row.weight_bytes for row in rows),
        distinct_weight_bytes=costs.weight_bytes(range(len(costs.weights))),
        largest_weight_bytes=max(row.weight_bytes for row in rows),
        largest_memory_bytes=max(row.memory_bytes for row in rows),
        peak_activation_bytes=max(row.peak_activation_bytes for row in rows),
        flops=sum(row.flops for row in rows),
        cut_bytes=sum(row.leaving_bytes for row in rows[:-1]),
    )

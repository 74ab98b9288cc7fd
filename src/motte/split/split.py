"""Cutting: one graph for each part of a plan. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from motte.capture.graph import Graph, Node, Value, read_values, read_weights
from motte.plan.plan import Plan
from motte.plan.rules import check_plan
from motte.plan.storage import Remade, weight_views
from motte.plan.tile import apply_tiles


@dataclass(frozen=True, slots=True)
class Part:
    """Part ``index`` (from 0) as a graph of its own.

    Its inputs are the values that it reads and does not make; its outputs those that it makes and that a later part
    reads or the model returns; both in order of definition. A value that passes by untouched is neither: whoever runs
    the chain keeps it. Its weights are exactly those that it reads. A view of a weight never crosses a cut: every part
    that reads one makes it again, so a part may repeat a few nodes of earlier ones.
    """

    index: int
    graph: Graph


def split(graph: Graph, plan: Plan, *, checked: bool = False) -> tuple[Part, ...]:
    """The parts of the captured (untiled) ``graph``, in order.

    Args:
        checked: the plan was checked against this graph already.

    Raises:
        PlanError: the plan breaks a rule (:func:`motte.plan.rules.check_plan` runs first).
    """
    if not checked:
        check_plan(plan, graph)
    tiled = apply_tiles(graph, plan.tiles)
    position = {node.name: index for index, node in enumerate(tiled.nodes)}
    ends = [*(position[name] + 1 for name in plan.cut_after), len(tiled.nodes)]
    return _split_at(tiled, ends)


def _split_at(graph: Graph, ends: list[int]) -> tuple[Part, ...]:
    views = weight_views(graph)
    values = graph.values()
    ranges = [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    chosen = [_nodes_of(graph, own, views, returned=own.stop == len(graph.nodes)) for own in ranges]
    inputs = [_inputs_of(nodes, values) for nodes in chosen]
    needed = {value.name for part in inputs for value in part} | set(graph.outputs)
    parts = []
    for index, (own, nodes, given) in enumerate(zip(ranges, chosen, inputs, strict=True)):
        made = (value.name for step in own for value in graph.nodes[step].outputs if value is not None)
        outputs = [name for name in made if name in needed and name not in views]
        if own.stop == len(graph.nodes):
            outputs += dict.fromkeys(name for name in graph.outputs if name in views)
        read = {name for node in nodes for name in read_weights(node)}
        part = replace(
            graph,
            name=f"{graph.name}.part{index + 1}",
            inputs=given,
            weights={name: weight for name, weight in graph.weights.items() if name in read},
            nodes=nodes,
            outputs=tuple(outputs),
            output_names=tuple(outputs),
        )
        parts.append(Part(index, part))
    return tuple(parts)


def _nodes_of(graph: Graph, own: range, views: Mapping[str, Remade], *, returned: bool) -> tuple[Node, ...]:
    """The part's own nodes, and in front of them those of earlier parts that make the views of weights it reads."""
    wanted: Iterable[str] = [name for step in own for name in read_values(graph.nodes[step])]
    if returned:
        wanted = [*wanted, *graph.outputs]
    steps = set(own).union(*(views[name].chain for name in wanted if name in views))
    return tuple(graph.nodes[step] for step in sorted(steps))


def _inputs_of(nodes: tuple[Node, ...], values: Mapping[str, Value]) -> tuple[Value, ...]:
    made = {value.name for node in nodes for value in node.outputs if value is not None}
    read = {name for node in nodes for name in read_values(node)} - made
    return tuple(value for name, value in values.items() if name in read)

"""What a bench knows of a model without running it: sizes of inputs, FLOPs on both sides, the drawing of its plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from motte.bench.case import PlanDrawing, PlanPart
from motte.bench.inputs import InputSpec, dims_for, specs_of
from motte.capture.graph import DTYPE_BYTES, Graph
from motte.capture.sizes import shape_of
from motte.capture.text import digest
from motte.offload.graph_layers import graph_layers, public_names, split_nodes
from motte.offload.layers import LinearLayer, Trace
from motte.offload.placement import Placement, from_plan
from motte.offload.work import work
from motte.plan.costs import costs_of
from motte.plan.plan import Plan
from motte.plan.table import plan_table


@dataclass(frozen=True)
class Subject:
    """A captured model at one batch. ``flops``: of one forward pass, a multiply-add counted as 2."""

    name: str
    weights_origin: str
    graph: Graph
    dims: Mapping[str, int]
    inputs: tuple[InputSpec, ...]
    flops: int
    weight_bytes: int
    dtype: str
    graph_digest: str


def subject_of(graph: Graph, name: str, weights_origin: str, batch: int, asked: Mapping[str, int]) -> Subject:
    """Count what there is to count of ``graph`` at ``batch`` and the sizes that were ``asked`` for.

    Raises:
        UnsupportedError: the model does not take this batch, or inputs that cannot be made.
        SettingError: a dimension that it does not have.
    """
    dims = dims_for(graph, batch, asked)
    costs = costs_of(graph, dims)
    kinds = {weight.dtype for weight in graph.weights.values()}
    return Subject(
        name=name,
        weights_origin=weights_origin,
        graph=graph,
        dims=dims,
        inputs=specs_of(graph, dims),
        flops=sum(costs.flops),
        weight_bytes=costs.weight_bytes(range(len(graph.nodes))),
        dtype=next((kind for kind in ("f32", "f64", "bf16", "f16") if kind in kinds), "f32"),
        graph_digest=digest(graph),
    )


def split_flops(subject: Subject, plan: Plan) -> tuple[int, int]:
    """FLOPs of one pass (trusted, outside) under the offload section of ``plan``, by count (b) of the offload work:
    low-rank products, decomposition, per-sample weights and checks are the trusted side's, and element-wise work too.

    For rank rules that look at the data the trusted count is the most that it can be.
    """
    section = plan.offload
    if section is None:
        return subject.flops, 0
    nodes = split_nodes(subject.graph, section, public_names(subject.graph, section))
    values, weights = subject.graph.values(), subject.graph.weights
    shapes: dict[str, list[tuple[int, ...]]] = {}
    layers: dict[str, LinearLayer] = {}
    for node in nodes:
        name = section.split[node.position]
        given = shape_of(values[node.linear.input].type, subject.dims)
        padded = _padded(given, node.linear.pad)
        shapes.setdefault(name, []).append(padded)
        layers[name] = LinearLayer(
            name=name,
            operation=node.linear.operation,
            shapes=tuple(shapes[name]),
            element_bytes=DTYPE_BYTES[values[node.linear.input].type.dtype],
            weight=weights[node.linear.weight].shape,
            must_stay=None,
            meets_raw_input=False,
            runs_last=False,
            per_sample=True,
            input_gradient=False,
            weight_gradient=False,
        )
    scheme, placement = from_plan(section)
    chosen = Placement(tuple(each for each in placement.layers if each.name in layers))
    batch = max(1, math.prod(subject.inputs[0].shape[:1]))
    table = work(Trace(tuple(layers.values()), batch, 0, (), 0), None, scheme, chosen)
    outside = 2 * sum(row.outside_forward for row in table.rows)
    inside = 2 * table.inside("forward").total
    return subject.flops - outside + inside, outside


def drawing(subject: Subject, plan: Plan, *, memory_bound_bytes: int | None = None) -> PlanDrawing:
    """The parts of ``plan``, to be drawn."""
    from motte.plan.tile import apply_tiles

    table = plan_table(plan, subject.graph, subject.dims)
    tiled = apply_tiles(subject.graph, plan.tiles)
    split = set() if plan.offload is None else set(plan.offload.split)
    of_node = {
        node.linear.node: plan.offload.split[node.position]
        for node in (
            split_nodes(subject.graph, plan.offload, public_names(subject.graph, plan.offload)) if plan.offload else ()
        )
        if plan.offload is not None
    }
    parts, at = [], 0
    for row in table.rows:
        names = [node.name for node in tiled.nodes[at : at + row.ops]]
        at += row.ops
        outside = tuple(dict.fromkeys(of_node[name] for name in names if of_node.get(name) in split))
        parts.append(
            PlanPart(
                first=row.first_node,
                last=row.last_node,
                nodes=row.ops,
                weight_bytes=row.weight_bytes,
                activation_bytes=row.peak_activation_bytes,
                side="trusted",
                outside=outside,
            )
        )
    return PlanDrawing(objective=plan.objective, parts=tuple(parts), memory_bound_bytes=memory_bound_bytes)


def whole_drawing(subject: Subject, *, side: str) -> PlanDrawing:
    """One part that holds everything: what a native or accelerator case runs."""
    graph = subject.graph
    costs = costs_of(graph, subject.dims)
    layers = tuple(layer.name for layer in graph_layers(graph)) if side == "outside" else ()
    whole = PlanPart(
        first=graph.nodes[0].name,
        last=graph.nodes[-1].name,
        nodes=len(graph.nodes),
        weight_bytes=subject.weight_bytes,
        activation_bytes=max(costs.live_bytes),
        side=side,
        outside=layers,
    )
    return PlanDrawing(objective="whole", parts=(whole,))


def _padded(shape: tuple[int, ...], pad: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    if not pad:
        return shape
    spatial = [extent + sum(ends) for extent, ends in zip(shape[-len(pad) :], pad, strict=True)]
    return (*shape[: -len(pad)], *spatial)

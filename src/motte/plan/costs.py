"""What each node, and each possible cut, of a graph costs at stated dimensions: weights, activations, FLOPs.

Activations are counted by storage (:mod:`motte.plan.storage`) and never below what the torch engine holds in tensors:
graph inputs count until their last use, graph outputs to the end, outputs that nobody uses while their node runs.
Scratch memory inside one operation (oneDNN's reordered activations) is no tensor and is not counted; its copy of a
weight is (:mod:`motte.plan.streamed`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from motte.capture.graph import Graph, Node, read_values
from motte.capture.sizes import bytes_of, shape_of
from motte.errors import PlanError
from motte.plan.flops import flops_of
from motte.plan.plan import Plan
from motte.plan.storage import held_weights, is_view, storages, weight_views
from motte.plan.streamed import copy_bytes_of
from motte.plan.tile import apply_tiles

_UNUSED_OUTPUT_BYTES = 8
"""An output that nobody uses has no type in the graph. 8 bytes (an int64 index) per element of its largest sibling is
the most that any op of the table gives: the positions that a max pooling returns beside its maxima."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of a graph with n nodes at ``dims``.

    Attributes:
        weights: per node, the weights that its part must hold, by name.
        weight_sizes: bytes of each weight.
        live_bytes: per node, activation bytes held while it runs: what is live before it, and what it makes.
        cut_bytes: n + 1 entries; entry i is the bytes of the distinct storages live between node i-1 and node i.
            Entry 0 is the graph's inputs, entry n its outputs.
        flops: per node.
        copy_bytes: per node, the engine's own copy of a weight.
    """

    dims: Mapping[str, int]
    weights: tuple[tuple[str, ...], ...]
    weight_sizes: Mapping[str, int]
    live_bytes: tuple[int, ...]
    cut_bytes: tuple[int, ...]
    flops: tuple[int, ...]
    copy_bytes: tuple[int, ...]

    def weight_bytes(self, nodes: Iterable[int]) -> int:
        """Bytes of the distinct weights that the nodes with these indices read."""
        names = {name for index in nodes for name in self.weights[index]}
        return sum(self.weight_sizes[name] for name in names)


def costs_of(graph: Graph, dims: Mapping[str, int]) -> Costs:
    """Count everything.

    Args:
        dims: a value for every dynamic dimension of ``graph``.

    Raises:
        PlanError: a dimension that is missing, unknown or out of its range.
        GraphError: a size that cannot be computed at these dimensions.
    """
    check_dims(graph, dims)
    views = weight_views(graph)
    values = graph.values()
    shapes = {name: shape_of(value.type, dims) for name, value in values.items()}
    stored = {name: weight.shape for name, weight in graph.weights.items()}
    sizes = {name: bytes_of(value.type, dims) for name, value in values.items()}
    count = len(graph.nodes)
    # Differences: a storage is held while nodes start..end run, and lies across the cuts start+1..end.
    live, cut = [0] * (count + 2), [0] * (count + 2)
    for storage in storages(graph, views, sizes):
        size = sizes[storage.value]
        live[max(storage.start, 0)] += size
        live[storage.end + 1] -= size
        cut[storage.start + 1] += size
        cut[storage.end + 1] -= size
    unused = [_unused_bytes(node, shapes) for node in graph.nodes]
    return Costs(
        dims=dict(dims),
        weights=tuple(held_weights(graph, views)),
        weight_sizes={name: weight.bytes for name, weight in graph.weights.items()},
        live_bytes=tuple(held + extra for held, extra in zip(accumulate(live), unused, strict=False)),
        cut_bytes=tuple(accumulate(cut[: count + 1])),
        flops=tuple(flops_of(node, shapes, stored, view=is_view(node)) for node in graph.nodes),
        copy_bytes=tuple(copy_bytes_of(node, graph, views) for node in graph.nodes),
    )


def peak_activation_bytes(graph: Graph, plan: Plan, dims: Mapping[str, int]) -> int:
    """The most activation bytes that a run of the whole chain of parts holds at once, at ``dims``."""
    return max(costs_of(apply_tiles(graph, plan.tiles), dims).live_bytes, default=0)


def check_dims(graph: Graph, dims: Mapping[str, int]) -> None:
    """Refuse dimensions that ``graph`` does not have, lacks, or cannot take.

    Raises:
        PlanError: naming the dimension and its range.
    """
    known = {dim.name: dim for dim in graph.dims}
    for name in dims:
        if name not in known:
            raise PlanError(
                "the model has no such dimension", got=name, expected=", ".join(known) or "none", where=graph.name
            )
    for name, dim in known.items():
        if name not in dims:
            raise PlanError("a dimension has no value", where=name, hint=f"state a value from {dim.low} to {dim.high}")
        if not dim.low <= dims[name] <= dim.high:
            raise PlanError(
                "a dimension is out of its range", where=name, expected=f"{dim.low} to {dim.high}", got=str(dims[name])
            )


def _unused_bytes(node: Node, shapes: Mapping[str, tuple[int, ...]]) -> int:
    missing = node.outputs.count(None)
    if not missing or is_view(node):
        return 0
    known = [value.name for value in node.outputs if value is not None]
    # The first result is the largest of all; where it is one of the unused, it has no more elements than what was read.
    if node.outputs[0] is None:
        known += read_values(node)
    elements = max((prod(shapes[name]) for name in known), default=0)
    return missing * elements * _UNUSED_OUTPUT_BYTES

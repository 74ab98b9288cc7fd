"""The convolutions and linear layers of a graph, by the stored weight that each reads. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from motte.capture.graph import Graph, Node, Weight, WeightRef, read_weights

LINEAR_OPS: Final = frozenset(
    {
        *(f"aten.conv{dims}d.{overload}" for dims in (1, 2, 3) for overload in ("default", "padding")),
        "aten.conv_transpose1d.default",
        "aten.conv_transpose2d.input",
        "aten.conv_transpose3d.input",
        "aten.convolution.default",
        "aten.linear.default",
    }
)
"""Operations with a weight as their second argument and, perhaps, a bias as their third."""


def linear_nodes(graph: Graph) -> dict[str, tuple[Node, ...]]:
    """The nodes that multiply with each stored weight, by the weight's name, in the order in which they run."""
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        name = linear_weight(node)
        if name is not None:
            found.setdefault(name, []).append(node)
    return {name: tuple(nodes) for name, nodes in found.items()}


def linear_weight(node: Node) -> str | None:
    """The stored weight that ``node`` multiplies with; None: another operation, or a computed weight."""
    if node.op not in LINEAR_OPS or len(node.args) < 2:
        return None
    weight = node.args[1]
    return weight.name if isinstance(weight, WeightRef) else None


def other_readers(graph: Graph, weight: str) -> Iterator[Node]:
    """Nodes that read ``weight`` in any other way than as the weight of a convolution or linear layer."""
    for node in graph.nodes:
        if weight in read_weights(node):
            elsewhere = (*node.args[:1], *node.args[2:], *node.kwargs.values())
            if linear_weight(node) != weight or WeightRef(weight) in elsewhere:
                yield node


def layer_weight(graph: Graph, layer: str) -> Weight | None:
    """The stored weight of the layer ``layer``, tied names included: a module path, or, where a weight's name does not
    end in ``.weight``, its whole name."""
    names = (f"{layer}.weight", *(() if layer.endswith(".weight") else (layer,)))
    for name in names:
        if name in graph.weights:
            return graph.weights[name]
    return next((weight for weight in graph.weights.values() if set(names) & set(weight.aliases)), None)

"""Who owns which memory: values that are views of one storage, and values that are views of a weight.

Memory is counted by storage, not by value: a view holds its base alive and adds nothing. A view of a *weight* holds no
activation, but it must not outlive the part's weights, which a streamed run overwrites. So such a value never crosses
a cut: every part that reads it makes it again (:class:`Remade`), which costs nothing, since it is a view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from motte.capture.graph import Graph, Node, Ref, Value, WeightRef, references
from motte.capture.ops import OPS

_VIEWS = """
    view.default _unsafe_view.default permute.default transpose.int t.default expand.default squeeze.default squeeze.dim
    squeeze.dims unsqueeze.default slice.Tensor select.int narrow.default split.Tensor split.sizes
    split_with_sizes.default chunk.default unbind.int unflatten.int movedim.int movedim.intlist swapaxes.default
    swapdims.default diagonal.default unfold.default alias.default detach.default expand_as.default view_as.default
    tensor_split.sections tensor_split.indices broadcast_to.default adjoint.default mT.default numpy_T.default
    positive.default
"""
_ONLY_VIEWS = frozenset(f"aten.{name}" for name in _VIEWS.split())
"""Views of their first tensor, always. Any other op that the table marks as a view (``reshape``, ``contiguous``) may
copy instead, and may be a view of any tensor that it reads: it counts as both."""


def is_view(node: Node) -> bool:
    """Whether outputs of ``node`` may share the storage of a tensor that it reads."""
    spec = OPS.get(node.op)
    if spec is None or not spec.view:
        return False
    # einsum is a view only of a single operand (a transposition); with two or more it multiplies.
    return not (node.op == "aten.einsum.default" and sum(1 for _ in references(node)) > 1)


def bases_of(node: Node) -> tuple[Ref | WeightRef, ...]:
    """The tensors that the outputs of ``node`` may be views of."""
    if not is_view(node):
        return ()
    found = tuple(references(node))
    return found[:1] if node.op in _ONLY_VIEWS else found


def owns_memory(node: Node) -> bool:
    """Whether outputs of ``node`` may be new storage."""
    return not (is_view(node) and node.op in _ONLY_VIEWS and any(True for _ in references(node)))


@dataclass(frozen=True, slots=True)
class Remade:
    """How a part makes a view of a weight again.

    Attributes:
        chain: indices of the nodes to run, in order.
        weights: what they read of the stored weights.
        values: what else they read: normal values, which stay live for it. Nearly always empty.
    """

    chain: tuple[int, ...]
    weights: tuple[str, ...]
    values: tuple[str, ...]


def weight_views(graph: Graph) -> dict[str, Remade]:
    """Every value that may be a view of a weight, by name."""
    found: dict[str, Remade] = {}
    for index, node in enumerate(graph.nodes):
        if not any(isinstance(base, WeightRef) or base.name in found for base in bases_of(node)):
            continue
        values, weights = reads(node, found)
        before = [found[ref.name] for ref in references(node) if isinstance(ref, Ref) and ref.name in found]
        chain = sorted({index, *(step for remade in before for step in remade.chain)})
        remade = Remade(tuple(chain), weights, values)
        found.update((value.name, remade) for value in node.outputs if value is not None)
    return found


def reads(node: Node, views: Mapping[str, Remade]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The values and the weights that a part must hold to run ``node``, views of weights made again."""
    values: dict[str, None] = {}
    weights: dict[str, None] = {}
    for ref in references(node):
        if isinstance(ref, WeightRef):
            weights[ref.name] = None
        elif ref.name in views:
            values.update(dict.fromkeys(views[ref.name].values))
            weights.update(dict.fromkeys(views[ref.name].weights))
        else:
            values[ref.name] = None
    return tuple(values), tuple(weights)


def held_weights(graph: Graph, views: Mapping[str, Remade]) -> list[tuple[str, ...]]:
    """For each node, the weights that its part must hold. A returned view of a weight is made by the last part."""
    found = [reads(node, views)[1] for node in graph.nodes]
    if found:
        returned = [name for output in graph.outputs if output in views for name in views[output].weights]
        found[-1] = tuple(dict.fromkeys((*found[-1], *returned)))
    return found


@dataclass(slots=True)
class Storage:
    """One block of activation memory, live from ``start`` to ``end`` (node indices; -1: before the first node).

    ``value`` is the value that it was made for, whose type gives its size.
    """

    start: int
    end: int
    value: str


def storages(graph: Graph, views: Mapping[str, Remade], sizes: Mapping[str, int]) -> list[Storage]:
    """Every storage with its life: from the node that makes it to the last one that reads any of its views.

    ``sizes`` are the bytes of every value. An engine may write an element-wise result over its first argument; where
    that is a view of a part of a larger storage, the whole of it may live on, and counts beside the result.
    An output of the graph lives to ``len(nodes)``. A graph input that nobody reads lives through the first node.
    """
    found: list[Storage] = []
    of_value: dict[str, tuple[Storage, ...]] = {}

    def new(name: str, start: int, end: int) -> Storage:
        found.append(Storage(start, end, name))
        return found[-1]

    def extend(name: str, end: int) -> None:
        for storage in of_value[name]:
            storage.end = max(storage.end, end)

    values = graph.values()
    for given in graph.inputs:
        of_value[given.name] = (new(given.name, -1, 0),)
    for index, node in enumerate(graph.nodes):
        for name in (*(ref.name for ref in references(node) if isinstance(ref, Ref)), *reads(node, views)[0]):
            extend(name, index)
        shared = {id(s): s for base in bases_of(node) if isinstance(base, Ref) for s in of_value[base.name]}
        if not shared:
            shared = {id(s): s for s in _overwritten(node, values, of_value, sizes)}
        owns = owns_memory(node)
        for value in node.outputs:
            if value is not None:
                own = (new(value.name, index, index),) if owns else ()
                of_value[value.name] = (*shared.values(), *own)
    for output in graph.outputs:
        for name in (output, *(views[output].values if output in views else ())):
            extend(name, len(graph.nodes))
    return found


def _overwritten(
    node: Node, values: Mapping[str, Value], of_value: Mapping[str, tuple[Storage, ...]], sizes: Mapping[str, int]
) -> tuple[Storage, ...]:
    """Larger storages that the result of ``node`` may lie in, if it is written over the first argument."""
    first = node.args[0] if node.args else None
    result = node.outputs[0] if len(node.outputs) == 1 else None
    if not isinstance(first, Ref) or result is None or values[first.name].type != result.type:
        return ()
    return tuple(storage for storage in of_value[first.name] if sizes[storage.value] > sizes[first.name])

"""Where a result may take the memory of its first argument: found once per graph, from who can share memory with whom.

Eager models write ``relu_`` and ``out += identity``; a captured graph has lost that, and an activation more per layer
costs memory and time. An operation may reuse its first argument's memory when nobody can see the difference: the memory
was made inside this graph, no other live value can share it, and the result has its type. Whether the *strides* would
be the same too is known only when it runs (:func:`motte.engines.torch_engine`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from motte.capture.graph import Graph, Node, Ref, TensorType, WeightRef, references
from motte.capture.ops import OPS

INPLACE: Final[Mapping[str, str]] = {
    "aten.relu.default": "relu_",
    "aten.hardtanh.default": "hardtanh_",
    "aten.hardswish.default": "hardswish_",
    "aten.hardsigmoid.default": "hardsigmoid_",
    "aten.sigmoid.default": "sigmoid_",
    "aten.silu.default": "silu_",
    "aten.leaky_relu.default": "leaky_relu_",
    "aten.elu.default": "elu_",
    "aten.neg.default": "neg_",
    "aten.add.Tensor": "add_",
    "aten.sub.Tensor": "sub_",
    "aten.mul.Tensor": "mul_",
    "aten.div.Tensor": "div_",
}
"""Element-wise operations whose in-place form runs the same arithmetic on every element."""


def reusable(graph: Graph) -> frozenset[str]:
    """Names of the nodes that may write their result over their first argument."""
    memory = _Memory(graph, _last_uses(graph))
    types = {name: value.type for name, value in graph.values().items()}
    chosen = set()
    for index, node in enumerate(graph.nodes):
        memory.add(node)
        if node.op in INPLACE and _fits(node, types) and memory.free_after(node, index):
            memory.join(node)
            chosen.add(node.name)
    return frozenset(chosen)


def _last_uses(graph: Graph) -> dict[str, int]:
    """The index of the last node that reads each value; past the end for an output of the graph."""
    last: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        last.update((ref.name, index) for ref in references(node) if isinstance(ref, Ref))
    last.update((name, len(graph.nodes)) for name in graph.outputs)
    return last


def _fits(node: Node, types: Mapping[str, TensorType]) -> bool:
    """The result has the first argument's type, and a second tensor has it too: nothing is broadcast or promoted."""
    first, result = node.args[0], node.outputs[0] if node.outputs else None
    if not isinstance(first, Ref) or result is None or types[first.name] != result.type:
        return False
    rest = (*node.args[1:], *node.kwargs.values())
    if any(isinstance(arg, WeightRef | tuple) for arg in rest):
        return False
    return all(types[arg.name] == result.type and arg.name != first.name for arg in rest if isinstance(arg, Ref))


class _Memory:
    """Groups of values that may share memory (a union-find): which this graph made itself, and who reads them last."""

    def __init__(self, graph: Graph, last_use: Mapping[str, int]) -> None:
        self._last_use = last_use
        self._parent: dict[str, str] = {}
        self._until: dict[str, int] = {}
        self._own: set[str] = set()
        for value in graph.inputs:
            self._new(value.name)

    def _new(self, name: str) -> None:
        self._parent[name] = name
        self._until[name] = self._last_use.get(name, -1)

    def root(self, name: str) -> str:
        while self._parent[name] != name:
            self._parent[name] = name = self._parent[self._parent[name]]
        return name

    def _merge(self, one: str, other: str) -> None:
        a, b = self.root(one), self.root(other)
        if a == b:
            return
        self._parent[b] = a
        self._until[a] = max(self._until[a], self._until.pop(b))
        if not (a in self._own and b in self._own):
            self._own.discard(a)

    def add(self, node: Node) -> None:
        """Enter the results of ``node``: new memory, or, after a view, that of anything that it reads."""
        results = [value.name for value in node.outputs if value is not None]
        reads = list(references(node))
        view = OPS[node.op].view
        for name in results:
            self._new(name)
            if not (view and any(isinstance(ref, WeightRef) for ref in reads)):
                self._own.add(name)
        # Several results of one operation count as one memory: nothing promises that they are apart.
        for name in results[1:]:
            self._merge(results[0], name)
        if view and results:
            for ref in reads:
                if isinstance(ref, Ref):
                    self._merge(ref.name, results[0])

    def free_after(self, node: Node, index: int) -> bool:
        """Whether the first argument's memory is this graph's own, and ``node`` is the last that can see it."""
        first = node.args[0]
        if not isinstance(first, Ref):
            return False
        root = self.root(first.name)
        if root not in self._own:
            return False
        others = {self.root(ref.name) for ref in references(node) if isinstance(ref, Ref) and ref.name != first.name}
        return root not in others and self._until[root] <= index

    def join(self, node: Node) -> None:
        """Enter that the result of ``node`` takes the memory of its first argument."""
        first, result = node.args[0], node.outputs[0]
        if isinstance(first, Ref) and result is not None:
            self._merge(first.name, result.name)

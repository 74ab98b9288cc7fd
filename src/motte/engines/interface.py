"""What an engine is: something that compiles a graph once and runs it on tensors, given weights on every call.

Weights are an argument of ``run`` and not of ``compile``, because a streamed worker holds them for one part at a time.
An engine keeps no reference to weights or inputs after ``run`` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from motte.capture.graph import Graph

Array = Any
"""The engine's own tensor type: ``torch.Tensor`` for the torch engine, ``numpy.ndarray`` for the others."""

NodeRunner = Callable[..., Array]
"""What runs one node in place of the engine: called with the node's arguments in the order of its schema, tensors and
plain values as the engine would see them, and those behind the last tensor by keyword. Gives the node's one result, in
memory of its own: a later operation may write over it. It must not write to its arguments or keep them."""


class Program(Protocol):
    """A compiled graph."""

    def run(self, inputs: list[Array], weights: Mapping[str, Array], dims: Mapping[str, int]) -> list[Array]:
        """Run once.

        Args:
            inputs: in the graph's order. The list is **emptied**: the program drops each input after its last use, so
                that activations do not outlive their need. Inputs are never written to.
            weights: by name, as the graph's ``weights`` list them. Never written to.
            dims: the value of every named dynamic dimension of the graph.

        Returns:
            The graph's outputs, in order, with the strides that the operations gave them.
        """
        ...


class Engine(Protocol):
    """A way to run graphs."""

    name: str

    def compile(self, graph: Graph, *, runners: Mapping[str, NodeRunner] | None = None) -> Program:
        """Prepare ``graph`` (a **verified** one) to run; the nodes named in ``runners`` are run by these."""
        ...

    def weight(self, graph: Graph, name: str, buffer: memoryview) -> Array:
        """View ``buffer`` (exactly the weight's bytes, in its memory order) as the weight ``name``; copies nothing."""
        ...

    def from_bytes(self, dtype: str, shape: tuple[int, ...], data: memoryview) -> Array:
        """A tensor of the graph dtype ``dtype`` over row-major ``data``, writable or not; may share its memory."""
        ...

    def to_bytes(self, array: Array) -> tuple[str, tuple[int, ...], memoryview]:
        """Graph dtype, shape and row-major bytes of a tensor of any strides."""
        ...

"""What an engine is: something that compiles a graph once and runs it on tensors.

Two ways, since a streamed worker holds weights for one part at a time and a resident one holds them all: ``compile``
gives a :class:`Program` that takes its weights on every call, ``load`` a :class:`Bound` that has them. An engine keeps
no reference to inputs after ``run`` returns, and to weights only in a ``Bound``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from motte.capture.graph import Graph

Array = Any
"""The engine's own tensor type: ``torch.Tensor`` for the torch engine, ``numpy.ndarray`` for the others."""

NodeRunner = Callable[..., Array]
"""What runs one node in place of the engine: called with the node's arguments in the order of its schema, tensors and
plain values as the engine would see them, and those behind the last tensor by keyword. Gives the node's one result, in
memory of its own: a later operation may write over it. It must not write to its arguments or keep them."""


@dataclass(frozen=True, slots=True)
class OnnxProgram:
    """A graph, or one part of one, as ONNX without a single weight value (:mod:`motte.lower` makes it).

    Three serialised ``ModelProto`` messages. Protobuf merges what is concatenated, so ``core + weight_inputs`` is a
    model that takes its weights as inputs, and ``core + weight_initializers`` one whose weights are external
    initializers, to be given from memory. Inputs of ``core``: the graph's inputs by name and in order, then one int64
    scalar for each name of ``dims``, called as :func:`dim_input` says. Weights have their names in the graph and
    their **stored** shape: dimensions in memory order.
    """

    core: bytes
    weight_inputs: bytes
    weight_initializers: bytes
    dims: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of the three messages."""
        return len(self.core) + len(self.weight_inputs) + len(self.weight_initializers)


def dim_input(name: str) -> str:
    """Name of the ONNX input that carries the value of the dynamic dimension ``name``. No graph value is so called."""
    return f"dim:{name}"


class Program(Protocol):
    """A compiled graph that is given its weights with every call."""

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


class Bound(Protocol):
    """A compiled graph that has its weights."""

    copy_bytes: int | None
    """What the engine holds of the weights beside the arrays that it was given, in bytes as measured when it was
    loaded; None: it cannot be told."""

    def run(self, inputs: list[Array], dims: Mapping[str, int]) -> list[Array]:
        """Run once; inputs, dims and result as of :meth:`Program.run`."""
        ...


class Engine(Protocol):
    """A way to run graphs.

    ``joins``: a resident worker gives it the whole graph at once rather than part by part, because it runs that faster.
    ``needs_lowered``: it runs ONNX, and refuses a graph without its lowered form.
    """

    name: str
    joins: bool
    needs_lowered: bool

    def compile(
        self, graph: Graph, *, lowered: OnnxProgram | None = None, runners: Mapping[str, NodeRunner] | None = None
    ) -> Program:
        """Prepare ``graph`` (a **verified** one) to run; the nodes named in ``runners`` are run by these.

        Raises:
            UnsupportedError: no lowered form where one is needed, or runners that this engine cannot use.
            GraphError: the engine refuses the graph or its lowered form.
        """
        ...

    def load(self, graph: Graph, weights: Mapping[str, Array], *, lowered: OnnxProgram | None = None) -> Bound:
        """Prepare ``graph`` to run on ``weights``, by name, which are read in place as far as the engine can.

        Raises:
            UnsupportedError, GraphError: see :meth:`compile`.
        """
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

"""The captured model: a straight line of tensor operations from a closed table, in plain data classes.

Nothing here needs torch, so that every stage and a trusted worker without torch can hold a graph. Three choices keep it
simple for whoever reads or checks it:

* every value is a tensor. Ops with several results have several ``outputs``; there are no tuples of values;
* sizes that depend on a dynamic dimension are *expressions* over the named dimensions (``"4*batch"``), evaluated when
  the graph runs. There are no integer values, so a cut carries tensors only;
* nodes stand in one order, which is the order in which they run and along which a plan cuts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

GRAPH_VERSION = 1

DTYPE_BYTES: Mapping[str, int] = {
    "f64": 8, "f32": 4, "f16": 2, "bf16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1, "bool": 1,
}  # fmt: skip
"""Element types that a graph may hold, with their size in bytes."""


@dataclass(frozen=True, slots=True)
class Size:
    """An integer that depends on named dimensions: ``text`` in the grammar of :mod:`motte.capture.sizes`."""

    text: str


Extent = int | Size


@dataclass(frozen=True, slots=True)
class Dim:
    """A named dynamic dimension and its inclusive range."""

    name: str
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type and shape of a value; the shape may depend on dynamic dimensions."""

    dtype: str
    shape: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Value:
    """A named tensor that flows: a graph input or one output of a node."""

    name: str
    type: TensorType


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows ``start:stop`` of dimension ``axis`` of the stored weight ``source``: what a tile reads."""

    source: str
    axis: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Weight:
    """A stored tensor: parameter, buffer or constant.

    ``order`` is the permutation of the dimensions from outermost to innermost in memory ((0, 1, 2, 3) is contiguous,
    (0, 2, 3, 1) is channels-last). Keeping it keeps the bits of the result. ``aliases`` are the further names under
    which a tied weight appears in the state_dict.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    aliases: tuple[str, ...] = ()
    slice: Slice | None = None

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def bytes(self) -> int:
        """Stored size in bytes."""
        return self.elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Ref:
    """An argument that is a value: a graph input or a node's output."""

    name: str


@dataclass(frozen=True, slots=True)
class WeightRef:
    """An argument that is a stored weight."""

    name: str


@dataclass(frozen=True, slots=True)
class DType:
    """An argument that is an element type, by its name in :data:`DTYPE_BYTES`."""

    name: str


@dataclass(frozen=True, slots=True)
class MemoryFormat:
    """An argument that is a memory format: ``contiguous``, ``preserve``, ``channels_last`` or ``channels_last_3d``."""

    name: str


Arg = None | bool | int | float | str | Size | Ref | WeightRef | DType | MemoryFormat | tuple["Arg", ...]


@dataclass(frozen=True, slots=True)
class Node:
    """One operation.

    ``op`` is a name of the closed table (``aten.conv2d.default``). ``outputs`` has one entry per result of the op; None
    where nobody uses that result. ``module`` is the path of the nn.Module that ran it (``layer1.0.conv1``, empty for
    the root), ``source`` the file and line of the user's model, for messages.
    """

    name: str
    op: str
    args: tuple[Arg, ...]
    kwargs: Mapping[str, Arg] = field(default_factory=dict)
    outputs: tuple[Value | None, ...] = ()
    module: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Graph:
    """A whole model, or one part of one.

    ``inputs`` are in calling order, ``outputs`` name values (a node's output or an input) in returning order;
    ``output_names`` are what the caller sees (``logits``, ``last_hidden_state``; ``output`` when there is one).
    """

    name: str
    dims: tuple[Dim, ...]
    inputs: tuple[Value, ...]
    weights: Mapping[str, Weight]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    output_names: tuple[str, ...]

    def values(self) -> dict[str, Value]:
        """Every value by name, inputs first, in order of definition."""
        found = {value.name: value for value in self.inputs}
        for node in self.nodes:
            found.update((value.name, value) for value in node.outputs if value is not None)
        return found


def references(node: Node) -> Iterator[Ref | WeightRef]:
    """Every value and weight that ``node`` reads, in argument order, repeats included."""

    def walk(arg: Arg) -> Iterator[Ref | WeightRef]:
        if isinstance(arg, Ref | WeightRef):
            yield arg
        elif isinstance(arg, tuple):
            for item in arg:
                yield from walk(item)

    for arg in (*node.args, *node.kwargs.values()):
        yield from walk(arg)


def read_values(node: Node) -> tuple[str, ...]:
    """Names of the values that ``node`` reads, each once."""
    return tuple(dict.fromkeys(ref.name for ref in references(node) if isinstance(ref, Ref)))


def read_weights(node: Node) -> tuple[str, ...]:
    """Names of the weights that ``node`` reads, each once."""
    return tuple(dict.fromkeys(ref.name for ref in references(node) if isinstance(ref, WeightRef)))

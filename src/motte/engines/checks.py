"""What every engine checks of what it is given, and how it says so. Imports no tensor library.

``has_type`` and ``described`` are the engine's own: whether an array has a type, and a text that tells its type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from motte.capture.graph import Graph, TensorType, Value, WeightRef, references
from motte.capture.sizes import shape_of
from motte.engines.interface import NodeRunner, OnnxProgram
from motte.errors import GraphError, InputError, UnsupportedError

HasType = Callable[[Any, TensorType, tuple[int, ...]], bool]


def used_weights(graph: Graph) -> tuple[str, ...]:
    """Names of the weights that a node of ``graph`` reads, in the graph's order."""
    used = {ref.name for node in graph.nodes for ref in references(node) if isinstance(ref, WeightRef)}
    return tuple(name for name in graph.weights if name in used)


def read_sizes(graph: Graph, dims: Mapping[str, int]) -> tuple[int, ...]:
    """The value of each dynamic dimension of ``graph``, in its order.

    Raises:
        InputError: one has no value.
    """
    try:
        return tuple(dims[dim.name] for dim in graph.dims)
    except KeyError as problem:
        raise InputError("no size for a dynamic dimension", got=str(problem.args[0])) from problem


def check_sizes(graph: Graph, sizes: Sequence[int]) -> dict[str, int]:
    """What :func:`read_sizes` gave, by name.

    Raises:
        InputError: one is out of its range.
    """
    for dim, size in zip(graph.dims, sizes, strict=True):
        if not dim.low <= size <= dim.high:
            expected = f"{dim.low} to {dim.high}"
            raise InputError(f"size of dimension {dim.name!r} out of range", expected=expected, got=str(size))
    return {dim.name: size for dim, size in zip(graph.dims, sizes, strict=True)}


def check_arrays(
    values: Sequence[Value],
    shapes: Sequence[tuple[int, ...]],
    arrays: Sequence[Any],
    *,
    has_type: HasType,
    described: Callable[[Any], str],
) -> None:
    """Compare what is given as a graph's inputs with what it says; ``shapes`` are those of ``values``.

    Raises:
        InputError: another number, or one has another type.
    """
    if len(arrays) != len(values):
        raise InputError("wrong number of inputs", expected=str(len(values)), got=str(len(arrays)))
    for value, shape, array in zip(values, shapes, arrays, strict=True):
        if not has_type(array, value.type, shape):
            expected = f"{value.type.dtype} {shape}"
            raise InputError(f"input {value.name!r} has another type", expected=expected, got=described(array))


def check_weights(names: Sequence[str], weights: Mapping[str, Any]) -> None:
    """Raises: InputError: a weight of ``names`` is missing."""
    for name in names:
        if name not in weights:
            raise InputError("a weight is missing", got=name)


def check_outputs(
    values: Sequence[Value],
    shapes: Sequence[tuple[int, ...]],
    arrays: Sequence[Any],
    *,
    has_type: HasType,
    described: Callable[[Any], str],
) -> None:
    """Compare a graph's results with what it says.

    Raises:
        GraphError: one has another type.
    """
    for value, shape, array in zip(values, shapes, arrays, strict=True):
        if not has_type(array, value.type, shape):
            raise GraphError(
                "an output has another type than the graph says",
                where=value.name,
                expected=f"{value.type.dtype} {shape}",
                got=described(array),
            )


def need_lowered(
    engine: str, graph: Graph, lowered: OnnxProgram | None, runners: Mapping[str, NodeRunner] | None = None
) -> OnnxProgram:
    """What an engine that runs ONNX alone is to run.

    Raises:
        UnsupportedError: no lowered form, or nodes that something else is to run.
        GraphError: it has a dimension that ``graph`` does not have.
    """
    if runners:
        raise UnsupportedError(
            f"the {engine} engine runs every node itself", where=graph.name, hint="use the torch engine"
        )
    if lowered is None:
        raise UnsupportedError(
            f"the {engine} engine needs the lowered form of a graph", where=graph.name, hint="use the torch engine"
        )
    unknown = set(lowered.dims) - {dim.name for dim in graph.dims}
    if unknown:
        raise GraphError("the lowered graph has other dimensions", where=graph.name, got=", ".join(sorted(unknown)))
    return lowered


_MAX_KEPT: Final = 16
"""Sets of dimensions for which a program keeps its evaluated sizes."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """Concrete shapes of a graph's inputs and outputs, for one set of dimensions."""

    sizes: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]


class Checks:
    """All of the above for one graph. Safe to use from several threads."""

    def __init__(self, graph: Graph, *, has_type: HasType, described: Callable[[Any], str]) -> None:
        values = graph.values()
        self.outputs = tuple(values[name] for name in graph.outputs)
        self._graph, self._has_type, self._described = graph, has_type, described
        self._kept: dict[tuple[int, ...], Shapes] = {}

    def check_inputs(self, inputs: Sequence[Any], dims: Mapping[str, int]) -> Shapes:
        """Raises: InputError: a dimension or an input is missing, out of range, or of another type."""
        shapes = self._shapes(dims)
        check_arrays(self._graph.inputs, shapes.inputs, inputs, has_type=self._has_type, described=self._described)
        return shapes

    def check_outputs(self, outputs: Sequence[Any], shapes: Shapes) -> None:
        """Raises: GraphError: an output has another type than the graph says."""
        check_outputs(self.outputs, shapes.outputs, outputs, has_type=self._has_type, described=self._described)

    def _shapes(self, dims: Mapping[str, int]) -> Shapes:
        key = read_sizes(self._graph, dims)
        found = self._kept.get(key)
        if found is None:
            sizes = check_sizes(self._graph, key)
            found = Shapes(
                sizes=key,
                inputs=tuple(shape_of(value.type, sizes) for value in self._graph.inputs),
                outputs=tuple(shape_of(value.type, sizes) for value in self.outputs),
            )
            # A new dictionary, since another thread may be reading the old one.
            kept = dict(list(self._kept.items())[1 - _MAX_KEPT :])
            kept[key] = found
            self._kept = kept
        return found

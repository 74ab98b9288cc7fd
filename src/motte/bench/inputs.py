"""Inputs of a bench: what a model takes at one batch, and the seeded workload that every case of it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from motte.capture.graph import Graph
from motte.capture.sizes import shape_of
from motte.errors import SettingError, UnsupportedError
from motte.measure.workloads import ArraySpec, Workload, random_workload

if TYPE_CHECKING:
    from numpy.typing import NDArray

OTHER_SIZE: Final = 128
"""Of a dynamic dimension other than the batch, within its range: a text of 128 tokens."""
_NUMPY: Final = {
    "f64": "float64", "f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32", "i16": "int16",
    "i8": "int8", "u8": "uint8", "bool": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class InputSpec:
    """One input: its name in ``forward``, element type as graphs name it, and shape with the batch in front."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def dims_for(graph: Graph, batch: int, asked: Mapping[str, int]) -> dict[str, int]:
    """A size for every dynamic dimension of ``graph``; ``asked``: of those other than the batch.

    Raises:
        UnsupportedError: the graph was captured at another, fixed batch, or takes no such size.
        SettingError: a dimension that it does not have.
    """
    known = [dim.name for dim in graph.dims if dim.name != "batch"]
    for name in asked:
        if name not in known:
            expected = ", ".join(known) or "none: every other size of this model is fixed"
            raise SettingError("no such dynamic dimension", where=f"--dim, {graph.name}", expected=expected, got=name)
    sizes: dict[str, int] = {}
    for dim in graph.dims:
        wanted = batch if dim.name == "batch" else asked.get(dim.name, min(dim.high, max(dim.low, OTHER_SIZE)))
        if not dim.low <= wanted <= dim.high:
            raise UnsupportedError(
                f"the model does not take this {dim.name}", where=graph.name, expected=f"{dim.low} to {dim.high}",
                got=str(wanted),
            )  # fmt: skip
        sizes[dim.name] = wanted
    if "batch" not in sizes:
        first = graph.inputs[0].type.shape[0] if graph.inputs and graph.inputs[0].type.shape else None
        if first != batch:
            raise UnsupportedError("the model has a fixed batch", where=graph.name, expected=str(first), got=str(batch))
    return sizes


def specs_of(graph: Graph, dims: Mapping[str, int]) -> tuple[InputSpec, ...]:
    """The inputs of ``graph`` at ``dims``, in its order.

    Raises:
        UnsupportedError: an element type that numpy does not have.
    """
    found = []
    for value in graph.inputs:
        if value.type.dtype not in _NUMPY:
            raise UnsupportedError("no such input can be made", where=value.name, got=value.type.dtype)
        found.append(InputSpec(value.name, value.type.dtype, shape_of(value.type, dims)))
    return tuple(found)


def workload_of(specs: Sequence[InputSpec], seed: int) -> Workload:
    """One request of seeded noise: the same in every process that asks for it."""
    return random_workload({each.name: ArraySpec(_NUMPY[each.dtype], each.shape) for each in specs}, seed=seed)


def make_inputs(specs: Sequence[InputSpec], seed: int) -> dict[str, NDArray[Any]]:
    """The arrays of :func:`workload_of`, copied: some engines insist on memory that may be written to."""
    return {name: np.array(array) for name, array in workload_of(specs, seed).request(0).items()}

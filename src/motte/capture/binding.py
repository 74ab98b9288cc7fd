"""From the tensors that a caller gives to the values of the named dimensions, or one clear refusal."""

from __future__ import annotations

from collections.abc import Sequence

from motte.capture.graph import Graph, Size, TensorType
from motte.capture.sizes import shape_of
from motte.errors import InputError


def describe(type_: TensorType) -> str:
    """The type as people write it: ``f32 [batch, 3, 224, 224]``."""
    return f"{type_.dtype} [{', '.join(e.text if isinstance(e, Size) else str(e) for e in type_.shape)}]"


def bind_dims(graph: Graph, given: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, int]:
    """The value of every dynamic dimension of ``graph``, from the dtype and shape of each **unverified** input.

    Raises:
        InputError: another number of inputs, another dtype or shape, or a dimension outside its range.
    """
    if len(given) != len(graph.inputs):
        raise InputError(
            "wrong number of inputs",
            where=graph.name,
            expected=f"{len(graph.inputs)} ({', '.join(value.name for value in graph.inputs)})",
            got=str(len(given)),
        )
    dims: dict[str, int] = {}
    for value, (_, shape) in zip(graph.inputs, given, strict=True):
        for extent, actual in zip(value.type.shape, shape, strict=False):
            if isinstance(extent, Size) and extent.text.isidentifier():
                dims.setdefault(extent.text, actual)
    for dim in graph.dims:
        if dim.name not in dims:
            raise InputError("a dimension follows from no input", where=graph.name, got=dim.name)
        if not dim.low <= dims[dim.name] <= dim.high:
            raise InputError(
                "dimension out of range", where=dim.name, expected=f"{dim.low} to {dim.high}", got=str(dims[dim.name])
            )
    for value, (dtype, shape) in zip(graph.inputs, given, strict=True):
        if dtype != value.type.dtype or shape != shape_of(value.type, dims):
            raise InputError(
                "an input has another type",
                where=value.name,
                expected=describe(value.type),
                got=f"{dtype} {list(shape)}",
            )
    return dims

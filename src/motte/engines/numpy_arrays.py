"""Tensors of the engines without torch: numpy arrays in row-major order. Imports numpy only.

numpy has no bfloat16: such a tensor is an array of ``uint16`` that holds its bits. No other graph type is ``uint16``,
so the dtype of an array tells its graph type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from motte.capture.graph import Graph, TensorType
from motte.errors import InputError

NumpyArray = np.ndarray[Any, np.dtype[Any]]

DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "f64": np.dtype(np.float64), "f32": np.dtype(np.float32), "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16), "i64": np.dtype(np.int64), "i32": np.dtype(np.int32), "i16": np.dtype(np.int16),
    "i8": np.dtype(np.int8), "u8": np.dtype(np.uint8), "bool": np.dtype(np.bool_),
}  # fmt: skip
DTYPE_NAMES: Final[Mapping[np.dtype[Any], str]] = {dtype: name for name, dtype in DTYPES.items()}


def weight_view(graph: Graph, name: str, buffer: memoryview) -> NumpyArray:
    """View ``buffer`` as the weight ``name`` of ``graph`` in its **stored** shape: dimensions in memory order.

    Copies nothing; the array keeps the buffer alive. Let it start at a multiple of 64 bytes, as the engines' own
    allocations do.

    Raises:
        InputError: the buffer has another length, or does not start at a multiple of the element size.
    """
    weight = graph.weights[name]
    if buffer.nbytes != weight.bytes:
        lengths = (f"{weight.bytes} bytes", f"{buffer.nbytes} bytes")
        raise InputError(f"buffer of weight {name!r} has another length", expected=lengths[0], got=lengths[1])
    shape = tuple(weight.shape[dim] for dim in weight.order)
    found = _over(buffer, DTYPES[weight.dtype], shape)
    if not found.flags.aligned:
        expected = f"a multiple of {found.itemsize} bytes"
        raise InputError(f"buffer of weight {name!r} is not aligned", expected=expected)
    return found


def from_bytes(dtype: str, shape: tuple[int, ...], data: memoryview) -> NumpyArray:
    """An array of the graph dtype ``dtype`` over row-major ``data``; shares its memory unless that is not aligned.

    Raises:
        InputError: ``data`` has another length.
    """
    kind = DTYPES[dtype]
    if data.nbytes != math.prod(shape) * kind.itemsize:
        found = f"{data.nbytes} bytes for {dtype} {list(shape)}"
        raise InputError("tensor bytes do not match its shape", got=found)
    array = _over(data, kind, shape)
    return array if array.flags.aligned else array.copy()


def to_bytes(array: NumpyArray) -> tuple[str, tuple[int, ...], memoryview]:
    """Graph dtype, shape and row-major bytes of an array of any strides."""
    flat = np.asarray(array, order="C").reshape(-1).view(np.uint8)
    return DTYPE_NAMES[array.dtype], tuple(array.shape), flat.data


def has_type(array: Any, type_: TensorType, shape: tuple[int, ...]) -> bool:
    """Whether ``array`` is a numpy array of this type and shape."""
    return isinstance(array, np.ndarray) and array.dtype == DTYPES[type_.dtype] and array.shape == shape


def described(array: Any) -> str:
    """Type and shape of ``array`` for a message."""
    if not isinstance(array, np.ndarray):
        return type(array).__name__
    return f"{DTYPE_NAMES.get(array.dtype, str(array.dtype))} {tuple(array.shape)}"


def _over(data: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NumpyArray:
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, buffer=data)

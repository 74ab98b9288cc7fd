"""Where the graph's own words meet torch: element types, memory formats, memory order, operations. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

import torch

from motte.capture.graph import DTYPE_BYTES, DType, MemoryFormat, Weight
from motte.capture.ops import OPS
from motte.errors import GraphError

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64,
    "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
DTYPE_NAMES: Final[Mapping[torch.dtype, str]] = {dtype: name for name, dtype in DTYPES.items()}
MEMORY_FORMATS: Final[Mapping[str, torch.memory_format]] = {
    "contiguous": torch.contiguous_format,
    "preserve": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
MEMORY_FORMAT_NAMES: Final[Mapping[torch.memory_format, str]] = {value: name for name, value in MEMORY_FORMATS.items()}


@lru_cache(maxsize=1024)
def overload(op: str) -> Callable[..., Any]:
    """The torch operator behind an operation of the closed table.

    Raises:
        GraphError: ``op`` is not in the table, or this torch does not have it.
    """
    if op not in OPS:
        raise GraphError("operation not in the table", got=op)
    namespace, name, kind = op.split(".")
    try:
        found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), name), kind)
    except AttributeError as problem:
        raise GraphError("this torch does not have the operation", got=f"{op}, torch {torch.__version__}") from problem
    return found


def plain_argument(arg: DType | MemoryFormat) -> torch.dtype | torch.memory_format:
    """The torch object behind an element type or memory format."""
    return DTYPES[arg.name] if isinstance(arg, DType) else MEMORY_FORMATS[arg.name]


def memory_order(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions of ``tensor`` from outermost to innermost in memory; None when it does not fill its memory."""
    natural = tuple(range(tensor.dim()))
    if tensor.is_contiguous() and tensor.stride() == torch.empty(tensor.shape, device="meta").stride():
        return natural
    # Stride first, then position: a channels-last tensor with extents of 1 gets its own strides back (see `restore`).
    strides = tensor.stride()
    order = tuple(sorted(natural, key=lambda dim: (-strides[dim], dim)))
    if tensor.permute(order).is_contiguous():
        return order
    return None


def identity(tensor: torch.Tensor) -> tuple[object, ...]:
    """Equal for two tensors that are the same memory seen the same way; an empty tensor equals only itself."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def flatten(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The elements of ``tensor`` in the order in which they lie in memory, one-dimensional; a view where it can be."""
    return tensor.detach().permute(order).reshape(-1)


def restore(flat: torch.Tensor, weight: Weight) -> torch.Tensor:
    """``flat`` (one-dimensional, in memory order) as the weight: its shape and strides; a view, copies nothing."""
    inverse = sorted(range(len(weight.order)), key=lambda position: weight.order[position])
    return flat.view([weight.shape[dim] for dim in weight.order]).permute(inverse)


def dtype_name(dtype: torch.dtype) -> str:
    """The graph's name of an element type.

    Raises:
        GraphError: a type that a graph may not hold.
    """
    if dtype not in DTYPE_NAMES:
        raise GraphError("element type not supported", expected=" ".join(DTYPE_BYTES), got=str(dtype))
    return DTYPE_NAMES[dtype]

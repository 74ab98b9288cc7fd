"""torch tensors to and from the bytes that cross, and the copy out of shared memory that finds what is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
import torch

from motte.accelerator.buffers import Array, bytes_of_array
from motte.errors import InputError
from motte.link.calls import Tensor as WireTensor
from motte.link.region import Region

DTYPES: Final[Mapping[torch.dtype, str]] = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16"}
TORCH_DTYPES: Final[Mapping[str, torch.dtype]] = {name: dtype for dtype, name in DTYPES.items()}
ANSWER_DTYPES: Final[Mapping[str, str]] = {"f64": "f64", "f32": "f32", "bf16": "f32"}
"""Element type of an answer by that of what was sent."""
_PIECE: Final = 1 << 17
"""Elements that are copied at a time: what was just copied is checked while the cache still holds it."""
_SMALL: Final = 1 << 14


def wire_dtype(tensor: torch.Tensor, *, where: str) -> str:
    """Name of the element type of a tensor that may be sent.

    Raises:
        InputError: it lies on another device, or its type cannot cross.
    """
    name = DTYPES.get(tensor.dtype)
    if name is None or not tensor.is_cpu or tensor.layout is not torch.strided:
        expected = "a dense float64, float32 or bfloat16 tensor on the CPU"
        raise InputError(
            "cannot be sent to an accelerator", where=where, expected=expected, got=f"{tensor.dtype}, {tensor.device}"
        )
    return name


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor without a history; the view writes through."""
    if tensor.dtype is torch.bfloat16:  # which numpy does not have
        tensor = tensor.view(torch.int16)
    return bytes_of_array(tensor.numpy())


def from_bytes(data: bytes | memoryview, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of its own from recorded bytes."""
    made = torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    bytes_of(made)[:] = data
    return made


class RegionTensors:
    """Tensors that lie in a shared region."""

    def __init__(self, region: Region) -> None:
        self.all = torch.frombuffer(region.memory, dtype=torch.uint8)

    def view(self, tensor: WireTensor) -> torch.Tensor:
        """The tensor where it lies. The other side can change it at any moment."""
        if tensor.offset is None:
            raise ValueError("an inline tensor lies in no region")
        flat = self.all[tensor.offset : tensor.offset + tensor.bytes]
        return flat.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)


def copy_in(shared: torch.Tensor, into: torch.Tensor) -> bool:
    """Copy ``shared`` into our own memory; whether every copied value is finite. Reads ``shared`` once."""
    source, copy = shared.view(-1), into.view(-1)
    finite = True
    for start in range(0, copy.numel(), _PIECE):
        piece = copy[start : start + _PIECE]
        piece.copy_(source[start : start + _PIECE])
        finite = _is_finite(piece) and finite
    return finite


def is_finite(array: Array) -> bool:
    """Whether every value is finite."""
    if array.size <= _SMALL:
        # As in _is_finite.
        return math.isfinite(np.vdot(array, array)) or bool(np.isfinite(array).all())
    flat = torch.from_numpy(array).view(-1)
    return all(_is_finite(flat[start : start + _PIECE]) for start in range(0, flat.numel(), _PIECE))


def _is_finite(piece: torch.Tensor) -> bool:
    # The sum of squares is the cheapest pass that any NaN or Inf turns into NaN or Inf. Large finite values do that
    # too: then every one is looked at.
    return math.isfinite(float(torch.dot(piece, piece))) or bool(torch.isfinite(piece).all())

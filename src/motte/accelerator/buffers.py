"""Private memory that tensors are copied into: numpy arrays, since making one costs a third of what a tensor does.

Large ones are used again once nothing refers to them any more: memory that the system hands out anew is filled with
zeros page by page first, which takes twice as long as the copy itself. Small ones that are used up at once lie on a
:class:`Desk`.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from motte.limits import MIB
from motte.link.calls import Tensor as WireTensor

Array = np.ndarray[Any, np.dtype[Any]]
_NUMPY: Final[dict[str, np.dtype[Any]]] = {
    "f64": np.dtype(np.float64),
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(np.int16),
}
"""bfloat16, which numpy does not have, travels in 16-bit integers."""
_POOLED_BYTES: Final = 1 * MIB
_ALIGNMENT: Final = 4096
DEFAULT_KEPT_BYTES: Final = 256 * MIB
_DESK_BYTES: Final = 16 << 10
_MAX_ON_DESK: Final = 1024


class Buffers:
    """Hands out uninitialised arrays.

    Args:
        kept_bytes: of free memory that is kept for later; the longest unused goes first.
    """

    def __init__(self, kept_bytes: int = DEFAULT_KEPT_BYTES) -> None:
        self._limit = kept_bytes
        self._kept = 0
        self._free: OrderedDict[int, Array] = OrderedDict()
        # Reentrant: an array may die, and come back here, at any allocation of this very thread.
        self._lock = threading.RLock()

    @property
    def kept_bytes(self) -> int:
        """Free memory at the moment, in bytes."""
        return self._kept

    def take(self, tensor: WireTensor) -> Array:
        """Room for ``tensor``. Large ones come back by themselves when the last reference to the array is gone."""
        size = tensor.bytes
        if size < _POOLED_BYTES:
            return np.empty(tensor.shape, _NUMPY[tensor.dtype])
        block = self._reuse(size)
        if block is None:
            block = _aligned(size)
        array = block.view(_NUMPY[tensor.dtype]).reshape(tensor.shape)
        weakref.finalize(array, self._give_back, block).atexit = False
        return array

    def _reuse(self, size: int) -> Array | None:
        with self._lock:
            for key, block in self._free.items():
                if block.nbytes == size:
                    del self._free[key]
                    self._kept -= size
                    return block
        return None

    def _give_back(self, block: Array) -> None:
        with self._lock:
            self._free[id(block)] = block
            self._kept += block.nbytes
            while self._kept > self._limit:
                _, dropped = self._free.popitem(last=False)
                self._kept -= dropped.nbytes


class Room(NamedTuple):
    """The same memory as bytes and as a tensor."""

    bytes: memoryview
    tensor: torch.Tensor


class Desk:
    """Room for tensors that are used up at once: a small one is kept for the next of the same type and shape.

    To make an array, look at its bytes and wrap it in a tensor takes longer than a small product.

    Args:
        buffers: where the room for large ones comes from, which is not kept.
    """

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._rooms: dict[WireTensor, Room] = {}

    def room(self, tensor: WireTensor) -> Room:
        """Where ``tensor`` can lie until the next one that is like it comes."""
        found = self._rooms.get(tensor)
        if found is None:
            array = self._buffers.take(tensor)
            found = Room(bytes_of_array(array), as_tensor(array, tensor.dtype))
            if array.nbytes <= _DESK_BYTES:
                if len(self._rooms) >= _MAX_ON_DESK:
                    self._rooms.clear()
                self._rooms[tensor] = found
        return found


def _aligned(size: int) -> Array:
    # numpy starts 16 bytes into a page, where every wide store of a copy would straddle two cache lines.
    raw: Array = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size]


def bytes_of_array(array: Array) -> memoryview:
    """The bytes of a contiguous array; the view writes through."""
    return array.data.cast("B") if array.size else memoryview(b"")


def as_tensor(array: Array, dtype: str) -> torch.Tensor:
    """The same memory as a tensor; the array lives as long as it does."""
    made = torch.from_numpy(array)
    return made.view(torch.bfloat16) if dtype == "bf16" else made

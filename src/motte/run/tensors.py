"""torch tensors and numpy arrays, to and from the form in which they cross the link."""

from __future__ import annotations

import sys
from typing import Any

from motte.capture.graph import DTYPE_BYTES
from motte.errors import InputError
from motte.link.frames import WireTensor

_NUMPY_NAMES = {
    "float64": "f64", "float32": "f32", "float16": "f16", "int64": "i64", "int32": "i32", "int16": "i16",
    "int8": "i8", "uint8": "u8", "bool": "bool",
}  # fmt: skip
_TORCH_NAMES = {**_NUMPY_NAMES, "bfloat16": "bf16"}


def to_wire(value: Any, *, where: str) -> WireTensor:
    """A CPU torch tensor or numpy array, of any strides, as row-major bytes.

    Raises:
        InputError: something else, or an element type that no graph has.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        name = _TORCH_NAMES.get(str(value.dtype).removeprefix("torch."))
        if name is None or value.device.type != "cpu" or value.layout is not torch.strided:
            raise InputError(
                "not a dense CPU tensor of a known type", where=where, got=f"{value.dtype} on {value.device}"
            )
        flat = value.detach().contiguous().reshape(-1)
        data = memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")
        return WireTensor(name, tuple(value.shape), data)
    import numpy as np

    if not isinstance(value, np.ndarray):
        raise InputError("not a torch tensor or numpy array", where=where, got=type(value).__name__)
    name = _NUMPY_NAMES.get(value.dtype.name)
    if name is None or not value.dtype.isnative:
        raise InputError("element type not known", where=where, expected=", ".join(_NUMPY_NAMES), got=str(value.dtype))
    # tobytes, since ascontiguousarray gives a scalar array a dimension that it did not have.
    return WireTensor(name, value.shape, value.tobytes())


def from_wire(tensor: WireTensor, *, like: Any) -> Any:
    """The tensor as ``like`` is: a torch tensor where that is one, else a numpy array.

    Raises:
        InputError: a bf16 output, which numpy does not have.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        names = {name: getattr(torch, full) for full, name in _TORCH_NAMES.items()}
        if not tensor.bytes:
            return torch.empty(tensor.shape, dtype=names[tensor.dtype])
        return torch.frombuffer(bytearray(tensor.data), dtype=names[tensor.dtype]).reshape(tensor.shape)
    import numpy as np

    names = {name: np.dtype(full) for full, name in _NUMPY_NAMES.items()}
    if tensor.dtype not in names:
        raise InputError(
            "numpy has no such element type",
            got=tensor.dtype,
            expected=", ".join(DTYPE_BYTES),
            hint="pass torch tensors",
        )
    return np.frombuffer(bytearray(tensor.data), dtype=names[tensor.dtype]).reshape(tensor.shape)

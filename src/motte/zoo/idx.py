"""A strict reader of the IDX format in which MNIST and Fashion-MNIST are published.

The format (http://yann.lecun.com/exdb/mnist): two zero bytes, a type code, the number of dimensions, each dimension as
a big-endian u32, then the elements. We read unsigned bytes only, and refuse a file that is longer or shorter than
its own header says.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from motte.errors import InputError
from motte.limits import MAX_DATASET_BYTES

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read one ``.gz`` IDX file of unsigned bytes: the array, in the shape that its header gives.

    Raises:
        InputError: not gzip, another element type, or a length that differs from the header's.
    """
    return parse_idx(read_gzip(path), where=str(path))


def read_gzip(path: Path) -> bytes:
    """The content of a ``.gz`` file, at most ``MAX_DATASET_BYTES``.

    Raises:
        InputError: not gzip, cut short, or larger.
    """
    try:
        with gzip.open(path, "rb") as file:
            data = file.read(MAX_DATASET_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError("cannot read the data file", where=str(path), got=str(error)) from error
    if len(data) > MAX_DATASET_BYTES:
        raise InputError("data file too large", where=str(path), expected=f"at most {MAX_DATASET_BYTES} bytes")
    return data


def parse_idx(data: bytes, *, where: str) -> NDArray[np.uint8]:
    """**Unverified** bytes of an IDX file -> the array in the shape that the header gives (read-only).

    Raises:
        InputError: another element type, or a length that differs from the header's.
    """
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _UNSIGNED_BYTE:
        raise InputError("not an IDX file of unsigned bytes", where=where, got=data[:4].hex())
    dims = data[3]
    header = 4 + 4 * dims
    if len(data) < header:
        raise InputError("IDX header cut short", where=where, expected=f"{header} bytes", got=f"{len(data)} bytes")
    shape = struct.unpack(f">{dims}I", data[4:header])
    if len(data) - header != math.prod(shape):
        raise InputError(
            "IDX length differs from its header",
            where=where,
            expected=f"{math.prod(shape)} elements",
            got=f"{len(data) - header}",
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)

"""A strict reader of CIFAR's *binary* archives (https://www.cs.toronto.edu/~kriz/cifar.html).

A record is one byte of label (CIFAR-100: coarse, then fine) and 3,072 bytes of pixels: 32 x 32, the red plane first.
Files are taken out of the archive by their exact names, in memory; nothing is written to disk and no path of the
archive is ever used. Members that we do not need are passed over. Everything is bounded before it is read.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from motte.errors import InputError
from motte.limits import MIB

SIDE: Final = 32
_PIXELS: Final = 3 * SIDE * SIDE
_MAX_MEMBERS: Final = 64
_MAX_UNPACKED_BYTES: Final = 256 * MIB
"""The published archives unpack to 184 MB."""

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images (N, 3, 32, 32) uint8 and labels (N,) int64."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which files of an archive hold which split, and what precedes the pixels of a record."""

    train: tuple[str, ...]
    test: str
    label_bytes: int
    """The last of them is the label."""
    classes: int
    max_train_records: int
    """Of each file."""
    max_test_records: int


LAYOUTS: Final[Mapping[str, Layout]] = {
    "cifar10": Layout(
        tuple(f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)),
        "cifar-10-batches-bin/test_batch.bin",
        1,
        10,
        10_000,
        10_000,
    ),
    "cifar100": Layout(("cifar-100-binary/train.bin",), "cifar-100-binary/test.bin", 2, 100, 50_000, 10_000),
}


def read_cifar(path: Path, layout: Layout) -> tuple[Arrays, Arrays]:
    """Read an **unverified** archive: the training and the test records, in the order of the files.

    Raises:
        InputError: no gzipped tar, a file that is missing, twice there, no regular file, of another length than whole
            records, larger than published, or a label out of range.
    """
    wanted = dict.fromkeys(layout.train, layout.max_train_records) | {layout.test: layout.max_test_records}
    found = _take(path, wanted, layout.label_bytes + _PIXELS)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError("a file is missing from the archive", where=str(path), expected=", ".join(missing))
    parsed = {name: _records(data, layout, f"{path}: {name}") for name, data in found.items()}
    images = np.concatenate([parsed[name][0] for name in layout.train])
    labels = np.concatenate([parsed[name][1] for name in layout.train])
    return (images, labels), parsed[layout.test]


def _records(data: bytes, layout: Layout, where: str) -> Arrays:
    table = np.frombuffer(data, dtype=np.uint8).reshape(-1, layout.label_bytes + _PIXELS)
    labels = table[:, layout.label_bytes - 1].astype(np.int64)
    if labels.max() >= layout.classes:
        raise InputError(
            "a label is out of range", where=where, expected=f"0 to {layout.classes - 1}", got=str(labels.max())
        )
    return np.ascontiguousarray(table[:, layout.label_bytes :]).reshape(-1, 3, SIDE, SIDE), labels


def _take(path: Path, wanted: Mapping[str, int], record_bytes: int) -> dict[str, bytes]:
    """The wanted files' bytes by name; their lengths are checked before they are read."""
    found: dict[str, bytes] = {}
    members = 0
    try:
        with gzip.open(path, "rb") as packed:
            bounded = _Bounded(packed, path)
            # A stream: read once from front to end, so that nothing can be asked for out of order.
            with tarfile.open(fileobj=bounded, mode="r|") as archive:  # type: ignore[call-overload]
                for member in archive:
                    members += 1
                    if members > _MAX_MEMBERS:
                        raise InputError("too many files in the archive", where=str(path), expected=str(_MAX_MEMBERS))
                    if member.name in wanted:
                        if member.name in found:
                            raise InputError("a file is twice in the archive", where=str(path), got=member.name)
                        found[member.name] = _read(archive, member, wanted[member.name], record_bytes, path)
            while bounded.read(MIB):  # gzip compares its checksum only at its end
                pass
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as problem:
        raise InputError("not a readable .tar.gz archive", where=str(path), got=str(problem)[:200]) from problem
    return found


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo, max_records: int, record_bytes: int, path: Path) -> bytes:
    where = f"{path}: {member.name!r}"
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise InputError("not a regular file in the archive", where=where)
    count, rest = divmod(member.size, record_bytes)
    if rest or not 1 <= count <= max_records:
        raise InputError(
            "not a whole number of records",
            where=where,
            expected=f"1 to {max_records} times {record_bytes} bytes",
            got=f"{member.size} bytes",
        )
    file = archive.extractfile(member)
    data = file.read(member.size) if file is not None else b""
    if len(data) != member.size:
        raise InputError("a file of the archive is cut short", where=where, got=f"{len(data)} bytes")
    return data


class _Bounded:
    """A stream that refuses to give more bytes than any published archive holds."""

    def __init__(self, stream: gzip.GzipFile, path: Path) -> None:
        self._stream = stream
        self._left = _MAX_UNPACKED_BYTES
        self._path = path

    def read(self, count: int) -> bytes:
        """At most ``count`` bytes.

        Raises:
            InputError: the archive unpacks to too much.
        """
        data = self._stream.read(min(count, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise InputError(
                "the archive is too large", where=str(self._path), expected=f"{_MAX_UNPACKED_BYTES} bytes unpacked"
            )
        return data

"""Sealing a data set: its records, in a secret order, into one encrypted and signed file. Owner's side only."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from motte.errors import InputError, SettingError
from motte.limits import CHUNK_BYTES, MAX_PARTS
from motte.run.photos import probe_image
from motte.seal.keys import RecipientPublicKey, SignerPrivateKey
from motte.seal.pool import Progress
from motte.seal.writer import BytesPart, PartSource, SealReport, write_bundle
from motte.train.datasets.records import FixedRecords, PhotoRecords, Photos, Pixels, Records
from motte.train.datasets.sealed_layout import (
    SHARD_BYTES,
    DataManifest,
    SplitIndex,
    SplitLayout,
    dumps,
    secret_places,
)

if TYPE_CHECKING:
    from motte.seal.run_terms import RunTerms
    from motte.train.data import DataSet


class _StoredPixels:
    """Records of one size in the order of their places."""

    def __init__(self, pixels: Pixels, at: NDArray[np.int64]) -> None:
        self._pixels, self._at = pixels, at
        channels, height, width = pixels.shape
        self._record_bytes = channels * height * width
        self.offsets: NDArray[np.int64] | None = None
        self.bytes = self._record_bytes * len(at)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of all records."""
        first, last = start // self._record_bytes, -(-stop // self._record_bytes)
        data = self._pixels.take(self._at[first:last]).tobytes()
        return data[start - first * self._record_bytes : stop - first * self._record_bytes]


class _StoredPhotos:
    """Encoded photos in the order of their places; the header of each is looked at while it is read."""

    def __init__(self, photos: Photos, at: NDArray[np.int64]) -> None:
        self._photos, self._at = photos, at
        sizes = np.array([photos.size(int(index)) for index in at], dtype=np.int64)
        self.offsets: NDArray[np.int64] | None = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._starts = self.offsets
        self.bytes = int(self.offsets[-1])

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of all photos."""
        found = bytearray()
        place = int(np.searchsorted(self._starts, start, side="right")) - 1
        while len(found) < stop - start:
            begin, end = int(self._starts[place]), int(self._starts[place + 1])
            found += self._photo(place, end - begin)[max(0, start - begin) : stop - begin]
            place += 1
        return bytes(found)

    def _photo(self, place: int, size: int) -> bytes:
        index = int(self._at[place])
        data, where = self._photos.read(index), self._photos.where(index)
        if len(data) != size:
            raise InputError("the photo changed while it was sealed", where=where)
        probe_image(io.BytesIO(data), where=where).close()
        return data


class _Shard:
    """One shard of the stored records, as a part to be sealed."""

    def __init__(self, stored: _StoredPixels | _StoredPhotos, start: int, size: int) -> None:
        self._stored, self._start = stored, start
        self.bytes = size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the shard's bytes from ``offset`` on."""
        start = self._start + offset
        buffer[:] = self._stored.read(start, start + len(buffer))


def seal_data(
    path: Path,
    data: DataSet,
    *,
    release: int,
    recipients: Sequence[RecipientPublicKey],
    signer: SignerPrivateKey,
    threads: int = 1,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    run: RunTerms | None = None,
) -> SealReport:
    """Write ``data`` sealed to ``path``: both splits, labels, class names and normalisation, nothing of them in clear.

    Images of one size are kept as pixels; photos of a folder as the files that they are, never decoded but for the
    header. Public are the numbers and sizes of parts, so about how many records there are, and what every bundle shows.

    Args:
        release: higher than that of every file of this data handed out before; recipients demand a minimum.
        shard_bytes: bytes of a part of records, a multiple of 1 MiB.
        run: the terms of every run on it (:func:`motte.train.signed_terms.training_terms`); None: none are signed, and
            no key broker can give its keys.

    Raises:
        SettingError, InputError: an argument out of bounds, data that is sealed already or resized, ``path`` exists, or
            a photo that is none. Nothing half-written is left.
        ResourceError: no room.
    """
    if type(shard_bytes) is not int or shard_bytes < CHUNK_BYTES or shard_bytes % CHUNK_BYTES:
        raise SettingError("not a size of shards", expected=f"a multiple of {CHUNK_BYTES} bytes", got=repr(shard_bytes))
    if data.private:
        raise InputError("the data is sealed already", where=data.name)
    layouts, indices, stores = [], [], []
    for records in (data.train, data.test):
        places = secret_places(len(records))
        stored = _stored(records, np.argsort(places, kind="stable").astype(np.int64))
        layouts.append(SplitLayout(len(records), stored.bytes))
        indices.append(SplitIndex(records.labels, places, stored.offsets))
        stores.append(stored)
    manifest = DataManifest(
        name=data.name.partition(":")[0],
        classes=data.classes,
        form="pixels" if stores[0].offsets is None else "photos",
        shape=data.shape,
        mean=data.mean,
        std=data.std,
        padding=data.padding,
        flip=data.flip,
        shard_bytes=shard_bytes,
        train=layouts[0],
        test=layouts[1],
    )
    parts: list[PartSource] = []
    for layout, index, stored in zip(layouts, indices, stores, strict=True):
        parts.append(BytesPart(index.encode()))
        sizes = manifest.shard_sizes(layout)
        parts += [_Shard(stored, number * shard_bytes, size) for number, size in enumerate(sizes)]
    if len(parts) > MAX_PARTS:
        raise InputError(
            "the data is too large for one file", expected=f"at most {MAX_PARTS} parts", got=str(len(parts))
        )
    return write_bundle(
        path,
        release=release,
        manifest=dumps(manifest),
        parts=parts,
        recipients=recipients,
        signer=signer,
        threads=threads,
        overwrite=overwrite,
        progress=progress,
        run=run,
    )


def _stored(records: Records, at: NDArray[np.int64]) -> _StoredPixels | _StoredPhotos:
    if isinstance(records, PhotoRecords):
        return _StoredPhotos(records.photos, at)
    if isinstance(records, FixedRecords) and records.shape == records.pixels.shape:
        return _StoredPixels(records.pixels, at)
    raise InputError("resized data is not sealed: resize it where it is used", hint="leave the image size out")

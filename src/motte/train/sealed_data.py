"""Reading a sealed data file inside: chunk by chunk, each authenticated before a byte of it is used.

A split that fits into half of the stated memory is opened once, from front to end, and held: the host then sees one
sequential read and nothing of the order of training. A larger one is opened chunk by chunk as records are asked for, a
bounded number of chunks being kept; the host then sees which chunks are read when. Since the places of records are a
secret permutation, a chunk tells neither a class nor an index, only that the same place was read again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from motte.errors import BundleError, InputError
from motte.limits import CHUNK_BYTES
from motte.seal.header import BundleHeader
from motte.seal.reader import SignedBundle, UnlockedBundle, open_bundle, zero
from motte.train.augment import CropFlip
from motte.train.datasets.records import FixedRecords, PhotoRecords, Records, Shape
from motte.train.datasets.sealed_layout import DataManifest, SplitIndex, SplitLayout, check_sizes, loads, read_index

if TYPE_CHECKING:
    from motte.train.data import DataKeys

_LEAST_CHUNKS: Final = 2


class _Resident:
    """All stored bytes of a split in memory."""

    def __init__(self, bundle: UnlockedBundle, first_part: int, sizes: tuple[int, ...]) -> None:
        self._data: bytearray | None = bytearray(sum(sizes))
        start, view = 0, memoryview(self._data)
        for part, size in enumerate(sizes, first_part):
            bundle.open_part(part, view[start : start + size])
            start += size

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop``."""
        return bytes(memoryview(self._held())[start:stop])

    def rows(self, record_bytes: int) -> NDArray[np.uint8] | None:
        """(N, record_bytes): all records as one table, in the order of their places."""
        return np.frombuffer(self._held(), dtype=np.uint8).reshape(-1, record_bytes)

    def _held(self) -> bytearray:
        if self._data is None:
            raise InputError("the data is closed")
        return self._data

    def close(self) -> None:
        """Overwrite and drop it; what was read from it are copies."""
        data, self._data = self._data, None
        if data is not None:
            zero(memoryview(data))


class _Chunked:
    """Stored bytes opened chunk by chunk; the ``chunks`` used last are kept. Safe from several threads."""

    def __init__(self, bundle: UnlockedBundle, first_part: int, shard_bytes: int, chunks: int) -> None:
        self._bundle, self._first, self._shard_chunks = bundle, first_part, shard_bytes // CHUNK_BYTES
        self._most = max(chunks, _LEAST_CHUNKS)
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop``."""
        first, last = start // CHUNK_BYTES, max(start, stop - 1) // CHUNK_BYTES
        data = b"".join(self._chunk(number) for number in range(first, last + 1))
        return data[start - first * CHUNK_BYTES : stop - first * CHUNK_BYTES]

    def rows(self, record_bytes: int) -> NDArray[np.uint8] | None:
        """None: there is no table of all records."""
        return None

    def _chunk(self, number: int) -> bytes:
        with self._lock:
            kept = self._kept.get(number)
            if kept is not None:
                self._kept.move_to_end(number)
                return kept
        shard, chunk = divmod(number, self._shard_chunks)
        data = self._bundle.open_part_chunk(self._first + shard, chunk)
        with self._lock:
            self._kept[number] = data
            self._kept.move_to_end(number)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return data

    def close(self) -> None:
        """Drop what is kept."""
        with self._lock:
            self._kept.clear()


_Store = _Resident | _Chunked


class _SealedPixels:
    """Images of one size, out of a store."""

    def __init__(self, store: _Store, index: SplitIndex, shape: Shape) -> None:
        self._store, self._places, self.shape = store, index.places, shape
        self._record_bytes = shape[0] * shape[1] * shape[2]

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(B,) -> (B, C, H, W)."""
        places = self._places[indices]
        rows = self._store.rows(self._record_bytes)
        if rows is not None:
            return rows[places].reshape(-1, *self.shape)
        found = np.empty((len(indices), self._record_bytes), dtype=np.uint8)
        for row in np.argsort(places, kind="stable"):  # neighbours together, so that a chunk is opened once
            start = int(places[row]) * self._record_bytes
            found[row] = np.frombuffer(self._store.read(start, start + self._record_bytes), dtype=np.uint8)
        return found.reshape(-1, *self.shape)


class _SealedPhotos:
    """Encoded photos, out of a store."""

    def __init__(self, store: _Store, places: NDArray[np.int64], offsets: NDArray[np.int64]) -> None:
        self._store, self._places, self._offsets = store, places, offsets

    def where(self, index: int) -> str:
        """How errors name it."""
        return f"sealed photo {index}"

    def size(self, index: int) -> int:
        """Its length in bytes."""
        place = self._places[index]
        return int(self._offsets[place + 1] - self._offsets[place])

    def read(self, index: int) -> bytes:
        """Its bytes, authenticated."""
        place = self._places[index]
        return self._store.read(int(self._offsets[place]), int(self._offsets[place + 1]))


@dataclass(frozen=True, slots=True)
class ReleasedKeys:
    """What opens a sealed data file whose front was checked already. Secret.

    Args:
        signed: the file; closed with the data.
        data_keys: one of 32 bytes for each section, from a key broker or unwrapped with a key of ours.
    """

    signed: SignedBundle
    data_keys: tuple[bytes, ...] = field(repr=False)


class SealedData:
    """An opened sealed data file. Holds keys and plaintext until closed.

    ``train`` and ``test`` are the splits; ``manifest`` is what the file says of itself, **authenticated**.
    """

    def __init__(self, signed: SignedBundle, bundle: UnlockedBundle, memory_bytes: int, image_size: int | None) -> None:
        self._signed, self._bundle = signed, bundle
        self._stores: list[_Store] = []
        self.manifest: DataManifest = loads(bundle.manifest())
        check_sizes(self.manifest, tuple(bundle.part_bytes(part) for part in range(bundle.parts)))
        first_of_test = 1 + len(self.manifest.shard_sizes(self.manifest.train))
        self.train = self._records("train", self.manifest.train, 0, memory_bytes // 2, image_size)
        self.test = self._records("test", self.manifest.test, first_of_test, memory_bytes // 2, image_size)

    def _records(
        self, name: str, split: SplitLayout, index_part: int, memory_bytes: int, image_size: int | None
    ) -> Records:
        manifest, bundle = self.manifest, self._bundle
        data = bytearray(manifest.index_bytes(split))
        bundle.open_part(index_part, memoryview(data))
        index = read_index(bytes(data), manifest, split, where=f"index of the {name} split")
        store: _Store
        if split.stored_bytes <= memory_bytes:
            store = _Resident(bundle, index_part + 1, manifest.shard_sizes(split))
        else:
            store = _Chunked(bundle, index_part + 1, manifest.shard_bytes, memory_bytes // CHUNK_BYTES)
        self._stores.append(store)
        if index.offsets is None:
            augmentation = CropFlip(manifest.padding, manifest.flip)
            pixels = _SealedPixels(store, index, manifest.shape)
            return FixedRecords(pixels, index.labels, augmentation=augmentation, image_size=image_size)
        photos = _SealedPhotos(store, index.places, index.offsets)
        size = manifest.shape[1] if image_size is None else image_size
        return PhotoRecords(photos, index.labels, size=size, flip=manifest.flip)

    @property
    def header(self) -> BundleHeader:
        """The **verified** header of the file."""
        return self._signed.header

    def close(self) -> None:
        """Drop keys and plaintext, and close the file. Reading afterwards is refused."""
        self._bundle.close()
        self._signed.close()
        for store in self._stores:
            store.close()


def open_sealed(path: Path, keys: DataKeys, *, memory_bytes: int, image_size: int | None) -> SealedData:
    """Open an **unverified** file with our key: signature, release and keys are checked before anything is used.

    Args:
        memory_bytes: plaintext held at most, without the index of the records (8 to 16 bytes each) and batches.

    Raises:
        InputError: no such file.
        BundleError: it does not follow the format, or holds something else than data (K-1).
        SignatureError, RollbackError, KeyAccessError, DecryptError: as :mod:`motte.seal.reader`.
    """
    signed = open_bundle(path, signer=keys.signer, min_release=keys.min_release)
    try:
        if keys.verify_digests:
            signed.verify_digests()
        bundle = signed.unlock(signed.unwrap(keys.recipient))
        return SealedData(signed, bundle, memory_bytes, image_size)
    except BundleError as problem:
        signed.close()
        problem.where = problem.where or str(path)
        raise
    except BaseException:
        signed.close()
        raise


def open_released(keys: ReleasedKeys, *, memory_bytes: int, image_size: int | None) -> SealedData:
    """Open a file whose front was **verified** with the data keys that somebody gave us.

    Raises:
        BundleError: it holds something else than data (K-1). DecryptError: other keys than the file's.
        KeyAccessError: not one key for each section.
    """
    return SealedData(keys.signed, keys.signed.unlock_with(keys.data_keys), memory_bytes, image_size)

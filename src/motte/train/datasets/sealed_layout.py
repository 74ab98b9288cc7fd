"""What a sealed data file holds and where: the encrypted manifest, and the index of each split (docs/spec/data.md).

The file is a sealed bundle (docs/spec/bundle.md) whose manifest says ``"kind":"data"``. Its parts are, for the training
and then for the test split:

* one *index*: the label of every record (u32), the place where it lies (u32), and for photos the offset of every place
  and of the end (u64); little-endian, back to back;
* the *records* in the order of their places, cut into shards of ``shard_bytes``, each one part.

Places are a secret permutation, drawn from the operating system when the file is made: the host sees which chunks of
the file are read, and folders list records class by class; without it a read would tell the class.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from motte.errors import BundleError
from motte.limits import (
    CHUNK_BYTES,
    GIB,
    MAX_DATASET_CLASSES,
    MAX_DATASET_RECORDS,
    MAX_MANIFEST_BYTES,
    MAX_NAME_BYTES,
    MAX_PARTS,
    MAX_PHOTO_FILE_BYTES,
    MAX_SECTION_BYTES,
)
from motte.seal.kinds import DATA, check_kind
from motte.strict_json import Fields, canonical, parse
from motte.train.datasets.records import MAX_IMAGE_SIZE, Shape

VERSION: Final = 1
SHARD_BYTES: Final = 32 * GIB
_FORMS: Final = ("photos", "pixels")
_MAX_CHANNELS: Final = 64
_MAX_PADDING: Final = 64

Form = Literal["pixels", "photos"]
"""Records of one size, C * H * W bytes of uint8, or encoded photos of any size."""


@dataclass(frozen=True, slots=True)
class SplitLayout:
    """Number of records of a split, and the bytes of all of them together."""

    records: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class DataManifest:
    """Everything about a sealed data set but its records. ``shape`` of photos is what they are trained at."""

    name: str
    classes: tuple[str, ...]
    form: Form
    shape: Shape
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool
    shard_bytes: int
    train: SplitLayout
    test: SplitLayout

    @property
    def record_bytes(self) -> int:
        """Bytes of one record of the form ``pixels``."""
        channels, height, width = self.shape
        return channels * height * width

    def index_bytes(self, split: SplitLayout) -> int:
        """Bytes of the index of a split."""
        return 8 * split.records + (8 * (split.records + 1) if self.form == "photos" else 0)

    def shard_sizes(self, split: SplitLayout) -> tuple[int, ...]:
        """Bytes of each shard of a split: full ones, and a last one."""
        full, rest = divmod(split.stored_bytes, self.shard_bytes)
        return (self.shard_bytes,) * full + ((rest,) if rest or not full else ())

    def part_sizes(self) -> tuple[int, ...]:
        """Bytes of every part, in order."""
        sizes: list[int] = []
        for split in (self.train, self.test):
            sizes += [self.index_bytes(split), *self.shard_sizes(split)]
        return tuple(sizes)


@dataclass(frozen=True, slots=True)
class SplitIndex:
    """Labels (N,) and places (N,) of the records of a split, and for photos the offsets of the places (N + 1,)."""

    labels: NDArray[np.int64]
    places: NDArray[np.int64]
    offsets: NDArray[np.int64] | None

    def encode(self) -> bytes:
        """The index part."""
        pieces = [self.labels.astype("<u4").tobytes(), self.places.astype("<u4").tobytes()]
        if self.offsets is not None:
            pieces.append(self.offsets.astype("<u8").tobytes())
        return b"".join(pieces)


def secret_places(count: int) -> NDArray[np.int64]:
    """A random permutation of ``count`` from the operating system's generator."""
    keys = np.frombuffer(os.urandom(8 * count), dtype="<u8")
    return np.argsort(keys, kind="stable").astype(np.int64)


def read_index(data: bytes, manifest: DataManifest, split: SplitLayout, *, where: str) -> SplitIndex:
    """Read a **decrypted and authenticated** index; it is checked all the same, since its author may err.

    Raises:
        BundleError: check D-3: a label that no class has, places that are no permutation, or offsets out of order.
    """
    count = split.records
    words = np.frombuffer(data, dtype="<u4", count=2 * count).astype(np.int64)
    labels, places = words[:count], words[count:]
    if labels.max() >= len(manifest.classes):
        raise BundleError("a label that no class has", check="D-3", where=where, got=str(labels.max()))
    if not np.array_equal(np.sort(places), np.arange(count)):
        raise BundleError("the places are no permutation of the records", check="D-3", where=where)
    if manifest.form == "pixels":
        return SplitIndex(labels, places, None)
    table = np.frombuffer(data, dtype="<u8", offset=8 * count)
    ordered = bool((table[:-1] <= table[1:]).all()) and int((table[1:] - table[:-1]).max()) <= MAX_PHOTO_FILE_BYTES
    if not ordered or int(table[0]) != 0 or int(table[-1]) != split.stored_bytes:
        raise BundleError("the offsets of the photos are out of order", check="D-3", where=where)
    return SplitIndex(labels, places, table.astype(np.int64))


def dumps(manifest: DataManifest) -> bytes:
    """The manifest as bytes, to be sealed."""
    return canonical(
        {
            "kind": DATA,
            "version": VERSION,
            "name": manifest.name,
            "classes": list(manifest.classes),
            "form": manifest.form,
            "shape": list(manifest.shape),
            "mean": list(manifest.mean),
            "std": list(manifest.std),
            "padding": manifest.padding,
            "flip": manifest.flip,
            "shard_bytes": manifest.shard_bytes,
            "splits": {
                name: {"records": split.records, "stored_bytes": split.stored_bytes}
                for name, split in (("train", manifest.train), ("test", manifest.test))
            },
        }
    )


def loads(data: bytes) -> DataManifest:
    """Read a **decrypted and authenticated** manifest; it is checked all the same, since its author may err.

    Raises:
        BundleError: another kind of file (check K-1), or malformed (check D-1).
    """
    value = parse(data, max_bytes=MAX_MANIFEST_BYTES, what="manifest", error=BundleError)
    fields = Fields(value, where="manifest", error=BundleError)
    check_kind(fields, DATA)
    try:
        return _read(fields)
    except BundleError as problem:
        problem.check = problem.check or "D-1"
        raise


def _read(fields: Fields) -> DataManifest:
    fields.integer("version", low=VERSION, high=VERSION)
    form: Form = "pixels" if fields.choice("form", _FORMS) == "pixels" else "photos"
    dims = fields.items("shape", max_items=3, read=_dimension)
    mean = tuple(fields.items("mean", max_items=_MAX_CHANNELS, read=_number))
    std = tuple(fields.items("std", max_items=_MAX_CHANNELS, read=_number))
    if len(dims) != 3 or not len(mean) == len(std) == dims[0] <= _MAX_CHANNELS or min(std) <= 0:
        raise BundleError(
            "shape, mean and std do not fit together", where="manifest.shape", got=f"{dims}, {mean}, {std}"
        )
    if form == "photos" and (dims[0] != 3 or dims[1] != dims[2]):
        raise BundleError("photos have three channels and are square", where="manifest.shape", got=str(dims))
    shard_bytes = fields.integer("shard_bytes", low=CHUNK_BYTES, high=MAX_SECTION_BYTES)
    if shard_bytes % CHUNK_BYTES:
        raise BundleError("a shard is no whole number of chunks", where="manifest.shard_bytes", got=str(shard_bytes))
    splits = fields.fields("splits")
    manifest = DataManifest(
        name=fields.text("name", max_bytes=MAX_NAME_BYTES),
        classes=tuple(fields.items("classes", max_items=MAX_DATASET_CLASSES, read=_class_name)),
        form=form,
        shape=(dims[0], dims[1], dims[2]),
        mean=mean,
        std=std,
        padding=fields.integer("padding", low=0, high=_MAX_PADDING),
        flip=fields.boolean("flip"),
        shard_bytes=shard_bytes,
        train=_split(splits.fields("train")),
        test=_split(splits.fields("test")),
    )
    splits.done()
    fields.done()
    if not manifest.classes:
        raise BundleError("no classes", where="manifest.classes")
    for split in (manifest.train, manifest.test):
        if form == "pixels" and split.stored_bytes != split.records * manifest.record_bytes:
            raise BundleError("the records do not fill their bytes", where="manifest.splits", got=str(split))
    return manifest


def check_sizes(manifest: DataManifest, part_bytes: tuple[int, ...]) -> None:
    """Refuse a file whose signed part sizes are not those of its manifest.

    Raises:
        BundleError: check D-2.
    """
    if manifest.train.stored_bytes + manifest.test.stored_bytes > manifest.shard_bytes * MAX_PARTS:
        raise BundleError("more shards than a file can have", check="D-2")
    expected = manifest.part_sizes()
    if expected != part_bytes:
        raise BundleError(
            "the parts are not those of the manifest",
            check="D-2",
            expected=str(expected)[:200],
            got=str(part_bytes)[:200],
        )


def _split(fields: Fields) -> SplitLayout:
    split = SplitLayout(
        fields.integer("records", low=1, high=MAX_DATASET_RECORDS),
        fields.integer("stored_bytes", low=1, high=MAX_SECTION_BYTES * MAX_PARTS),
    )
    fields.done()
    return split


def _dimension(value: Any, where: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_IMAGE_SIZE:
        raise BundleError("not a dimension", where=where, expected=f"1 to {MAX_IMAGE_SIZE}", got=repr(value)[:80])
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e6:
        raise BundleError("not a finite number", where=where, got=repr(value)[:80])
    return float(value)


def _class_name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value.encode()) > MAX_NAME_BYTES:
        raise BundleError("not the name of a class", where=where, got=repr(value)[:80])
    return value

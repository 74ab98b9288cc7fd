"""Photos in folders, one folder a class. **Public data only**: the host that holds a folder reads every file of it.

Names decide: classes are the subfolders in the order of their names, photos of a class likewise. Names that begin with
a dot are passed over; everything else that is no PNG or JPEG photo in a class is refused, since it would be missing
from the training unnoticed.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from motte.errors import InputError
from motte.limits import MAX_DATASET_CLASSES, MAX_DATASET_RECORDS, MAX_NAME_BYTES, MAX_PHOTO_FILE_BYTES
from motte.run.photos import probe_image
from motte.train.augment import Draws, Purpose
from motte.train.datasets.records import SMALL_SIDE

_SUFFIXES: Final = (".png", ".jpg", ".jpeg")
_TEST_SHARE: Final = 10
"""One photo in ten of each class is for testing, where the folder does not say which."""
_PROBED: Final = 32
PHOTO_SIZE: Final = 224


@dataclass(frozen=True, slots=True)
class Photos:
    """The photos of one split: file ``i`` is ``folders[labels[i]] / names[i]``."""

    folders: tuple[str, ...]
    names: tuple[str, ...]
    labels: NDArray[np.int64]

    def where(self, index: int) -> str:
        """The file of photo ``index``."""
        return os.path.join(self.folders[int(self.labels[index])], self.names[index])

    def size(self, index: int) -> int:
        """Bytes of the file of photo ``index``.

        Raises:
            InputError: it is gone, or larger than ``MAX_PHOTO_FILE_BYTES``.
        """
        where = self.where(index)
        try:
            count = os.stat(where).st_size
        except OSError as problem:
            raise InputError("cannot read the photo", where=where, got=problem.strerror) from problem
        if count > MAX_PHOTO_FILE_BYTES:
            raise InputError("photo too large", where=where, expected=f"at most {MAX_PHOTO_FILE_BYTES} bytes")
        return count

    def read(self, index: int) -> bytes:
        """The encoded photo ``index``.

        Raises:
            InputError: it cannot be read, or is larger than ``MAX_PHOTO_FILE_BYTES``.
        """
        count, where = self.size(index), self.where(index)
        try:
            with open(where, "rb") as file:
                return file.read(count)
        except OSError as problem:
            raise InputError("cannot read the photo", where=where, got=problem.strerror) from problem

    def chosen(self, indices: NDArray[np.int64]) -> Photos:
        """Only some of them, in the given order."""
        return Photos(self.folders, tuple(self.names[index] for index in indices), self.labels[indices])


@dataclass(frozen=True, slots=True)
class PhotoFolder:
    """A folder data set: its classes, its splits, and how it was split, for people."""

    classes: tuple[str, ...]
    train: Photos
    test: Photos
    how: str


def read_folder(path: Path, *, seed: int, need_splits: bool) -> PhotoFolder:
    """List a folder with ``train/CLASS/*`` and ``val/CLASS/*`` (or ``test``), or one of ``CLASS/*``, which is split.

    The split takes one photo in ten of each class for testing, by the seed.

    Args:
        need_splits: refuse a folder without ``train`` and ``val``.

    Raises:
        InputError: no such folder, no photos, something else than photos, or test classes that training has not.
    """
    if not path.is_dir():
        raise InputError("no such folder of data", where=str(path))
    held_out = [name for name in ("val", "test") if (path / name).is_dir()]
    if (path / "train").is_dir() and held_out:
        if len(held_out) == 2 and not need_splits:
            raise InputError("both val/ and test/ are there", where=str(path), hint="keep the one to test with")
        classes, train = _list(path / "train", None)
        _, test = _list(path / held_out[0], classes)
        return PhotoFolder(classes, train, test, f"train/ and {held_out[0]}/")
    if need_splits:
        raise InputError("not a folder of ImageNet's layout", where=str(path), expected="train/CLASS/* and val/CLASS/*")
    if (path / "train").is_dir():
        raise InputError(
            "train/ without val/ or test/", where=str(path), hint="add val/, or name the folder train itself"
        )
    classes, every = _list(path, None)
    test_rows = _held_out(every.labels, seed)
    rest = np.flatnonzero(~test_rows)
    if not test_rows.any():
        raise InputError("too few photos to hold any out for testing", where=str(path), hint="add a val/ folder")
    how = f"one photo in {_TEST_SHARE} of each class held out by seed {seed}"
    return PhotoFolder(classes, every.chosen(rest), every.chosen(np.flatnonzero(test_rows)), how)


def _held_out(labels: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Which records are for testing: of each class a tenth, rounded; at least one where it has two or more."""
    chosen = np.zeros(len(labels), dtype=np.bool_)
    draws = Draws(seed, 0, np.arange(len(labels), dtype=np.int64)).bits(Purpose.SPLIT)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = max(round(len(rows) / _TEST_SHARE), 1) if len(rows) > 1 else 0
        chosen[rows[np.argsort(draws[rows], kind="stable")[:count]]] = True
    return chosen


def _list(root: Path, classes: tuple[str, ...] | None) -> tuple[tuple[str, ...], Photos]:
    """The classes below ``root`` and their photos; ``classes``: those of the training split, which decide labels."""
    own = tuple(name for name, is_folder in _entries(root) if _folder_only(root, name, is_folder))
    if not own or len(own) > MAX_DATASET_CLASSES:
        raise InputError(
            "no folders of classes", where=str(root), expected=f"1 to {MAX_DATASET_CLASSES}", got=str(len(own))
        )
    known = own if classes is None else classes
    unknown = sorted(set(own) - set(known))
    if unknown:
        raise InputError("a class that training has not", where=str(root), got=", ".join(unknown[:5]))
    names: list[str] = []
    labels: list[NDArray[np.int64]] = []
    for label, name in enumerate(known):
        photos = _photos(root / name) if name in own else []
        names += photos
        labels.append(np.full(len(photos), label, dtype=np.int64))
        if len(names) > MAX_DATASET_RECORDS:
            raise InputError("too many photos", where=str(root), expected=f"at most {MAX_DATASET_RECORDS}")
    if not names:
        raise InputError("no photos", where=str(root))
    return known, Photos(tuple(str(root / name) for name in known), tuple(names), np.concatenate(labels))


def _folder_only(root: Path, name: str, is_folder: bool) -> bool:
    if not is_folder:
        raise InputError("not a folder of a class", where=str(root / name), hint="one folder a class, photos in it")
    if not name.isprintable() or len(name.encode()) > MAX_NAME_BYTES:  # also bytes that are no UTF-8
        raise InputError("not the name of a class", where=str(root), got=repr(name)[:80])
    return True


def _photos(folder: Path) -> list[str]:
    names = []
    for name, is_folder in _entries(folder):
        if is_folder or not name.lower().endswith(_SUFFIXES):
            raise InputError(
                "not a photo in a folder of a class", where=str(folder / name), expected="PNG or JPEG files"
            )
        names.append(name)
    return names


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """(name, is it a folder) of everything that is not hidden, sorted by name."""
    try:
        with os.scandir(folder) as found:
            return sorted((entry.name, entry.is_dir()) for entry in found if not entry.name.startswith("."))
    except OSError as problem:
        raise InputError("cannot list the folder", where=str(folder), got=problem.strerror) from problem


def natural_size(photos: Photos) -> int:
    """The side to train at when none is asked for: that of the first photos if they are small squares alike, else 224.

    Raises:
        InputError: one of them is no photo.
    """
    sizes = set()
    for index in range(min(_PROBED, len(photos.names))):
        with probe_image(io.BytesIO(photos.read(index)), where=photos.where(index)) as image:
            sizes.add(image.size)
    width, height = next(iter(sizes))
    return width if len(sizes) == 1 and width == height <= SMALL_SIDE else PHOTO_SIZE

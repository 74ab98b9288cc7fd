"""MNIST and Fashion-MNIST: four IDX files, read by :mod:`motte.zoo.idx`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from motte.errors import InputError
from motte.zoo.idx import parse_idx, read_gzip

SIDE: Final = 28
_CLASSES: Final = 10

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images (N, 1, 28, 28) uint8 and labels (N,) int64."""


def read_digits(folder: Path) -> tuple[Arrays, Arrays, dict[str, bytes]]:
    """Read **unverified** files: the training and the test records, and the unpacked bytes by file name.

    Raises:
        InputError: a file does not follow the format, images of another size, counts that differ, a label above 9.
    """
    contents: dict[str, bytes] = {}
    return _split(folder, "train", contents), _split(folder, "t10k", contents), contents


def _split(folder: Path, name: str, contents: dict[str, bytes]) -> Arrays:
    images_path, labels_path = folder / f"{name}-images-idx3-ubyte.gz", folder / f"{name}-labels-idx1-ubyte.gz"
    for path in (images_path, labels_path):
        contents[path.name] = read_gzip(path)
    images = parse_idx(contents[images_path.name], where=str(images_path))
    labels = parse_idx(contents[labels_path.name], where=str(labels_path))
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE) or not len(images):
        raise InputError(
            "not images of this set", where=str(images_path), expected=f"(N, {SIDE}, {SIDE})", got=str(images.shape)
        )
    if labels.shape != images.shape[:1]:
        raise InputError(
            "not one label for each image", where=str(labels_path), expected=f"({len(images)},)", got=str(labels.shape)
        )
    if labels.max() >= _CLASSES:
        raise InputError("a label is out of range", where=str(labels_path), expected="0 to 9", got=str(labels.max()))
    return images[:, None], labels.astype(np.int64)

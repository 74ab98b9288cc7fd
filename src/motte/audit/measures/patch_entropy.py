"""Patch-entropy profile of a data set: how much the pixels of small patches differ, for patch sizes 3 to 11.

The entropy of one patch is the Shannon entropy of its 8-bit pixel values, in bits: 0 for a flat patch, log2(side ** 2)
where no two pixels are alike. An image's entropy at a size is the mean over all its patches and channels. Data of low
patch entropy tends to have activations of low rank, of which a small principal part holds almost all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from motte.audit.measures.figure import Figure
from motte.errors import InputError, ResourceError
from motte.seal.atomic import atomic_file

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES: Final = (3, 4, 5, 6, 7, 8, 9, 10, 11)
"""Sides of patches, in pixels."""
_PIECE: Final = 8


@dataclass(frozen=True, slots=True)
class Profile:
    """Mean patch entropy in bits of every image, by patch size; sizes larger than an image are left out."""

    by_size: Mapping[int, tuple[float, ...]]


def patch_entropy(images: NDArray[np.uint8], *, sizes: Sequence[int] = SIZES) -> Profile:
    """The profile of (N, C, H, W) uint8 images.

    Raises:
        InputError: no image, or images smaller than every size.
    """
    fitting = [size for size in sizes if size <= min(images.shape[2:])]
    if not len(images) or not fitting:
        raise InputError("no image that a patch fits into", got=str(images.shape))
    return Profile({size: tuple(_entropies(images, size).tolist()) for size in fitting})


def _entropies(images: NDArray[np.uint8], size: int) -> NDArray[np.float64]:
    found = []
    for start in range(0, len(images), _PIECE):
        windows = sliding_window_view(images[start : start + _PIECE], (size, size), axis=(2, 3))
        patches = np.sort(windows.reshape(*windows.shape[:4], size * size), axis=-1)
        found.append(_of_sorted(patches).mean((1, 2, 3)))
    return np.concatenate(found)


def _of_sorted(values: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Shannon entropy in bits of the last axis, which is sorted: H = log2 n - mean over elements of log2(its count)."""
    count = values.shape[-1]
    places = np.arange(count)
    starts = np.concatenate((np.ones((*values.shape[:-1], 1), bool), values[..., 1:] != values[..., :-1]), -1)
    first = np.maximum.accumulate(np.where(starts, places, 0), -1)
    ends = np.concatenate((starts[..., 1:], np.ones((*values.shape[:-1], 1), bool)), -1)
    last = np.minimum.accumulate(np.where(ends, places, count)[..., ::-1], -1)[..., ::-1]
    lengths = last - first + 1
    return np.asarray(math.log2(count) - np.log2(lengths).mean(-1), dtype=np.float64)


def profile_figures(profile: Profile) -> tuple[Figure, ...]:
    """The mean over images at each size."""
    return tuple(
        Figure(
            name=f"patch entropy, {size} x {size}",
            audited=None,
            layer=None,
            value=sum(values) / len(values),
            unit="bit",
            note=f"{len(values)} images, {min(values):.2f} to {max(values):.2f}; at most {math.log2(size**2):.2f}",
        )
        for size, values in profile.by_size.items()
    )


def write_csv(profile: Profile, path: Path, *, overwrite: bool = False) -> None:
    """``size,image,entropy_bits``: a row for each image and size, written whole or not at all.

    Raises:
        InputError: the file exists. ResourceError: it cannot be written.
    """
    lines = ["size,image,entropy_bits"]
    for size, values in profile.by_size.items():
        lines += [f"{size},{number},{value:.6f}" for number, value in enumerate(values)]
    with atomic_file(path, overwrite=overwrite) as fd, open(fd, "wb", closefd=False) as file:
        file.write(("\n".join(lines) + "\n").encode("ascii"))


def write_violin(profile: Profile, path: Path, *, overwrite: bool = False, title: str = "") -> None:
    """A violin for each size, as PNG.

    Raises:
        InputError: the file exists. ResourceError: matplotlib is not installed, or the file cannot be written.
    """
    figure, axes, save = _canvas()
    sizes = list(profile.by_size)
    axes.violinplot([profile.by_size[size] for size in sizes], positions=sizes, showmedians=True, widths=0.8)
    axes.set_xlabel("side of a patch, pixels")
    axes.set_ylabel("entropy of an image's patches, bit")
    axes.set_xticks(sizes)
    axes.set_title(title)
    figure.set_layout_engine("tight")
    with atomic_file(path, overwrite=overwrite) as fd, open(fd, "wb", closefd=False) as file:
        save(file)


def _canvas() -> tuple[Any, Any, Callable[[object], None]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Drawing
    except ImportError as problem:
        raise ResourceError("plots need matplotlib", hint="pip install matplotlib") from problem
    drawing = Drawing(figsize=(7.0, 4.0), dpi=110)
    canvas = FigureCanvasAgg(drawing)
    return drawing, drawing.add_subplot(), canvas.print_png

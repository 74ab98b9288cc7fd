"""Augmentation without a hidden generator: every draw is a function of (seed, epoch, index of the sample, purpose).

So a batch is the same whoever computes it, in whatever order, on however many threads, and a run can be resumed at any
batch. The draws come from the splitmix64 finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) used as a counter-based hash. They are repeatable, **not secret**: nothing of the privacy
accounting rests on them.

Images here are uint8 arrays (N, C, H, W), or decoded photos; numpy and Pillow only, so that threads that prefetch start
no thread pools of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

from motte.errors import SettingError

_MASK: Final = (1 << 64) - 1
_STEP: Final = 0x9E3779B97F4A7C15
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB
MAX_SEED: Final = (1 << 63) - 1
_ATTEMPTS: Final = 10
"""Tries of torchvision's RandomResizedCrop before it falls back to the middle."""


class Purpose(IntEnum):
    """What a draw is for: draws of different purposes are independent. The numbers are part of what a seed means."""

    ORDER = 0
    SPLIT = 1
    TOP = 2
    LEFT = 3
    FLIP = 4
    BOX = 16
    """Four numbers (area, ratio, top, left) for each of ten attempts: 16 to 55."""


@dataclass(frozen=True, slots=True)
class Draws:
    """The random numbers of some samples in one epoch.

    Args:
        seed: 0 to 2^63 - 1.
        epoch: from 0.
        indices: (N,) int64, the samples by their place in the data set.
    """

    seed: int
    epoch: int
    indices: NDArray[np.int64]

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if type(self.epoch) is not int or not 0 <= self.epoch <= MAX_SEED:
            raise SettingError("not the number of an epoch", expected="0 or more", got=repr(self.epoch)[:80])

    def bits(self, purpose: int) -> NDArray[np.uint64]:
        """(N,) uniform 64-bit numbers."""
        key = _mix_one(self.seed + _STEP)
        key = _mix_one(key + (self.epoch + 1) * _STEP)
        key = _mix_one(key + (purpose + 1) * _STEP)
        places = self.indices.astype(np.uint64) + np.uint64(1)
        return _mix(_mix(places * np.uint64(_STEP) + np.uint64(key)))

    def uniform(self, purpose: int) -> NDArray[np.float64]:
        """(N,) uniform in [0, 1), multiples of 2^-53."""
        return (self.bits(purpose) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def below(self, purpose: int, count: NDArray[np.int64] | int) -> NDArray[np.int64]:
        """(N,) uniform integers in [0, count)."""
        return np.floor(self.uniform(purpose) * count).astype(np.int64)


def check_seed(seed: int) -> None:
    """Refuse what is not a seed.

    Raises:
        SettingError: so it is.
    """
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise SettingError("not a seed", expected=f"0 to {MAX_SEED}", got=repr(seed)[:80])


def order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of ``count`` samples in an epoch: a permutation, the same wherever it is computed."""
    every = np.arange(count, dtype=np.int64)
    return np.argsort(Draws(seed, epoch, every).bits(Purpose.ORDER), kind="stable").astype(np.int64)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_FIRST)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_SECOND)
    return value ^ (value >> np.uint64(31))


def _mix_one(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


@dataclass(frozen=True, slots=True)
class CropFlip:
    """Small images: black padding, a crop of the old size at a random place, and a mirror image half the time.

    The usual augmentation of CIFAR (He et al., CVPR 2016, section 4.2), with ``padding`` 4.
    """

    padding: int
    flip: bool

    def apply(self, images: NDArray[np.uint8], draws: Draws) -> NDArray[np.uint8]:
        """(N, C, H, W) -> (N, C, H, W), a copy."""
        height, width = images.shape[2:]
        places = 2 * self.padding + 1
        edge = (self.padding, self.padding)
        padded = np.pad(images, ((0, 0), (0, 0), edge, edge))
        windows = sliding_window_view(padded, (height, width), axis=(2, 3))
        cut: NDArray[np.uint8] = windows[
            np.arange(len(images)), :, draws.below(Purpose.TOP, places), draws.below(Purpose.LEFT, places)
        ]
        if self.flip:
            mirrored = draws.bits(Purpose.FLIP) >> np.uint64(63) == 1
            cut[mirrored] = cut[mirrored][..., ::-1]
        return cut


@dataclass(frozen=True, slots=True)
class ResizedCropFlip:
    """Photos: a random part of a photo, resized to ``size`` x ``size``, and a mirror image half the time.

    The rule is torchvision's ``RandomResizedCrop`` (Szegedy et al., "Going deeper with convolutions", CVPR 2015): up to
    ten tries for an area in ``scale`` and an aspect in ``ratio`` (log-uniform), then the largest part in the middle.
    """

    size: int
    flip: bool
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def box(self, height: int, width: int, draws: Draws) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the part of one photo; ``draws`` are those of one sample."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for attempt in range(_ATTEMPTS):
            first = Purpose.BOX + 4 * attempt
            area = height * width * _between(*self.scale, draws, first)
            aspect = math.exp(_between(low, high, draws, first + 1))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = draws.below(first + 2, height - h + 1), draws.below(first + 3, width - w + 1)
                return int(top[0]), int(left[0]), h, w
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
        return (height - h) // 2, (width - w) // 2, h, w

    def apply(self, image: Image.Image, draws: Draws) -> Image.Image:
        """One decoded photo -> one of ``size`` x ``size``, bilinear with antialiasing; ``draws`` of one sample."""
        top, left, height, width = self.box(image.height, image.width, draws)
        part = image.crop((left, top, left + width, top + height))
        part = part.resize((self.size, self.size), Image.Resampling.BILINEAR)
        if self.flip and int(draws.bits(Purpose.FLIP)[0]) >> 63:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return part


def _between(low: float, high: float, draws: Draws, purpose: int) -> float:
    return low + (high - low) * float(draws.uniform(purpose)[0])

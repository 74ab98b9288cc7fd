"""What a data set is made of: labelled images that are read by index, as uint8, and augmented on the way."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from motte.errors import InputError, SettingError
from motte.limits import MAX_IMAGE_PIXELS
from motte.run.photos import read_image
from motte.train.augment import CropFlip, Draws, ResizedCropFlip

SMALL_SIDE: Final = 64
"""Images up to this side get the small treatment (stems, crop with padding); larger ones that of ImageNet."""
MAX_IMAGE_SIZE: Final = 4096
PHOTO_PADDING: Final = 4
"""Of the crop of small photos."""
_PAD_AT_MOST: Final = 8
_EVALUATION_RESIZE: Final = 256 / 224
"""Short side before the centre crop, as a multiple of the crop: the usual evaluation on ImageNet."""

Shape = tuple[int, int, int]
"""(channels, height, width) of one image."""


class Records(Protocol):
    """Labelled images by index. Reading is a pure function of its arguments, from any thread."""

    @property
    def shape(self) -> Shape:
        """(C, H, W) of every image that :meth:`read` gives."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) int64 classes, from 0."""

    def __len__(self) -> int:
        """Number of records."""

    def read(self, indices: NDArray[np.int64], draws: Draws | None) -> NDArray[np.uint8]:
        """(B,) indices -> (B, C, H, W) uint8; augmented with ``draws`` of the same indices, or as for evaluation."""


class Pixels(Protocol):
    """Images of one size by index: an array in memory, or records that are opened on demand."""

    @property
    def shape(self) -> Shape:
        """(C, H, W)."""

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(B,) -> (B, C, H, W)."""


@dataclass(frozen=True, slots=True)
class ArrayPixels:
    """Images in memory: (N, C, H, W) uint8."""

    images: NDArray[np.uint8]

    @property
    def shape(self) -> Shape:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """A copy of the chosen images."""
        return self.images[indices]


class Photos(Protocol):
    """Encoded photos by index: files, or records that are opened on demand. Callable from several threads."""

    def where(self, index: int) -> str:
        """How errors name photo ``index``."""

    def size(self, index: int) -> int:
        """Its length in bytes."""

    def read(self, index: int) -> bytes:
        """Its **unverified** bytes: a PNG or JPEG file."""


class FixedRecords:
    """Small images that all have one size.

    Args:
        image_size: side of the images that come out. Up to 8 pixels more than they have: black is added around them (28
            to 32, as LeNet had it); any other size: bilinear resizing. None: as they are.
    """

    def __init__(
        self,
        pixels: Pixels,
        labels: NDArray[np.int64],
        *,
        augmentation: CropFlip | None = None,
        image_size: int | None = None,
    ) -> None:
        self.pixels = pixels
        self._labels = labels
        self._augmentation = augmentation
        self._size = check_image_size(image_size)

    @property
    def shape(self) -> Shape:
        """(C, H, W) of what :meth:`read` gives."""
        channels, height, width = self.pixels.shape
        return (channels, height, width) if self._size is None else (channels, self._size, self._size)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) int64."""
        return self._labels

    def __len__(self) -> int:
        """Number of records."""
        return len(self._labels)

    def read(self, indices: NDArray[np.int64], draws: Draws | None) -> NDArray[np.uint8]:
        """(B,) -> (B, C, H, W); see :class:`Records`."""
        images = self.pixels.take(indices)
        if draws is not None and self._augmentation is not None:
            images = self._augmentation.apply(images, draws)
        return images if self._size is None else _fit(images, self._size)


def _fit(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    height, width = images.shape[2:]
    above, left = size - height, size - width
    if 0 <= above <= _PAD_AT_MOST and 0 <= left <= _PAD_AT_MOST:
        edges = ((0, 0), (0, 0), (above // 2, above - above // 2), (left // 2, left - left // 2))
        return np.pad(images, edges) if above or left else images
    resized = np.empty((*images.shape[:2], size, size), dtype=np.uint8)
    for place in np.ndindex(*images.shape[:2]):
        plane = Image.fromarray(np.ascontiguousarray(images[place]))
        resized[place] = np.asarray(plane.resize((size, size), Image.Resampling.BILINEAR))
    return resized


class PhotoRecords:
    """Photos of any size, decoded on demand to RGB.

    Args:
        photos: their bytes; decoded here, at most ``MAX_IMAGE_PIXELS`` each.
        size: side of what comes out. Above ``SMALL_SIDE``: as ImageNet is trained (a random part, resized) and
            evaluated (short side to 256/224 of ``size``, then the middle). Up to it: short side to ``size``, the
            middle, and for training a crop with padding 4.
    """

    def __init__(self, photos: Photos, labels: NDArray[np.int64], *, size: int, flip: bool = True) -> None:
        checked = check_image_size(size)
        self.photos = photos
        self._labels = labels
        self._size = size if checked is None else checked
        self._large = ResizedCropFlip(self._size, flip) if self._size > SMALL_SIDE else None
        self._small = CropFlip(PHOTO_PADDING, flip)

    @property
    def shape(self) -> Shape:
        """(3, size, size)."""
        return (3, self._size, self._size)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) int64."""
        return self._labels

    def __len__(self) -> int:
        """Number of records."""
        return len(self._labels)

    def read(self, indices: NDArray[np.int64], draws: Draws | None) -> NDArray[np.uint8]:
        """(B,) -> (B, 3, size, size); see :class:`Records`."""
        found = np.empty((len(indices), *self.shape), dtype=np.uint8)
        for row, index in enumerate(indices):
            where = self.photos.where(int(index))
            photo = as_rgb(read_image(io.BytesIO(self.photos.read(int(index))), where=where))
            if draws is not None and self._large is not None:
                photo = self._large.apply(photo, Draws(draws.seed, draws.epoch, draws.indices[row : row + 1]))
            else:
                photo = self._centre(photo, where)
            found[row] = np.asarray(photo, dtype=np.uint8).transpose(2, 0, 1)
        return found if draws is None or self._large is not None else self._small.apply(found, draws)

    def _centre(self, photo: Image.Image, where: str) -> Image.Image:
        size = self._size
        short = round(size * _EVALUATION_RESIZE) if self._large is not None else size
        width, height = photo.size
        # The long side as torchvision rounds it.
        wide, high = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        if wide * high > MAX_IMAGE_PIXELS:
            raise InputError("the photo is too long and thin to be resized", where=where, got=f"{width} x {height}")
        if (wide, high) != photo.size:
            photo = photo.resize((wide, high), Image.Resampling.BILINEAR)
        left, top = round((wide - size) / 2), round((high - size) / 2)
        return photo.crop((left, top, left + size, top + size))


def as_rgb(photo: Image.Image) -> Image.Image:
    """The photo in RGB: transparency is dropped, not blended."""
    if photo.mode == "P" and "transparency" in photo.info:
        photo = photo.convert("RGBA")  # the same colours; Pillow warns on the direct way
    return photo if photo.mode == "RGB" else photo.convert("RGB")


def check_image_size(size: int | None) -> int | None:
    """Refuse what is not the side of an image.

    Raises:
        SettingError: so it is.
    """
    if size is not None and (type(size) is not int or not 1 <= size <= MAX_IMAGE_SIZE):
        raise SettingError("not an image size", expected=f"1 to {MAX_IMAGE_SIZE} pixels", got=repr(size)[:80])
    return size

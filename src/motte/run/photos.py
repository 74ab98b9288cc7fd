"""A photo -> the array that a model takes. No torch.

Photos are prepared exactly as torchvision's ``ImageClassification`` preset prepares them, which is how the published
accuracies were measured; tests hold the two against each other bit for bit. What that implies:

* nothing is rotated: torchvision ignores the EXIF orientation, and so does this;
* every colour mode is converted by Pillow to RGB (or to L for a grey model): transparency is dropped, not blended;
  CMYK without its colour profile. 16-bit grey images are refused, because Pillow would clip them;
* of an animated PNG the first frame counts.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from motte.capture.signature import ImagePreprocessing
from motte.errors import InputError
from motte.limits import MAX_IMAGE_PIXELS

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_EIGHT_BIT_MODES = frozenset(
    {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
)


def open_image(path: Path) -> Image.Image:
    """Open and decode a PNG or JPEG file of at most ``MAX_IMAGE_PIXELS``, checked before anything is decoded.

    Raises:
        InputError: another format, broken, cut short, too large, or 16 bits a channel.
    """
    return read_image(path, where=str(path))


def read_image(source: Path | IO[bytes], *, where: str) -> Image.Image:
    """As :func:`open_image`, from a file or from **unverified** bytes in memory; ``where`` names them in errors."""
    with probe_image(source, where=where) as image:
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as problem:  # decoders raise nearly anything on a broken file
            raise _not_an_image(where, problem) from problem
        return image.copy()


def probe_image(source: Path | IO[bytes], *, where: str) -> Image.Image:
    """A photo whose header was read and whose size and mode are allowed; nothing is decoded yet. Close it.

    Raises:
        InputError: another format, too large, or 16 bits a channel.
    """
    try:
        with warnings.catch_warnings():
            # Pillow only warns up to twice its own bound, which is above ours.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(source, formats=("PNG", "JPEG"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as problem:
        raise _too_many_pixels(where, "more") from problem
    except MemoryError:
        raise
    except Exception as problem:  # as above
        raise _not_an_image(where, problem) from problem
    if image.width * image.height > MAX_IMAGE_PIXELS:
        image.close()
        raise _too_many_pixels(where, f"{image.width} x {image.height}")
    if image.mode not in _EIGHT_BIT_MODES:
        image.close()
        raise InputError("not 8 bits a channel", where=where, got=f"mode {image.mode}", hint="convert it to 8 bits")
    return image


def prepare_image(image: Image.Image, pre: ImagePreprocessing, *, where: str = "image") -> NDArray[np.float32]:
    """A decoded photo -> (1, C, H, W) float32, bit for bit as torchvision's preset does it.

    Raises:
        InputError: so long and thin that its resized form would exceed ``MAX_IMAGE_PIXELS``.
    """
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; Pillow warns on the direct way
    image = image.convert("L" if pre.colour == "grey" else "RGB")
    if pre.resize:
        image = _resize(image, pre, where)
    values = np.asarray(image, dtype=np.uint8)
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    if pre.crop:
        values = _centre_crop(values, pre.crop)
    scaled = values.astype(np.float32) / np.float32(255)
    mean = np.asarray(pre.mean, dtype=np.float32)[:, None, None]
    std = np.asarray(pre.std, dtype=np.float32)[:, None, None]
    return np.ascontiguousarray(((scaled - mean) / std)[None])


def _resize(image: Image.Image, pre: ImagePreprocessing, where: str) -> Image.Image:
    width, height = image.size
    short, long = sorted((width, height))
    new_long = int(pre.resize * long / short)
    if pre.resize * new_long > MAX_IMAGE_PIXELS:
        raise InputError(
            "the photo is too long and thin to be resized", where=where, expected=f"at most {MAX_IMAGE_PIXELS} pixels",
            got=f"{width} x {height}",
        )  # fmt: skip
    new_size = (pre.resize, new_long) if width <= height else (new_long, pre.resize)
    return image if new_size == image.size else image.resize(new_size, _RESAMPLING[pre.interpolation])


def _centre_crop(values: NDArray[np.uint8], crop: int) -> NDArray[np.uint8]:
    """The middle ``crop`` x ``crop`` of (C, H, W); a smaller photo is padded with black first, as torchvision does."""
    _, height, width = values.shape
    above, left = max(0, crop - height) // 2, max(0, crop - width) // 2
    below, right = max(0, crop - height + 1) // 2, max(0, crop - width + 1) // 2
    if above or left or below or right:
        values = np.pad(values, ((0, 0), (above, below), (left, right)))
        _, height, width = values.shape
    # round() takes halves to the even neighbour, as torchvision's does.
    top, start = round((height - crop) / 2), round((width - crop) / 2)
    return values[:, top : top + crop, start : start + crop]


def _too_many_pixels(where: str, got: str) -> InputError:
    return InputError("photo too large", where=where, expected=f"at most {MAX_IMAGE_PIXELS} pixels", got=got)


def _not_an_image(where: str, problem: Exception) -> InputError:
    reason = "neither of the two" if isinstance(problem, UnidentifiedImageError) else str(problem)[:200]
    return InputError("not a readable photo", where=where, expected="a PNG or JPEG file", got=reason)

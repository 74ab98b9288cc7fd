"""Grids of images as PNG files, with Pillow: a row for each title, enlarged without smoothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, ImageDraw

from motte.errors import SettingError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from motte.audit.interface import Picture

_SIDE: Final = 64
"""Pixels that a small image is enlarged to, at least."""
_GAP: Final = 4
_LABEL: Final = 14
_MOST: Final = 16
"""Images of a row; further ones are left out."""
_NAME: Final = re.compile(r"[^a-z0-9]+")


def grid(picture: Picture) -> Image.Image:
    """The picture with its row titles above the rows.

    Raises:
        SettingError: no image in it, or images that are neither grey nor coloured.
    """
    rows = [(title, _pixels(images)) for title, images in picture.rows]
    if not rows or not all(len(images) for _, images in rows):
        raise SettingError("a picture without an image", got=picture.title)
    height, width = rows[0][1].shape[1:3]
    scale = max(1, -(-_SIDE // max(height, width)))
    columns = max(len(images) for _, images in rows)
    size = (columns * (width * scale + _GAP) + _GAP, len(rows) * (height * scale + _LABEL + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    top = _GAP
    for title, images in rows:
        # The built-in font has no other letters.
        draw.text((_GAP, top), title.encode("ascii", "replace").decode("ascii"), fill="black")
        top += _LABEL
        for number, image in enumerate(images):
            large = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(large, (_GAP + number * (width * scale + _GAP), top))
        top += height * scale + _GAP
    return sheet


def write_grid(picture: Picture, path: Path) -> None:
    """Write the grid to ``path``, in a folder that nobody looks into yet."""
    grid(picture).save(path, format="PNG")


def file_name(number: int, *words: str) -> str:
    """``007-reconstruction-stage1-0-conv1-scheme.png``."""
    slug = _NAME.sub("-", " ".join(words).lower()).strip("-")[:80]
    return f"{number:03d}-{slug}.png"


def _pixels(images: Tensor) -> NDArray[np.uint8]:
    """(N, C, H, W) in [0, 1] -> (N, H, W, 3) uint8, at most :data:`_MOST` of them."""
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise SettingError("not images", expected="(N, 1 or 3, H, W)", got=str(tuple(images.shape)))
    values = (images[:_MOST].detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return np.ascontiguousarray(np.repeat(values, 3, axis=3) if values.shape[3] == 1 else values)

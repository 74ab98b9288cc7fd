"""How alike a reconstruction and its original are: PSNR, SSIM, LPIPS, and whether one recognises which image it was.

All images are (N, C, H, W), floating point, in [0, 1] where no ``data_range`` says otherwise; results are one number an
image, float64, so that intervals can be formed over images.

PSNR and SSIM need nothing. LPIPS needs weights that this project neither ships nor downloads: without a file it is not
available, and no other number stands in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from motte.errors import FormatError, InputError, ResourceError

SSIM_WINDOW: Final = 11
SSIM_SIGMA: Final = 1.5
MAX_PSNR: Final = 100.0
"""Decibels stated for images that are equal to the bit, whose ratio is infinite: means must stay finite."""
_K1, _K2 = 0.01, 0.03
_ALEXNET: Final = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1))
"""Channels in and out, kernel, stride and padding of AlexNet's convolutions (torchvision's layout)."""
_ALEXNET_NAMES: Final = ("features.0", "features.3", "features.6", "features.8", "features.10")
_POOL_BEFORE: Final = (1, 2)
_SHIFT: Final = (-0.030, -0.088, -0.188)
_SCALE: Final = (0.458, 0.448, 0.450)


def psnr(images: Tensor, originals: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio, (N,) decibels, at most :data:`MAX_PSNR`.

    Raises:
        InputError: shapes that differ, or are not (N, C, H, W).
    """
    _alike(images, originals)
    error = (images.double() - originals.double()).square().flatten(1).mean(1)
    smallest = data_range * data_range * 10.0 ** (-MAX_PSNR / 10)
    return 10 * torch.log10(data_range * data_range / error.clamp_min(smallest))


def ssim(images: Tensor, originals: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Mean structural similarity, (N,), from -1 to 1 (Wang, Bovik, Sheikh & Simoncelli, IEEE TIP 13(4), 2004).

    The paper's own setting: a Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, variances of the window
    (not of a sample), only windows that lie wholly inside, the mean over channels. For images smaller than 11 pixels
    the window is the largest odd one that fits, which is no setting of the paper: compare such values with each other
    only.

    Raises:
        InputError: shapes that differ, or are not (N, C, H, W).
    """
    _alike(images, originals)
    x, y = images.double(), originals.double()
    size = min(SSIM_WINDOW, *(extent - 1 + extent % 2 for extent in x.shape[2:]))
    window = _gaussian(size)

    def mean(values: Tensor) -> Tensor:
        flat = values.reshape(-1, 1, *values.shape[2:])
        rows = functional.conv2d(flat, window.view(1, 1, -1, 1))
        blurred = functional.conv2d(rows, window.view(1, 1, 1, -1))
        return blurred.reshape(*values.shape[:2], *blurred.shape[2:])

    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def matched(images: Tensor, originals: Tensor) -> Tensor:
    """Re-identification in a gallery: 1.0 where the nearest of ``originals`` is the image's own, else 0.0; (N,).

    Nearest by correlation of pixels, so that a reconstruction of wrong brightness or contrast still counts. Guessing
    gives 1/N; equally near ones share (an image without any contrast is equally near to all).

    Raises:
        InputError: shapes that differ, or are not (N, C, H, W).
    """
    _alike(images, originals)
    near = _centred(images) @ _centred(originals).T
    own = near.diagonal().unsqueeze(1)
    tied = (near >= own - 1e-9).sum(1).double()
    return torch.where((near > own + 1e-9).any(1), 0.0, 1.0 / tied)


def recognised(images: Tensor, labels: Tensor, classifier: Callable[[Tensor], Tensor]) -> Tensor:
    """Re-identification by class: 1.0 where ``classifier`` gives a reconstruction its true label, else 0.0; (N,).

    Args:
        labels: (N,) integers.
        classifier: images -> logits (N, K).
    """
    with torch.no_grad():
        return (classifier(images).argmax(1) == labels).double()


class Lpips:
    """Learned perceptual image patch similarity on AlexNet, version 0.1; 0 is equal, larger is further.

    Zhang, Isola, Efros, Shechtman & Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"
    (CVPR 2018). Features of the five convolutions, each position scaled to norm 1, squared differences weighted by
    channel, the mean over positions, the sum over layers.

    Args:
        convolutions: of AlexNet: five pairs of weight and bias in torchvision's shapes.
        weights: of the five layers' channels, (C,) each, none negative.
    """

    def __init__(self, convolutions: tuple[tuple[Tensor, Tensor], ...], weights: tuple[Tensor, ...]) -> None:
        self._convolutions = convolutions
        self._weights = weights

    @classmethod
    def open(cls, path: Path) -> Lpips:
        """From a safetensors file: ``features.{0,3,6,8,10}.{weight,bias}`` as torchvision's AlexNet names them, and
        ``lin0.model.1.weight`` to ``lin4.model.1.weight`` (1, C, 1, 1) as the paper's code does. **Unverified**.

        Raises:
            ResourceError: it cannot be read. FormatError: no such file, a tensor is missing or has another shape.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(path)
        except OSError as problem:
            raise ResourceError("cannot read the weights of LPIPS", where=str(path), got=str(problem)) from problem
        except SafetensorError as problem:
            raise FormatError("not a safetensors file", where=str(path), got=str(problem)[:200]) from problem

        def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
            value = found.get(name)
            if value is None or tuple(value.shape) != shape:
                got = "nothing" if value is None else str(tuple(value.shape))
                raise FormatError("not the weights of LPIPS", where=f"{path}: {name}", expected=str(shape), got=got)
            return value.float()

        layers = tuple(
            (tensor(f"{name}.weight", (out, inner, kernel, kernel)), tensor(f"{name}.bias", (out,)))
            for name, (inner, out, kernel, _, _) in zip(_ALEXNET_NAMES, _ALEXNET, strict=True)
        )
        weights = tuple(
            tensor(f"lin{number}.model.1.weight", (1, shape[1], 1, 1)).flatten()
            for number, shape in enumerate(_ALEXNET)
        )
        return cls(layers, weights)

    @torch.no_grad()
    def __call__(self, images: Tensor, originals: Tensor) -> Tensor:
        """(N,) distances of images in [0, 1]; grey ones are repeated, ones below 64 pixels enlarged to 64 (AlexNet
        needs that much; compare such values with each other only).

        Raises:
            InputError: shapes that differ, or are not (N, 1 or 3, H, W).
        """
        _alike(images, originals)
        first, second = self._features(images), self._features(originals)
        total = torch.zeros(len(images), dtype=torch.float64)
        for x, y, weight in zip(first, second, self._weights, strict=True):
            total += ((x - y).square() * weight.view(1, -1, 1, 1)).sum(1).flatten(1).mean(1).double()
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        if images.shape[1] not in (1, 3):
            raise InputError("LPIPS takes grey or colour images", got=str(tuple(images.shape)))
        x = images.float().expand(-1, 3, -1, -1)
        if min(x.shape[2:]) < 64:
            x = functional.interpolate(x, size=(64, 64), mode="bilinear", align_corners=False)
        x = ((2 * x - 1) - torch.tensor(_SHIFT).view(1, 3, 1, 1)) / torch.tensor(_SCALE).view(1, 3, 1, 1)
        features = []
        for number, ((weight, bias), (_, _, _, stride, padding)) in enumerate(
            zip(self._convolutions, _ALEXNET, strict=True)
        ):
            if number in _POOL_BEFORE:
                x = functional.max_pool2d(x, 3, 2)
            x = torch.relu(functional.conv2d(x, weight, bias, stride, padding))
            features.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return features


def _alike(images: Tensor, originals: Tensor) -> None:
    if images.shape != originals.shape or images.dim() != 4 or not len(images):
        raise InputError(
            "not two batches of images of one shape",
            expected=f"(N, C, H, W), {tuple(originals.shape)}",
            got=str(tuple(images.shape)),
        )


def _gaussian(size: int) -> Tensor:
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-at.square() / (2 * SSIM_SIGMA * SSIM_SIGMA))
    return weights / weights.sum()


def _centred(images: Tensor) -> Tensor:
    flat = images.double().flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    # Contrast that is only rounding is no contrast.
    seen = norms > 1e-9 * math.sqrt(flat.shape[1])
    return torch.where(seen, flat / norms.clamp_min(1e-300), torch.zeros_like(flat))

"""Adversarial examples made on a stolen model and tried on its victim: how well do they transfer?

FGSM: Goodfellow, Shlens, Szegedy, "Explaining and Harnessing Adversarial Examples" (ICLR 2015). PGD: Madry, Makelov,
Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks" (ICLR 2018).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from motte.errors import SettingError


@dataclass(frozen=True, slots=True)
class Ball:
    """How far an image may be changed.

    Args:
        epsilon: per pixel, in pixel units of [0, 1].
        mean, std: per channel: images are normalised.
    """

    epsilon: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 1:
            raise SettingError("not a distance of pixels", expected="above 0, at most 1", got=repr(self.epsilon))

    def bounds(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and the highest values allowed, normalised: within epsilon, and pixels in [0, 1]."""
        mean, std = (images.new_tensor(each).view(1, -1, 1, 1) for each in (self.mean, self.std))
        low, high = (0 - mean) / std, (1 - mean) / std
        return torch.maximum(images - self.epsilon / std, low), torch.minimum(images + self.epsilon / std, high)

    def step(self, images: Tensor, share: float) -> Tensor:
        """``share`` of epsilon, normalised, per channel."""
        return share * self.epsilon / images.new_tensor(self.std).view(1, -1, 1, 1)


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, ball: Ball) -> Tensor:
    """One step of the sign of the gradient, (N, C, H, W) normalised, against ``labels`` (N,)."""
    low, high = ball.bounds(images)
    moved = images + ball.step(images, 1.0) * _gradient(model, images, labels).sign()
    return torch.minimum(torch.maximum(moved, low), high)


def pgd(
    model: nn.Module, images: Tensor, labels: Tensor, ball: Ball, *, steps: int, generator: torch.Generator
) -> Tensor:
    """``steps`` projected steps of a quarter of epsilon, from a random point of the ball."""
    low, high = ball.bounds(images)
    moved = low + (high - low) * torch.rand(images.shape, generator=generator)
    for _ in range(steps):
        moved = moved + ball.step(images, 0.25) * _gradient(model, moved, labels).sign()
        moved = torch.minimum(torch.maximum(moved, low), high)
    return moved


def _gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    asked = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = functional.cross_entropy(model(asked), labels, reduction="sum")
        return torch.autograd.grad(loss, asked)[0]

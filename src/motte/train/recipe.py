"""How a model is trained where the user does not say otherwise: the published recipes, per kind of model and data.

CIFAR-size images: He et al., "Deep Residual Learning" (CVPR 2016), section 4.2 (SGD, momentum 0.9, batch 128, lr 0.1),
with the weight decay 5e-4 and the cosine decay (Loshchilov and Hutter, SGDR, ICLR 2017) that later work settled on;
VGG diverges at 0.1 and takes 0.05. ImageNet: the same paper's section 3.4 (batch 256, weight decay 1e-4, lr divided by
10 every 30 epochs, 90 in all). The grey sets of 28 x 28 need fewer epochs than CIFAR.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from motte.errors import SettingError
from motte.train.settings import SchedulerName, TrainSettings

LARGE_SIDE: Final = 64
"""Images above this side are trained as ImageNet is."""
_GREY_EPOCHS: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A complete recipe: SGD with momentum; the learning rate follows from the epoch alone.

    ``lr_decay`` and ``decay_period`` (epochs) are those of the scheduler ``step`` and unused under ``cos``.
    """

    batch_size: int
    epochs: int
    lr: float
    scheduler: SchedulerName
    lr_decay: float = 0.1
    decay_period: int = 30
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def lr_at(self, epoch: int) -> float:
        """The learning rate in ``epoch``, counted from 0: a pure function, so that nothing of it needs saving."""
        if self.scheduler == "step":
            return self.lr * self.lr_decay ** (epoch // self.decay_period)
        return 0.5 * self.lr * (1.0 + math.cos(math.pi * epoch / self.epochs))

    def facts(self) -> Mapping[str, int | float | str]:
        """For checkpoints and records; only what has an effect."""
        shared: dict[str, int | float | str] = {
            "batch_size": self.batch_size,
            "epochs": self.epochs,
            "lr": self.lr,
            "scheduler": self.scheduler,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
        }
        if self.scheduler == "step":
            shared |= {"lr_decay": self.lr_decay, "decay_period": self.decay_period}
        return shared


def published(model: str, image_shape: tuple[int, int, int]) -> Recipe:
    """The recipe for a model and images of (C, H, W)."""
    vgg = model.startswith("vgg")
    if max(image_shape[1:]) > LARGE_SIDE:
        return Recipe(batch_size=256, epochs=90, lr=0.01 if vgg else 0.1, scheduler="step", weight_decay=1e-4)
    epochs = _GREY_EPOCHS if image_shape[0] == 1 else 200
    return Recipe(batch_size=128, epochs=epochs, lr=0.05 if vgg else 0.1, scheduler="cos")


def resolve(settings: TrainSettings, image_shape: tuple[int, int, int]) -> Recipe:
    """The published recipe with everything that the user chose in its place.

    Raises:
        SettingError: ``lr_decay`` or ``decay_period`` where the recipe decays by cosine.
    """
    names = ("batch_size", "epochs", "lr", "scheduler", "lr_decay", "decay_period", "momentum", "weight_decay")
    chosen = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    recipe = replace(published(settings.model, image_shape), **chosen)
    if recipe.scheduler == "cos" and ({"lr_decay", "decay_period"} & set(chosen)):
        raise SettingError(
            "lr_decay and decay_period belong to the step scheduler", where="scheduler", got="cos (of the recipe)"
        )
    return recipe

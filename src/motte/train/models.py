"""Models to train, by name, for any image size, number of channels and classes: ``build_model("resnet18", ...)``.

==============================================  ======================================================================
``resnet18 resnet34 resnet50 resnet101 ...152``  torchvision's; small or ImageNet stem
``vgg11 vgg13 vgg16 vgg19``, each also ``_bn``    torchvision's; small or ImageNet head
``resnet20 resnet32``                             for small images (He et al., CVPR 2016, section 4.2); 16 channels wide
``path/to/file.py:factory``                       a model of the user's own; its code is **run**
==============================================  ======================================================================
"""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Final, Literal

from motte.errors import InputError, SettingError, UnsupportedError
from motte.train.augment import check_seed
from motte.train.datasets.records import SMALL_SIDE
from motte.zoo import own_models
from motte.zoo.weights import seeded

if TYPE_CHECKING:
    from torch import nn

Stem = Literal["auto", "small", "imagenet"]
SMALL_RESNETS: Final = {"resnet20": 3, "resnet32": 5}
"""Name -> blocks of each of the three stages."""
_MAX_CHANNELS: Final = 4096
_MAX_CLASSES: Final = 1 << 20
_MAX_WIDTH: Final = 16.0
_LEAST_SIDE: Final = 32


def model_names() -> tuple[str, ...]:
    """Every name that :func:`build_model` knows; needs torchvision."""
    from motte.train.stems import RESNETS, VGGS

    vggs = tuple(f"{name}{ending}" for name in VGGS for ending in ("", "_bn"))
    return (*SMALL_RESNETS, *RESNETS, *vggs)


def build_model(
    name: str,
    *,
    classes: int,
    image_shape: tuple[int, int, int],
    seed: int,
    width: float = 1.0,
    stem: Stem = "auto",
) -> nn.Module:
    """A freshly initialised model in training mode: (N, C, H, W) float32 -> logits (N, classes).

    Args:
        name: a name of the table above, or ``path/to/file.py:factory``, whose code is **run**.
        image_shape: (C, H, W) of one image.
        seed: of the initialisation; torch's own generator is as before afterwards.
        width: channels (and hidden features of VGG) times this, rounded; for narrow nets in tests.
        stem: ``small`` or ``imagenet``; ``auto``: small up to 64 pixels.

    Raises:
        InputError: no model of that name, or a user's model that does not fit the data.
        SettingError: a number out of its range, or ``width`` or ``stem`` where the model takes none.
        UnsupportedError: torchvision is missing, or images too small for the model.
    """
    _check(classes, image_shape, seed, width, stem)
    if own_models.is_path(name):
        return _own(name, classes, image_shape, seed, width, stem)
    _require(name)
    channels, height, image_width = image_shape
    small = stem == "small" or (stem == "auto" and max(height, image_width) <= SMALL_SIDE)
    if not small and name.startswith("vgg") and min(height, image_width) < _LEAST_SIDE:
        raise UnsupportedError(
            "images too small for five poolings", where=name, expected=f"{_LEAST_SIDE} pixels", got=str(image_shape)
        )
    with seeded(seed):
        if name in SMALL_RESNETS:
            model = _small_resnet(name, channels, classes, width, stem)
        else:
            model = _torchvision(name, channels, classes, width, small=small)
    return model.train()


def _torchvision(name: str, channels: int, classes: int, width: float, *, small: bool) -> nn.Module:
    from motte.train import stems

    stem: stems.Stem = "small" if small else "imagenet"
    if name in stems.RESNETS:
        block, blocks = stems.RESNETS[name]
        resnet: nn.Module = stems.StemmedResNet(
            block, blocks, in_channels=channels, classes=classes, width=width, stem=stem
        )
        return resnet
    plain = name.removesuffix("_bn")
    return stems.vgg(plain, batch_norm=plain != name, in_channels=channels, classes=classes, width=width, stem=stem)


def _small_resnet(name: str, channels: int, classes: int, width: float, stem: Stem) -> nn.Module:
    from motte.zoo.resnet20 import ResNet20

    if stem == "imagenet":
        raise SettingError("this model has the small stem only", where=name, got="imagenet")
    return ResNet20(channels, classes, max(1, round(16 * width)), blocks=SMALL_RESNETS[name])


def _own(name: str, classes: int, image_shape: tuple[int, int, int], seed: int, width: float, stem: Stem) -> nn.Module:
    if width != 1.0 or stem != "auto":
        raise SettingError("width and stem are for models known by name", where=name)
    model = own_models.make(name, seed=seed)
    _check_fit(model, name, classes, image_shape)
    return model.train()


def _check_fit(model: nn.Module, name: str, classes: int, image_shape: tuple[int, int, int]) -> None:
    """Ask a user's model about two black images, in evaluation mode, so that nothing of its state changes.

    Raises:
        InputError: it fails, or does not give one logit for each class.
    """
    import torch

    like = next(iter(model.parameters()), torch.empty(0))
    images = torch.zeros(2, *image_shape, dtype=like.dtype if like.is_floating_point() else torch.float32)
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with seeded(None), torch.no_grad():
            logits = model(images.to(like.device))
    except (RuntimeError, ValueError, TypeError, IndexError) as problem:
        raise InputError(
            "the model does not take images of this data",
            where=name,
            got=str(problem)[:300],
            expected=f"(N, *{image_shape})",
        ) from problem
    finally:
        for module, training in was_training.items():
            module.training = training
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != (2, classes):
        got = str(tuple(logits.shape)) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise InputError("the model's answer does not fit the data", where=name, expected=f"(2, {classes})", got=got)


def _require(name: str) -> None:
    known = model_names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        raise InputError(
            "no model of that name to train",
            expected=f"{', '.join(known)}, or path/to/file.py:factory",
            got=repr(name)[:200],
            hint=f"did you mean {', '.join(close)}?" if close else None,
        )


def _check(classes: int, image_shape: tuple[int, ...], seed: int, width: object, stem: str) -> None:
    if type(classes) is not int or not 1 <= classes <= _MAX_CLASSES:
        raise SettingError("not a number of classes", expected=f"1 to {_MAX_CLASSES}", got=repr(classes)[:80])
    odd = len(image_shape) != 3 or any(type(each) is not int or each < 1 for each in image_shape)
    if odd or image_shape[0] > _MAX_CHANNELS:
        raise SettingError("not the shape of an image", expected="(C, H, W)", got=repr(image_shape)[:80])
    check_seed(seed)
    if not isinstance(width, int | float) or not (math.isfinite(width) and 0 < width <= _MAX_WIDTH):
        raise SettingError("not a width factor", expected=f"above 0, at most {_MAX_WIDTH:g}", got=repr(width)[:80])
    if stem not in ("auto", "small", "imagenet"):
        raise SettingError("unknown stem", expected="auto, small or imagenet", got=repr(stem)[:80])

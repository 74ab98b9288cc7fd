"""The one model that comes with the package: a ResNet-20 trained on Fashion-MNIST, and ten real test images.

``scripts/train_resnet20.py`` writes the files that lie in ``shipped/``: the weights, the facts (accuracy, classes,
normalisation, how they were made) and the first test image of each class. docs/model_card.md is the model card.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from motte.capture.signature import ImagePreprocessing, Signature
from motte.errors import FormatError, ResourceError
from motte.limits import MAX_MANIFEST_BYTES
from motte.strict_json import Fields, parse
from motte.zoo.models import BATCH, BuiltModel, image_example
from motte.zoo.weights import WeightsChoice, load_state, read_state, seeded

NAME = "resnet20-fashion-mnist"
_STEM = "resnet20_fashion_mnist"
_SIDE = 28
_CLASSES = 10


@dataclass(frozen=True, slots=True)
class Facts:
    """What the training script measured and recorded.

    ``accuracy`` is the share in [0, 1] of the ``test_images`` whose largest logit is the true class.
    """

    accuracy: float
    test_images: int
    epochs: int
    seed: int
    batch_size: int
    torch: str
    mean: float
    std: float
    classes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ShippedImage:
    """A real test image and its true class."""

    path: Path
    label: int
    label_name: str


def folder() -> Path:
    """The folder of the shipped files.

    Raises:
        ResourceError: motte was installed without them, or runs from an archive.
    """
    place = resources.files("motte.zoo") / "shipped"
    if not isinstance(place, Path) or not place.is_dir():
        raise ResourceError(
            "the shipped model is missing from this installation", where=str(place), hint="install motte from its wheel"
        )
    return place


def facts() -> Facts:
    """The facts beside the weights.

    Raises:
        ResourceError: the file is missing.
        FormatError: it is not what the training script writes.
    """
    fields = Fields(parse(_file(f"{_STEM}.json").read_bytes(), max_bytes=MAX_MANIFEST_BYTES, what=_STEM), where=_STEM)
    found = Facts(
        accuracy=fields.number("accuracy"),
        test_images=fields.integer("test_images", low=1, high=1 << 30),
        epochs=fields.integer("epochs", low=1, high=1 << 20),
        seed=fields.integer("seed", low=0, high=1 << 62),
        batch_size=fields.integer("batch_size", low=1, high=1 << 20),
        torch=fields.text("torch", max_bytes=100),
        mean=fields.number("mean"),
        std=fields.number("std"),
        classes=tuple(fields.items("classes", max_items=_CLASSES, read=_class_name)),
    )
    fields.done()
    return found


def images() -> tuple[ShippedImage, ...]:
    """The ten images, in order of class. The file name is ``LABEL_NAME.png``."""
    names = facts().classes
    found = []
    for path in sorted(folder().glob("*_*.png")):
        label = int(path.name.partition("_")[0])
        found.append(ShippedImage(path, label, names[label]))
    return tuple(sorted(found, key=lambda image: image.label))


def build(weights: WeightsChoice) -> BuiltModel:
    """The shipped model in eval mode, with its own weights unless others are chosen."""
    from motte.zoo.resnet20 import ResNet20

    known = facts()
    photo = ImagePreprocessing(
        colour="grey", resize=_SIDE, crop=_SIDE, interpolation="bilinear", mean=(known.mean,), std=(known.std,)
    )
    with seeded(weights.random_seed):
        model = ResNet20(classes=len(known.classes))
    model.eval()
    origin = "random"
    if weights.random_seed is None:
        file = weights.file or _file(f"{_STEM}.safetensors")
        origin = "file" if weights.file is not None else "shipped"
        load_state(model, read_state(file), where=str(file))
    signature = Signature(NAME, origin, photo, labels=known.classes)
    return BuiltModel(NAME, model, (image_example(photo),), {"x": {0: BATCH}}, signature)


def _class_name(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise FormatError("not the name of a class", where=where, got=repr(value)[:80])
    return value


def _file(name: str) -> Path:
    path = folder() / name
    if not path.is_file():
        raise ResourceError(
            "a shipped file is missing from this installation", where=str(path), hint="install motte again"
        )
    return path

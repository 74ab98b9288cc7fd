"""torchvision's classification models: architecture, published weights, preprocessing and labels from its metadata."""

from __future__ import annotations

import difflib
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motte.capture.signature import ImagePreprocessing, Signature
from motte.errors import InputError, ResourceError, SettingError, UnsupportedError
from motte.zoo import download
from motte.zoo.models import BATCH, BuiltModel, image_example
from motte.zoo.weights import WeightsChoice, load_state, read_state, seeded

if TYPE_CHECKING:
    from torch import Tensor, nn

# The published weights of these two expect the input rescaled inside the model, and were saved with their training-only
# heads, which eval mode never runs. Their slow default initialisation is not used.
_INCEPTION = {"transform_input": True, "init_weights": False}
_BUILDER_OPTIONS: Mapping[str, Mapping[str, Any]] = {"googlenet": _INCEPTION, "inception_v3": _INCEPTION}
# torchvision's own rule for the names in its published DenseNet files ("norm.1" became "norm1").
_DENSENET_NAME = re.compile(
    r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\.(?:weight|bias|running_mean|running_var|num_batches_tracked))$"
)


def names() -> list[str]:
    """The classification models of the installed torchvision, sorted."""
    models = _models()
    found: list[str] = models.list_models(module=models)
    return found


def require(name: str) -> None:
    """Refuse what is no classification model of the installed torchvision.

    Raises:
        UnsupportedError: a torchvision model of another task.
        InputError: no model of that name; the hint lists close ones.
    """
    known = names()
    if name in known:
        return
    if name in _models().list_models():
        raise UnsupportedError(
            "a torchvision model, but not of image classification",
            got=name,
            hint="wrap it in your own FILE.py:FACTORY with example_inputs(), see docs/zoo.md",
        )
    close = difflib.get_close_matches(name, known, n=3)
    raise InputError(
        "no model of that name",
        got=name,
        hint=(f"did you mean {', '.join(close)}? " if close else "") + "`motte zoo list --all` names every model",
    )


def published(name: str, which: str | None) -> Any:
    """The weights-enum entry of ``name``: torchvision's default one, or the one called ``which``.

    Raises:
        SettingError: no published set of that name.
    """
    everything = _models().get_model_weights(name)
    # Sets without categories are feature extractors whose classifier was never trained (VGG16's IMAGENET1K_FEATURES).
    entries = [entry for entry in everything if entry.meta.get("categories")]
    if which is None:
        return everything.DEFAULT
    for entry in entries:
        if entry.name == which:
            return entry
    raise SettingError(
        "no published weights of that name", where=name, expected=" or ".join(e.name for e in entries), got=which
    )


def preprocessing(name: str, entry: Any) -> ImagePreprocessing:
    """How photos become inputs, as the weights-enum entry states it.

    Raises:
        UnsupportedError: the entry's transforms are not those of image classification.
    """
    transforms = entry.transforms()
    if type(transforms).__name__ != "ImageClassification":
        raise UnsupportedError("unknown preprocessing", where=name, got=type(transforms).__name__)
    return ImagePreprocessing(
        colour="rgb",
        resize=int(transforms.resize_size[0]),
        crop=int(transforms.crop_size[0]),
        interpolation=transforms.interpolation.value,
        mean=tuple(float(value) for value in transforms.mean),
        std=tuple(float(value) for value in transforms.std),
    )


def build(name: str, weights: WeightsChoice) -> BuiltModel:
    """The model with the chosen weights, in eval mode.

    Raises:
        ResourceError: no weights chosen and none in the cache; the hint names the three ways out.
        InputError: the file does not fit the architecture.
    """
    require(name)
    entry = published(name, weights.published)
    state, origin, where = _state(name, entry, weights)
    if weights.file is not None and weights.published is None:
        entry = _entry_of_file(name, weights.file) or entry
    photo = preprocessing(name, entry)
    with seeded(weights.random_seed):
        model: nn.Module = _models().get_model(name, weights=None, **_BUILDER_OPTIONS.get(name, {}))
    model.eval()
    if state is not None:
        load_state(model, _renamed(name, state), where=where)
    signature = Signature(name, origin, photo, labels=tuple(entry.meta["categories"]))
    return BuiltModel(name, model, (image_example(photo),), {_input_name(model): {0: BATCH}}, signature)


def pull(name: str, *, which: str | None = None, progress: download.Progress | None = None) -> Path:
    """Download the published weights of ``name`` into the cache; errors are those of :func:`download.fetch`."""
    require(name)
    return download.fetch(published(name, which).url, progress=progress)


def _models() -> Any:
    from motte.zoo import vision_ops

    return vision_ops.import_torchvision().models


def _state(name: str, entry: Any, weights: WeightsChoice) -> tuple[dict[str, Tensor] | None, str, str]:
    """Weights, their origin and where they lie."""
    if weights.random_seed is not None:
        return None, "random", "random weights"
    if weights.file is not None:
        return read_state(weights.file), "file", str(weights.file)
    path = download.cached(entry.url)
    if path is None:
        raise ResourceError(
            f"no weights for {name}",
            where=str(download.cache_folder()),
            hint=f"`motte zoo pull {name}` downloads the published ones, --weights FILE takes a file that you have,"
            " --random-weights goes on without training",
        )
    return read_state(path), "published", str(path)


def _entry_of_file(name: str, file: Path) -> Any:
    """The published set that ``file`` is, by name and hash: it has its own preprocessing. None if it is none."""
    for entry in _models().get_model_weights(name):
        if download.file_name(entry.url) == file.name and download.hash_matches(file):
            return entry
    return None


def _renamed(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if not name.startswith("densenet"):
        return state
    renamed = OrderedDict((_DENSENET_NAME.sub(r"\1\2", key), value) for key, value in state.items())
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        renamed._metadata = metadata  # type: ignore[attr-defined]
    return renamed


def _input_name(model: nn.Module) -> str:
    import inspect

    return next(iter(inspect.signature(model.forward).parameters))

"""Accuracy on labelled images: of the shipped model alone, which has real weights and comes with real images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from motte.capture.signature import ImagePreprocessing, Signature
from motte.run.photos import prepare_image, read_image
from motte.zoo import shipped_models

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Answer = Callable[[Mapping[str, NDArray[Any]]], Sequence[NDArray[Any]]]


def why_no_accuracy(signature: Signature) -> str | None:
    """Why there is no accuracy to state; None: there is."""
    if signature.weights_origin == "random":
        return "random weights: no answer means anything"
    if signature.model != shipped_models.NAME:
        return "no labelled images of this model are at hand"
    if signature.weights_origin != "shipped":
        return "other weights than the shipped ones"
    return None


def labelled_images(signature: Signature) -> tuple[NDArray[Any], tuple[int, ...]]:
    """The images that come with the shipped model, (N, 1, 28, 28) f32, and their classes."""
    pre = signature.preprocessing
    if not isinstance(pre, ImagePreprocessing):
        raise RuntimeError("the shipped model takes images")
    images = shipped_models.images()
    arrays = [prepare_image(read_image(each.path, where=each.path.name), pre) for each in images]
    return np.concatenate(arrays), tuple(each.label for each in images)


def accuracy(answer: Answer, signature: Signature, batch: int, name: str) -> float:
    """The share of the labelled images whose largest output is their class.

    Args:
        answer: outputs for inputs by name at exactly ``batch`` images; the last batch is filled up.
        name: of the input.
    """
    images, labels = labelled_images(signature)
    right = 0
    for start in range(0, len(labels), batch):
        chunk, wanted = images[start : start + batch], labels[start : start + batch]
        missing = batch - len(chunk)
        filled = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)]) if missing else chunk
        found = np.asarray(answer({name: filled})[0]).argmax(axis=1)
        right += sum(int(found[index]) == label for index, label in enumerate(wanted))
    return right / len(labels)

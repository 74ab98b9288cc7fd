"""A small victim, its data, and a simple attacker: what the tests of the audit share."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from motte.audit.interface import Context, Curve, Knowledge, Metric, Picture, PublicData, Result, Scored, Truth, View
from motte.audit.intervals import of_mean
from motte.capture.signature import Signature
from motte.train.augment import CropFlip
from motte.train.data import DataSet
from motte.train.datasets.records import ArrayPixels, FixedRecords
from motte.zoo.models import BuiltModel

SIDE, CLASSES, CHANNELS = 8, 4, 6


def victim(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, CHANNELS, 3, padding=1),
        nn.BatchNorm2d(CHANNELS),
        nn.ReLU(inplace=True),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(CHANNELS * 16, CLASSES),
    ).eval()


def images_of(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bright bars on noise, (N, 1, 8, 8) uint8; the label is where the bar stands."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(CLASSES, size=count)
    images = generator.integers(60, size=(count, 1, SIDE, SIDE))
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label : 2 * label + 2] += 160
    return images.astype(np.uint8), labels.astype(np.int64)


def data_set(train: int = 64, test: int = 48) -> DataSet:
    splits = [
        FixedRecords(ArrayPixels(images), labels, augmentation=CropFlip(0, False), image_size=None)
        for images, labels in (images_of(train, 1), images_of(test, 2))
    ]
    return DataSet(
        name="bars",
        train=splits[0],
        test=splits[1],
        classes=tuple("abcd"),
        shape=(1, SIDE, SIDE),
        mean=(0.3,),
        std=(0.3,),
        padding=0,
        flip=False,
        private=False,
        seed=0,
        provenance="made for a test",
    )


def built(model: nn.Module | None = None) -> BuiltModel:
    model = victim() if model is None else model
    signature = Signature("bars-net", "random")
    return BuiltModel("bars-net", model, (torch.zeros(2, 1, SIDE, SIDE),), {}, signature)


class Peek:
    """Reconstructs an image from the channel mean of what left of one layer, fitted linearly on public pairs."""

    name = "reconstruction for a test"
    reference = "none"
    metrics = (Metric("psnr", "dB"), Metric("error", "1", higher_is_worse=False))
    knowledge = (Knowledge.RECORDING, Knowledge.PUBLIC_DATA, Knowledge.PIPELINE)
    fitted = 0

    def __init__(self, layer: str) -> None:
        self.layer: str | None = layer
        self._map: Tensor | None = None
        self._mean = torch.zeros(())

    def fit(self, public: PublicData, context: Context) -> None:
        type(self).fitted += 1
        pixels = public.pixels(public.images).flatten(1)
        self._mean = pixels.mean(0)
        seen = public.pipeline.observe(public.images, layers=(str(self.layer),), answers=False).batch(str(self.layer))
        if seen is not None:
            features = torch.cat((seen.flatten(1), torch.ones(len(seen), 1)), 1).double()
            ridge = 1e-3 * torch.eye(features.shape[1], dtype=torch.float64)
            self._map = torch.linalg.solve(features.T @ features + ridge, features.T @ pixels.double())

    def attack(self, view: View, context: Context) -> Result:
        seen = view.batch(str(self.layer))
        context.progress(1, 1, "looking")
        if seen is None or self._map is None:
            return Result({"images": self._mean.expand(context.budget.samples, -1)}, ("saw nothing",))
        features = torch.cat((seen.flatten(1), torch.ones(len(seen), 1)), 1).double()
        return Result({"images": (features @ self._map).float().clamp(0, 1)})

    def score(self, result: Result, truth: Truth, context: Context) -> Scored:
        errors = ((result.values["images"] - truth.pixels().flatten(1)) ** 2).mean(1)
        psnr = -10 * errors.clamp_min(1e-10).log10()
        rows = (("originals", truth.pixels()), ("guesses", result.values["images"].reshape(-1, 1, SIDE, SIDE)))
        return Scored(
            {"psnr": of_mean(psnr.tolist(), seed=context.seed), "error": of_mean(errors.tolist(), seed=context.seed)},
            pictures=(Picture("guesses of a test", rows),),
            curves=(Curve("errors", "record", "error", tuple(enumerate(errors.tolist()))),),
        )


@pytest.fixture
def bars() -> SimpleNamespace:
    """All of the above."""
    return SimpleNamespace(
        victim=victim, data_set=data_set, built=built, Peek=Peek, images_of=images_of, SIDE=SIDE, CLASSES=CLASSES
    )

"""Tiny data, narrow nets, and an accelerator in this process: a whole run takes less than a second."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from motte.accelerator.in_process import InProcessAccelerator
from motte.link.recording import Recorder
from motte.train.settings import TrainSettings

SIDE = 28
TRAIN, TEST = 24, 8
MODEL = """
from torch import Tensor, nn
import torch

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 8, 3, padding=1, stride=2)
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x))
        x = torch.relu(self.third(x))
        return self.last(self.drop(x.flatten(1)))

def smooth():
    return Net()

def sure():
    net = Net()
    net.drop = nn.Identity()
    return net
"""


def write_idx(path: Path, values: np.ndarray[Any, Any]) -> None:
    header = b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes(), mtime=0))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ``--data mnist --data-dir``: 24 training and 8 test images of 28 x 28."""
    folder = tmp_path_factory.mktemp("digits")
    rng = np.random.default_rng(1)
    for name, count in (("train", TRAIN), ("t10k", TEST)):
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, SIDE, SIDE), dtype=np.uint8))
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))
    return folder


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of the user's own without BatchNorm; ``:smooth`` has dropout, ``:sure`` has none."""
    path = tmp_path_factory.mktemp("model") / "net.py"
    path.write_text(MODEL)
    return str(path)


Make = Callable[..., TrainSettings]


@pytest.fixture
def make(digits: Path, net: str) -> Make:
    """Settings of a tiny run: 6 steps of 8 images in two epochs."""

    def made(**changes: Any) -> TrainSettings:
        usual: dict[str, Any] = {
            "model": f"{net}:smooth",
            "data": "mnist",
            "data_dir": digits,
            "image_size": 8,
            "batch_size": 8,
            "epochs": 2,
            "lr": 0.05,
            "threads": 1,
        }
        if changes.get("scheme", "asymmetric") in ("asymmetric", "residual"):
            usual["noise"] = None
        return TrainSettings(**{**usual, **changes})

    return made


class Liar(InProcessAccelerator):
    """Adds to one element of every answer from the ``after``-th on."""

    after: int | None = None

    def answer(self, layer: str, y: Tensor) -> Tensor:
        self.answers = getattr(self, "answers", 0) + 1
        if Liar.after is None or self.answers <= Liar.after:
            return y
        lie = y.clone()
        lie.view(-1)[0] += 10.0
        return lie


class _Here:
    """Stands for :class:`motte.accelerator.process.LocalAccelerator`: the same frames, without a process."""

    def __init__(self, device: str, *, threads: int, retries: int, recorder: Recorder | None) -> None:
        self.link = Liar(device, recorder)

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()


@pytest.fixture(autouse=True)
def in_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerators run in this process, but for tests that ask for ``real_accelerator``; one thread everywhere."""
    monkeypatch.setattr(Liar, "after", None)
    torch.set_num_threads(1)
    if "real_accelerator" not in request.fixturenames:
        monkeypatch.setattr("motte.accelerator.process.LocalAccelerator", _Here)


@pytest.fixture
def real_accelerator() -> None:
    """A process of its own, as in use."""


@pytest.fixture
def liar() -> type[Liar]:
    """Set ``after`` to make the accelerator lie."""
    return Liar


def weights_of(model: torch.nn.Module) -> dict[str, bytes]:
    """Every tensor of a model as bytes."""
    return {name: value.contiguous().numpy().tobytes() for name, value in model.state_dict().items()}

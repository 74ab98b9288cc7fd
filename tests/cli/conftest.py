"""What the tests of the command line share: running it in this process, a small model of one's own, a sealed bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from motte.cli import main

MODEL = """
import torch
from torch import nn

labels = ["cat", "dog", "bird"]
preprocessing = {"kind": "image", "colour": "rgb", "resize": 8, "crop": 8, "interpolation": "bilinear",
                 "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = x + torch.relu(self.second(x))
        return self.head(x.mean((2, 3)))

def net():
    torch.manual_seed(1)
    print("built")  # a model may print what it likes; stdout stays ours
    return Net()

def broken():
    raise KeyError("no such thing")

def sized():
    class Sized(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x
    return Sized()
"""


@dataclass(frozen=True)
class Ran:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout; more or less than one is an error."""
        return json.loads(self.out)


Motte = Callable[..., Ran]


@pytest.fixture
def motte(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Motte:
    """Run the command line here; arguments may be paths and numbers."""
    monkeypatch.delenv("MOTTE_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(each) for each in arguments])
        found = capsys.readouterr()
        return Ran(code, found.out, found.err)

    return run


@dataclass(frozen=True)
class Place:
    """A folder with the keys of an owner (signer) and a client (recipient), a model of one's own and its bundle."""

    folder: Path

    @property
    def model(self) -> str:
        return f"{self.folder / 'own.py'}:net"

    @property
    def bundle(self) -> Path:
        return self.folder / "own.motte"

    @property
    def photo(self) -> Path:
        return self.folder / "photo.png"

    @property
    def seal_keys(self) -> tuple[str, ...]:
        return ("--recipient", str(self.folder / "client.pub"), "--signer-key", str(self.folder / "owner.key"))

    @property
    def run_keys(self) -> tuple[str, ...]:
        return ("--key", str(self.folder / "client.key"), "--signer", str(self.folder / "owner.pub"))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Made once; tests that change a bundle copy it first."""
    from PIL import Image

    made = Place(tmp_path_factory.mktemp("cli"))
    (made.folder / "own.py").write_text(MODEL)
    folder = str(made.folder)
    assert main(["keys", "new", "owner", "--kind", "signer", "--folder", folder, "-q"]) == 0
    assert main(["keys", "new", "client", "--folder", folder, "-q"]) == 0
    image = Image.new("RGB", (16, 12), (200, 40, 90))
    image.putpixel((3, 4), (0, 255, 0))
    image.save(made.photo)
    assert main(["seal", made.model, "--parts", "3", *made.seal_keys, "-o", str(made.bundle), "-q"]) == 0
    return made

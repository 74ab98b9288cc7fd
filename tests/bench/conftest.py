"""A tiny model of one's own, and the bench's command line run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from motte.cli import bench, compare

NET = """
import torch
from torch import nn

preprocessing = {"kind": "image", "colour": "rgb", "resize": 8, "crop": 8, "interpolation": "bilinear",
                 "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = x + torch.relu(self.second(x))
        return self.head(x.mean((2, 3)))

def net():
    torch.manual_seed(1)
    print("a model may print what it likes")
    return Net()
"""


@dataclass(frozen=True)
class Ran:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.out)


Bench = Callable[..., Ran]


@pytest.fixture
def run_bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """``motte bench ...``, or ``motte compare ...``, here."""
    monkeypatch.setenv("COLUMNS", "80")
    app = typer.Typer()
    app.add_typer(bench.app, name="bench")
    app.command("compare")(compare.compare)
    command = typer.main.get_command(app)

    def run(*words: object) -> Ran:
        capsys.readouterr()
        code = command.main([str(word) for word in words], "motte", standalone_mode=False)
        found = capsys.readouterr()
        return Ran(code if isinstance(code, int) else 0, found.out, found.err)

    return run


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> str:
    """``file.py:factory`` of a net (N, 3, 8, 8) -> (N, 3)."""
    path: Path = tmp_path_factory.mktemp("net") / "own.py"
    path.write_text(NET)
    return f"{path}:net"

"""Running the command line here; the makers of evidence of the tests of the library, as the package attest_makers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from motte.cli import main

if "attest_makers" not in sys.modules:
    _package = ModuleType("attest_makers")
    _package.__path__ = [str(Path(__file__).parents[1] / "attest")]
    sys.modules["attest_makers"] = _package


@dataclass(frozen=True)
class Ran:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def motte(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    monkeypatch.delenv("MOTTE_DEBUG", raising=False)

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(each) for each in arguments])
        found = capsys.readouterr()
        return Ran(code, found.out, found.err)

    return run

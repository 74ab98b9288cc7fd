"""Running the command line here, an owner's keys, scripts, and one closed image that is built once."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from motte.cli import main

SAYS = """
import json, os, sys
import beside
from motte.enclave.script_run import current
run = current()

def could(what):
    try:
        what()
        return True
    except OSError:
        return False

tried = {
    "write": lambda: open("/made", "w").close(),
    "read what is included": lambda: open(sys.argv[3], "rb").close(),
    "read other files": lambda: os.listdir("/proc/1"),
    "run": lambda: "--run" not in sys.argv or os.execv("/usr/bin/python3", ["python3", "-V"]),
}
tried = {name: could(what) for name, what in tried.items()} if "--try" in sys.argv else None
print(json.dumps({"tried": tried, "arguments": sys.argv[1:], "name": __name__, "rank": run.rank, "ranks": run.ranks,
                  "peers": run.peers, "environment": dict(os.environ), "beside": beside.VALUE,
                  "accelerator": run.accelerator, "stdin": sys.stdin.read() if sys.stdin else ""}))
sys.exit(int(sys.argv[1]) if sys.argv[1:] else 0)
"""


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
def motte(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run the command line here; what a script prints is caught too."""
    monkeypatch.delenv("MOTTE_DEBUG", raising=False)

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        code = main([str(each) for each in arguments])
        found = capfd.readouterr()
        return Ran(code, found.out, found.err)

    return run


@dataclass(frozen=True)
class Owner:
    """An owner's folder: a signer's keys, and ``says.py``, which prints what it was given."""

    folder: Path

    @property
    def script(self) -> Path:
        return self.folder / "says.py"

    @property
    def key(self) -> Path:
        return self.folder / "owner.key"

    @property
    def public(self) -> Path:
        return self.folder / "owner.pub"

    def signed(self, name: str, *arguments: str, script: Path | None = None, **fields: Any) -> Path:
        """A signed configuration of a script (``says.py``), made by the library."""
        from motte.enclave.script_run import ScriptRun, source_digest
        from motte.seal.keys import SignerPrivateKey, load

        key = load(self.key, SignerPrivateKey)
        digest = source_digest((script or self.script).read_bytes())
        made = ScriptRun(script=digest, arguments=arguments, signer=key.public, **fields)
        (self.folder / name).write_bytes(made.encode(key))
        return self.folder / name


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    return make_owner(tmp_path)


def make_owner(folder: Path) -> Owner:
    from motte.seal.keys import SignerPrivateKey, new

    new(folder, "owner", SignerPrivateKey)
    (folder / "says.py").write_text(SAYS)
    (folder / "beside.py").write_text("VALUE = 7\n")
    return Owner(folder)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The image of ``says.py``, which needs no torch, and its owner."""
    from motte.enclave.manifest import Choices
    from motte.enclave.script_image import Request, build
    from motte.seal.keys import SignerPublicKey, load_public

    own = make_owner(tmp_path_factory.mktemp("owner"))
    signer = load_public(own.public, SignerPublicKey)
    (own.folder / "data.bin").write_bytes(b"measured")
    request = Request(own.script, ("0",), signer, Choices(product=3, svn=7), include=(own.folder / "data.bin",))
    return build(own.folder / "image", request, lambda text: None), own


@pytest.fixture
def plant_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a Python program first on the PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def plant(name: str, text: str) -> Path:
        path = folder / name
        path.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return plant


if "attest_makers" not in sys.modules:
    _package = ModuleType("attest_makers")
    _package.__path__ = [str(Path(__file__).parents[1] / "attest")]
    sys.modules["attest_makers"] = _package

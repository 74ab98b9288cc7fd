"""One small sealed model for every test of the worker, made the way the library makes any."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey


def _tiny_model() -> ModuleType:
    name = "motte_tests_tiny_model"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("tiny_model.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@dataclass
class Sealed:
    """A bundle on disk, the model that it was made from and the keys that open it."""

    path: Path
    model: Any
    canary: bytes
    recipient: RecipientPrivateKey
    signer: SignerPrivateKey
    part_bytes: list[int]

    def load(self, **options: Any) -> Any:
        """motte.load with one thread and this bundle's keys, unless told otherwise."""
        import motte

        keywords = {"keys": self.recipient, "signer": self.signer.public, "threads": 1, "timeout_s": 60.0, **options}
        path = keywords.pop("path", self.path)
        return motte.load(path, **keywords)


def seal_tiny(folder: Path, parts: int, release: int = 3) -> Sealed:
    """Capture, plan in ``parts`` parts and seal the tiny model into ``folder``."""
    import torch

    from motte.capture.export import capture
    from motte.capture.signature import Signature
    from motte.plan.planner import plan_parts
    from motte.seal.manifest import Manifest, lay_out_parts
    from motte.seal.package import seal_model
    from motte.seal.run_terms import terms_of

    tiny = _tiny_model()
    model = tiny.tiny()
    captured = capture(model, (torch.zeros(2, 3, 16, 16),), dims={"x": {0: "batch"}}, name="tiny")
    plan = plan_parts(captured.graph, parts=parts, objective="memory", dims={"batch": 2})
    recipient, signer = RecipientPrivateKey.new(), SignerPrivateKey.new()
    manifest = Manifest(captured.graph, plan, Signature("tiny", "random"))
    path = folder / "tiny.motte"
    seal_model(
        path,
        manifest,
        captured.weights,
        release=release,
        recipients=[recipient.public],
        signer=signer,
        run=terms_of(plan.offload),
    )
    sizes = [part.layout.bytes for part in lay_out_parts(manifest)]
    return Sealed(path, model, tiny.CANARY, recipient, signer, sizes)


@pytest.fixture(scope="session")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    """The tiny model in four parts."""
    return seal_tiny(tmp_path_factory.mktemp("sealed"), 4)


@pytest.fixture
def seal_parts(tmp_path: Path) -> Callable[[int], Sealed]:
    """Seals the tiny model anew in any number of parts."""
    return lambda parts: seal_tiny(tmp_path, parts)


@pytest.fixture(scope="module")
def loaded(sealed: Sealed) -> Iterator[Any]:
    """A resident worker."""
    with sealed.load() as model:
        yield model

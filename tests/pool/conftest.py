"""One small model, sealed with and without its lowered form, and a look at what this process holds."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey


@dataclass(frozen=True)
class SealedNet:
    """Bundles of one net, what it answers to ``x``, and the keys that open them."""

    lowered: Path
    torch_only: Path
    x: Any
    expected: Any
    recipient: RecipientPrivateKey
    signer: SignerPrivateKey

    @property
    def keys(self) -> dict[str, Any]:
        """The arguments of every load."""
        return {"keys": self.recipient, "signer": self.signer.public}


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> SealedNet:
    """(N, 6) -> (N, 3), in two parts."""
    import torch

    from motte.capture.export import capture
    from motte.capture.signature import Signature
    from motte.lower.lower import lower
    from motte.lower.lowered import NotLowered
    from motte.plan.planner import plan_parts
    from motte.seal.manifest import Manifest
    from motte.seal.package import seal_model

    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    captured = capture(model, (torch.zeros(2, 6),), dims={"input": {0: "batch"}}, name="net")
    plan = plan_parts(captured.graph, parts=2, objective="weights", dims={"batch": 2})
    recipient, signer = RecipientPrivateKey.new(), SignerPrivateKey.new()
    folder = tmp_path_factory.mktemp("pool")
    forms = {"lowered": lower(captured.graph, plan), "torch_only": NotLowered({1: "it is planted"})}
    for name, form in forms.items():
        manifest = Manifest(captured.graph, plan, Signature("net", "random"), form)
        seal_model(folder / name, manifest, captured.weights, release=1, recipients=[recipient.public], signer=signer)
    x = torch.randn(4, 6)
    with torch.inference_mode():
        expected = model(x).numpy()
    return SealedNet(folder / "lowered", folder / "torch_only", x.numpy(), expected, recipient, signer)


@dataclass(frozen=True)
class Held:
    """Descriptors, child processes and threads of ours."""

    descriptors: int
    children: frozenset[int]
    threads: frozenset[str]


def held() -> Held:
    """What this process holds now."""
    children: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        # A thread may end between the listing and the reading; its children are then another thread's.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children.update(int(pid) for pid in (task / "children").read_text().split())
    names = frozenset(thread.name for thread in threading.enumerate())
    return Held(len(os.listdir("/proc/self/fd")), frozenset(children), names)


@pytest.fixture
def nothing_remains() -> Any:
    """Fails a test after which a process, a descriptor or a thread is left."""
    before = held()
    yield
    assert held() == before


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has workers be a shell script instead of Python."""

    def become(script: str) -> None:
        path = tmp_path / "worker"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr("motte.enclave.process.sys.executable", str(path))

    return become

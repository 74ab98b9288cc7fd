"""One closed image, built once; the rest of these tests uses planted files."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The shipped model, sealed and lowered."""
    for name in ("torch", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    from motte.doctor.image_trial import TrialBundle

    return TrialBundle.seal(tmp_path_factory.mktemp("trial") / "trial.motte")


@pytest.fixture(scope="session")
def built(trial: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A slim image for onnxruntime, run alone where this machine makes namespaces."""
    from motte.doctor.image_build import Request, build
    from motte.enclave.manifest import Choices

    request = Request("onnxruntime", True, Choices(product=3, svn=7))
    return build(tmp_path_factory.mktemp("image") / "image", request, lambda text: None, trial=trial)


@pytest.fixture
def clean() -> dict[str, Any]:
    """A manifest in which nothing is wrong, made as ours are."""
    from motte.enclave.image import ImageFile, ImageRecord
    from motte.enclave.manifest import Choices, manifest_of
    from motte.enclave.sizes import ModelNeed, derive

    files = tuple(
        ImageFile(path, 1000, "ab" * 32, "copied")
        for path in ("lib/x86_64-linux-gnu/libc.so.6", "lib64/ld-linux-x86-64.so.2", "usr/bin/python3")
    )
    record = ImageRecord("onnxruntime", False, files, (), {}, None, None, None)
    need = ModelNeed("planted", 10, 20, 30, 40, {"batch": 2})
    manifest = manifest_of(record, derive(record, need, threads=2), Choices(threads=2, product=3, svn=7))
    return json.loads(json.dumps(manifest))  # type: ignore[no-any-return]


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

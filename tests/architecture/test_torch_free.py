"""What must start fast and small: `import motte` loads neither torch nor numpy, and what needs no torch loads none.

Each import runs in a fresh interpreter; what it loaded is read from its ``sys.modules``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
HEAVY = ("torch", "torchvision", "transformers", "onnxruntime", "openvino")
TORCH_FREE_PACKAGES = ("plan", "seal", "measure", "doctor", "link")
TORCH_FREE_MODULES = (
    "motte.errors",
    "motte.limits",
    "motte.strict_json",
    *(f"motte.capture.{name}" for name in ("graph", "sizes", "signature", "text", "ops", "checks")),
    *(f"motte.linear.{name}" for name in ("operation", "nodes")),
    *(f"motte.offload.{name}" for name in ("settings", "placement", "graph_layers")),
    *(f"motte.trusted.{name}" for name in ("worker", "gate", "weights", "arena", "harden", "confidential")),
)


def loaded_by(statement: str, wanted: tuple[str, ...]) -> list[str]:
    """Which of the top-level packages ``wanted`` are loaded after ``statement`` ran alone."""
    script = (
        f"import sys\n{statement}\nprint(*sorted(set({wanted!r}) & {{name.split('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def modules_in(package: str) -> list[str]:
    paths = sorted((SOURCE / "motte" / package).rglob("*.py"))
    assert paths, f"there is no package motte.{package}"
    names = (".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in paths)
    return [name.removesuffix(".__init__") for name in names]


def packages() -> list[str]:
    return sorted(path.parent.name for path in (SOURCE / "motte").glob("*/__init__.py"))


def test_importing_the_root_loads_neither_torch_nor_numpy() -> None:
    assert loaded_by("import motte", (*HEAVY, "numpy", "cryptography", "rich", "typer")) == []


@pytest.mark.parametrize("name", TORCH_FREE_MODULES)
def test_the_foundations_and_the_artefact_types_need_no_torch(name: str) -> None:
    assert loaded_by(f"import {name}", HEAVY) == []


@pytest.mark.parametrize("package", TORCH_FREE_PACKAGES)
def test_no_module_of_these_packages_needs_torch(package: str) -> None:
    assert loaded_by("\n".join(f"import {name}" for name in modules_in(package)), HEAVY) == []


def test_every_package_is_lazy() -> None:
    assert loaded_by("\n".join(f"import motte.{name}" for name in packages()), HEAVY) == []


# --- the gate itself can fail --------------------------------------------------------------------------------------
def test_a_loaded_package_is_seen() -> None:
    assert loaded_by("import numpy.linalg", ("numpy", "torch")) == ["numpy"]


def test_an_import_that_fails_is_no_success() -> None:
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        loaded_by("import motte.nowhere", HEAVY)

"""A measurement of the worker's own code on this machine, for SIMULATED evidence of the ``process`` kind.

A stand-in for what hardware would measure: whoever runs the worker computes it, and could say anything. It lets a
policy refuse a worker that was changed by accident, and lets the whole way of keys be tried without hardware.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from motte.digests import sha256
from motte.strict_json import canonical

PACKAGES: Final = ("cryptography", "numpy", "onnxruntime", "openvino", "torch")
_DOMAIN: Final = b"motte-process-measurement-1\x00"


def measure_process() -> bytes:
    """32 bytes over every module of motte, and the versions of Python and of the packages that a worker may load.

    The same files and versions give the same bytes anywhere; any other byte in a module gives others.
    """
    root = Path(__file__).resolve().parents[1]
    modules = {
        path.relative_to(root).as_posix(): sha256(path.read_bytes()).hex() for path in sorted(root.rglob("*.py"))
    }
    return sha256(
        _DOMAIN, canonical({"modules": modules, "packages": package_versions(), "python": list(sys.version_info[:3])})
    )


def package_versions() -> dict[str, str | None]:
    """Package -> version; None: not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found

"""Makes ``import torchvision`` work beside a torch that cannot load torchvision's compiled operations.

torchvision 0.28 from PyPI is linked against the CUDA build of torch. Beside the CPU build its extension does not load,
which torchvision itself tolerates, until it registers shape functions for ``torchvision::nms`` and finds no such
operation. Classification models never call it. So, only where the extension does not load, the two missing names are
declared here, without any implementation: calling one is an error, importing torchvision is none.

Import this module before torchvision, or call :func:`import_torchvision`.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

from motte.errors import UnsupportedError

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_NAMES = ("nms", "qnms")


def _exists(name: str) -> bool:
    return hasattr(torch.ops.torchvision, name)


def _load_extension(package: Path) -> bool:
    """Load torchvision's own extension the way torchvision does; whether that worked."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = package / f"_C{suffix}"
        if not path.is_file():
            continue
        try:
            torch.ops.load_library(str(path))
        except OSError:
            continue
        return True
    return False


def declare_missing() -> torch.library.Library | None:
    """Declare ``torchvision::nms`` and ``qnms`` where nothing else can; None where nothing had to be done.

    The declarations live as long as the returned library: keep it.
    """
    if "torchvision" in sys.modules:
        return None
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _load_extension(Path(spec.origin).parent):
        return None
    missing = [name for name in _NAMES if not _exists(name)]
    if not missing:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        library.define(name + _SCHEMA)
    return library


_LIBRARY = declare_missing()
"""Kept for the life of the process; None where torchvision's compiled operations load, or torchvision is absent."""


def declared() -> bool:
    """Whether the operations are our declarations (True) or torchvision's own, or torchvision is absent (False)."""
    return _LIBRARY is not None


def import_torchvision() -> ModuleType:
    """``torchvision``, imported.

    Raises:
        UnsupportedError: it is not installed, or fails to import beside this torch.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as problem:
        if problem.name != "torchvision":
            raise
        raise UnsupportedError("torchvision is not installed", hint="pip install torchvision") from problem
    except (ImportError, RuntimeError) as problem:
        raise UnsupportedError(
            "torchvision does not import beside this torch",
            got=str(problem).splitlines()[0][:200],
            expected=f"a torchvision built for torch {torch.__version__}",
            hint="install the torchvision release that belongs to this torch",
        ) from problem

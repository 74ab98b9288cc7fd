"""motte splits a PyTorch model between a small trusted process and a large untrusted machine.

    capture -> plan -> split -> seal -> provision -> run (offload)

>>> import motte
>>> with motte.load("model.motte", keys="me.key", signer="owner.pub") as model:   # doctest: +SKIP
...     y = model(x)

>>> model = motte.protect(model, motte.Asymmetric(noise=None), accelerator="unix:/run/a.sock")   # doctest: +SKIP

Everything is loaded when first used: ``import motte`` loads neither torch nor numpy.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if sys.platform != "linux":
    raise ImportError(
        f"motte runs on Linux only: memory locking, process hardening and enclaves need it (here: {sys.platform})"
    )

if TYPE_CHECKING:
    from motte.accelerator.connect import connect
    from motte.accelerator.process import LocalAccelerator
    from motte.capture.export import capture as capture_model
    from motte.errors import MotteError
    from motte.offload.protect import protect
    from motte.offload.settings import (
        Asymmetric,
        Energy,
        Entropy,
        Fixed,
        Gaussian,
        LowRank,
        Mechanism,
        Residual,
        Schedule,
    )
    from motte.run.model import Model, load
    from motte.run.pool import Pool
    from motte.run.settings import LoadSettings
    from motte.seal.package import seal_model

__version__ = "0.1.0"

_PUBLIC = {
    "capture_model": ("motte.capture.export", "capture"),
    "seal_model": ("motte.seal.package", "seal_model"),
    "load": ("motte.run.model", "load"),
    "LoadSettings": ("motte.run.settings", "LoadSettings"),
    "Model": ("motte.run.model", "Model"),
    "Pool": ("motte.run.pool", "Pool"),
    "MotteError": ("motte.errors", "MotteError"),
    "protect": ("motte.offload.protect", "protect"),
    "connect": ("motte.accelerator.connect", "connect"),
    "LocalAccelerator": ("motte.accelerator.process", "LocalAccelerator"),
    **{
        name: ("motte.offload.settings", name)
        for name in (
            "Asymmetric",
            "Energy",
            "Entropy",
            "Fixed",
            "Gaussian",
            "LowRank",
            "Mechanism",
            "Residual",
            "Schedule",
        )
    },
}

__all__ = [
    "Asymmetric",
    "Energy",
    "Entropy",
    "Fixed",
    "Gaussian",
    "LoadSettings",
    "LocalAccelerator",
    "LowRank",
    "Mechanism",
    "Model",
    "MotteError",
    "Pool",
    "Residual",
    "Schedule",
    "__version__",
    "capture_model",
    "connect",
    "load",
    "protect",
    "seal_model",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'motte' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)

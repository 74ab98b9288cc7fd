"""Known models: architectures, weights, preprocessing, labels and the published cuts. Importing this needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from motte.zoo.models import BuiltModel
    from motte.zoo.registry import Entry, build, find, list_models, pull
    from motte.zoo.weights import WeightsChoice

_HOME = {
    "BuiltModel": "motte.zoo.models",
    "Entry": "motte.zoo.registry",
    "WeightsChoice": "motte.zoo.weights",
    "build": "motte.zoo.registry",
    "find": "motte.zoo.registry",
    "list_models": "motte.zoo.registry",
    "pull": "motte.zoo.registry",
}

__all__ = ["BuiltModel", "Entry", "WeightsChoice", "build", "find", "list_models", "pull"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)

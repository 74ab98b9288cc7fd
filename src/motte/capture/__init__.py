"""``nn.Module`` + example inputs -> :class:`~motte.capture.graph.Graph` and weights.

``graph``, ``sizes``, ``signature``, ``ops``, ``checks`` and ``text`` need no torch; the names below load it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from motte.capture.export import Captured, capture
    from motte.capture.files import load_graph, save_graph

__all__ = ["Captured", "capture", "load_graph", "save_graph"]

_HOMES = {"Captured": "export", "capture": "export", "load_graph": "files", "save_graph": "files"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

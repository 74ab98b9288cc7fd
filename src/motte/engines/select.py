"""The engines by name, loaded when asked for: a worker loads the one that it was started with and no other."""

from __future__ import annotations

from motte.engines.interface import Engine
from motte.errors import SettingError

ENGINES = ("torch",)


def make_engine(name: str, *, threads: int) -> Engine:
    """The engine ``name``, with ``threads`` compute threads for this whole process.

    Raises:
        SettingError: no such engine.
    """
    if name != "torch":
        raise SettingError("unknown engine", expected=", ".join(ENGINES), got=repr(name))
    import torch

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    from motte.engines.torch_engine import TorchEngine

    engine: Engine = TorchEngine()
    return engine

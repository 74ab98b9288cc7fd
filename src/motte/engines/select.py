"""The engines by name, loaded when asked for: a worker loads the one that it was started with and no other."""

from __future__ import annotations

from motte.engines.interface import Engine
from motte.errors import SettingError, UnsupportedError

ENGINES = ("torch", "onnxruntime", "openvino")
PRECISIONS = ("f32", "bf16")
"""What an engine computes f32 layers in. Only openvino can do so in bf16."""


def make_engine(name: str, *, threads: int, precision: str = "f32") -> Engine:
    """The engine ``name``, with ``threads`` compute threads (for torch: of this whole process).

    Raises:
        SettingError: no such engine or precision.
        UnsupportedError: the engine, or this processor, does not compute in ``precision``; or it is not installed.
    """
    if name not in ENGINES:
        raise SettingError("unknown engine", expected=", ".join(ENGINES), got=repr(name))
    if precision not in PRECISIONS:
        raise SettingError("unknown precision", expected=", ".join(PRECISIONS), got=repr(precision))
    if precision != "f32" and name != "openvino":
        raise UnsupportedError(f"the {name} engine computes in the types of the graph", got=f"precision {precision}")
    try:
        return _make(name, threads, precision)
    except ModuleNotFoundError as problem:
        if problem.name != name:
            raise
        raise UnsupportedError("this engine is not installed", got=name, hint=f"pip install {name}") from problem


def _make(name: str, threads: int, precision: str) -> Engine:
    if name == "onnxruntime":
        from motte.engines.onnxruntime_engine import OnnxruntimeEngine

        return OnnxruntimeEngine(threads=threads)
    if name == "openvino":
        from motte.engines.openvino_engine import OpenvinoEngine

        return OpenvinoEngine(threads=threads, precision=precision)
    import torch

    torch.set_num_threads(threads)
    # It can be set once in the life of a process, and only before the first work.
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)
    from motte.engines.torch_engine import TorchEngine

    engine: Engine = TorchEngine()
    return engine

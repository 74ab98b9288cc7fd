"""Which line of the user's model is to blame: the innermost frame that is not inside torch."""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path

import torch

_TORCH = str(Path(torch.__file__).resolve().parent) + "/"
_OURS = str(Path(__file__).resolve().parent.parent) + "/"
_STANDARD = sysconfig.get_paths()["stdlib"]
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ')
_LIBRARIES = ("torchvision", "transformers", "timm")


def _is_model_code(path: str) -> bool:
    inside = path.startswith((_TORCH, _OURS, "torch/", "<frozen"))
    standard = path.startswith(_STANDARD) and "site-packages" not in path
    return not inside and not standard


def _innermost(frames: list[tuple[str, int]]) -> tuple[str, int] | None:
    own = [frame for frame in frames if _is_model_code(frame[0])]
    users = [frame for frame in own if not any(f"/{library}/" in frame[0] for library in _LIBRARIES)]
    chosen = users or own
    return chosen[-1] if chosen else None


def user_frame(node: torch.fx.Node) -> tuple[str, int] | None:
    """Path and line of the user's model that made ``node``: of the innermost ``forward``, which is all export keeps.

    A frame of a model library (torchvision, transformers) is taken where the user's own code has none.
    """
    frames = [(path, int(line)) for path, line in _FRAME.findall(node.meta.get("stack_trace") or "")]
    return _innermost(frames)


def of_node(node: torch.fx.Node) -> str | None:
    """The same as ``path:line``, for messages."""
    frame = user_frame(node)
    return f"{frame[0]}:{frame[1]}" if frame else None


def of_exception(problem: BaseException) -> str | None:
    """The line of the user's model that an exception passed through, as ``path:line``.

    Only frames below the call of ``torch.export.export`` count: what stands above called capture.
    """
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(problem.__traceback__)]
    first = next((index for index, (path, _) in enumerate(frames) if path.startswith(_TORCH)), len(frames))
    found = _innermost(frames[first:])
    return f"{found[0]}:{found[1]}" if found else None

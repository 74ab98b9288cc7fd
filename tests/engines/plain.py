"""The slow, obvious interpreter: every node in turn, nothing reused, nothing dropped, the table's claims checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from motte.capture.graph import Arg, DType, Graph, MemoryFormat, Ref, Size, WeightRef
from motte.capture.ops import OPS
from motte.capture.sizes import evaluate, shape_of
from motte.capture.tensors import DTYPES, overload, plain_argument


def storages(value: Any) -> set[int]:
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage().data_ptr()} if value.numel() else set()
    return set().union(*map(storages, value)) if isinstance(value, list | tuple) else set()


def interpret(
    graph: Graph, inputs: list[torch.Tensor], weights: Mapping[str, torch.Tensor], dims: Mapping[str, int]
) -> list[torch.Tensor]:
    """The graph's outputs; asserts each value's type, and that results of fresh operations are fresh."""
    env = dict(zip((value.name for value in graph.inputs), inputs, strict=True))

    def plain(arg: Arg) -> Any:
        match arg:
            case Ref(name):
                return env[name]
            case WeightRef(name):
                return weights[name]
            case Size():
                return evaluate(arg, dims)
            case DType() | MemoryFormat():
                return plain_argument(arg)
            case tuple():
                return [plain(item) for item in arg]
        return arg

    with torch.inference_mode():
        for node in graph.nodes:
            args = [plain(arg) for arg in node.args]
            kwargs = {key: plain(arg) for key, arg in node.kwargs.items()}
            found = overload(node.op)(*args, **kwargs)
            results = found if isinstance(found, list | tuple) else (found,)
            assert len(results) == len(node.outputs), node.name
            if not OPS[node.op].view:
                assert not storages(results) & storages([*args, *kwargs.values()]), node.op
            for value, result in zip(node.outputs, results, strict=True):
                if value is not None:
                    assert result.dtype is DTYPES[value.type.dtype], value.name
                    assert tuple(result.shape) == shape_of(value.type, dims), value.name
                    env[value.name] = result
    return [env[name] for name in graph.outputs]

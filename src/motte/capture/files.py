"""A captured model in a folder: ``graph.json`` and ``weights.safetensors`` (docs/spec/graph.md). Imports torch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from motte.capture import tensors
from motte.capture.export import Captured
from motte.capture.graph import Graph, Weight
from motte.capture.text import digest, dumps, loads
from motte.errors import GraphError, InputError, ResourceError
from motte.limits import MAX_GRAPH_TEXT_BYTES

GRAPH_FILE = "graph.json"
WEIGHTS_FILE = "weights.safetensors"
_DIGEST_KEY = "motte_graph"


def save_graph(folder: Path | str, captured: Captured) -> None:
    """Write both files into ``folder``, which is made if need be; each is replaced whole or not at all.

    Raises:
        GraphError: the weights are not those of the graph.
        ResourceError: the folder cannot be written.
    """
    folder = Path(folder)
    flat = {}
    for name, weight in captured.graph.weights.items():
        if name not in captured.weights:
            raise GraphError("a weight is missing", got=name)
        check_weight(weight, captured.weights[name])
        stored = tensors.flatten(captured.weights[name], weight.order)
        # Its own memory: safetensors refuses tensors that share one.
        flat[name] = stored.view([weight.shape[dim] for dim in weight.order]).clone()
    text = dumps(captured.graph).encode("ascii")
    marks = {_DIGEST_KEY: digest(captured.graph)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / WEIGHTS_FILE, lambda path: save_file(flat, path, metadata=marks))
        _write(folder / GRAPH_FILE, lambda path: _write_bytes(path, text))
    except OSError as problem:
        raise ResourceError("cannot write the graph", where=str(folder), got=str(problem)) from problem


def load_graph(folder: Path | str) -> Captured:
    """Read **unverified** files.

    Raises:
        InputError: a file is not there.
        GraphError: the files break docs/spec/graph.md, or do not belong together.
    """
    folder = Path(folder)
    for name in (GRAPH_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise InputError("not a saved graph", where=str(folder), expected=name)
    with open(folder / GRAPH_FILE, "rb") as file:
        graph = loads(file.read(MAX_GRAPH_TEXT_BYTES + 1))
    return Captured(graph, _read_weights(folder / WEIGHTS_FILE, graph))


def check_weight(weight: Weight, tensor: torch.Tensor) -> None:
    """Check that ``tensor`` is what the graph says of ``weight``, strides included.

    Raises:
        GraphError: another element type, shape or order in memory.
    """
    found = (tensors.DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
    if found != (weight.dtype, weight.shape):
        raise GraphError(
            "a weight has another type than the graph says",
            where=weight.name,
            expected=f"{weight.dtype} {weight.shape}",
            got=f"{found[0]} {found[1]}",
        )
    if not tensor.permute(weight.order).is_contiguous():
        raise GraphError("a weight lies in memory in another order", where=weight.name, expected=str(weight.order))


def _read_weights(path: Path, graph: Graph) -> Mapping[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            if (file.metadata() or {}).get(_DIGEST_KEY) != digest(graph):
                raise GraphError("the weights belong to another graph", where=str(path), expected=digest(graph))
            names = set(file.keys())
            if names != set(graph.weights):
                differing = sorted(names ^ set(graph.weights))
                raise GraphError("the weights are not those of the graph", where=str(path), got=differing[0])
            for name, weight in graph.weights.items():
                found[name] = _as_weight(file.get_tensor(name), weight)
    except SafetensorError as problem:
        raise GraphError("not a safetensors file", where=str(path), got=str(problem)[:200]) from problem
    return found


def _as_weight(stored: torch.Tensor, weight: Weight) -> torch.Tensor:
    shape = tuple(weight.shape[dim] for dim in weight.order)
    if tuple(stored.shape) != shape or stored.dtype != tensors.DTYPES[weight.dtype]:
        raise GraphError(
            "a weight has another type than the graph says",
            where=weight.name,
            expected=f"{weight.dtype} {shape}",
            got=f"{stored.dtype} {tuple(stored.shape)}",
        )
    if weight.dtype == "bool" and bool((stored.view(torch.uint8) > 1).any()):
        raise GraphError("neither true nor false", where=weight.name)
    return tensors.restore(stored.reshape(-1), weight)


def _write_bytes(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def _write(path: Path, write: Callable[[str], None]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in place; nothing remains after an error."""
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(partial)
        handle = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise

"""A captured model in a folder: exact, atomic, and nothing in it believed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from motte.capture import capture, load_graph, save_graph
from motte.capture.export import Captured
from motte.capture.files import GRAPH_FILE, WEIGHTS_FILE
from motte.capture.text import digest, dumps
from motte.errors import GraphError, InputError, ResourceError


class Small(nn.Module):
    """Weights of several types and orders."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("keep", torch.tensor([True, False, True, True]))
        self.table = nn.Parameter(torch.randn(3, 4).to(torch.bfloat16).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).mean((2, 3)) * self.scale
        return torch.where(self.keep, y, 0.0) @ self.table.float()


@pytest.fixture(scope="module")
def captured() -> Captured:
    return capture(Small().eval(), (torch.randn(2, 3, 4, 4),), name="small", dims={"x": {0: "batch"}})


def test_round_trip(captured: Captured, tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    save_graph(folder, captured)
    found = load_graph(folder)
    assert found.graph == captured.graph
    assert list(found.weights) == list(captured.weights)
    for name, weight in captured.weights.items():
        assert torch.equal(found.weights[name], weight)
        assert found.weights[name].dtype == weight.dtype
        assert found.weights[name].stride() == weight.stride()
    assert sorted(path.name for path in folder.iterdir()) == [GRAPH_FILE, WEIGHTS_FILE]


def test_saving_again_replaces(captured: Captured, tmp_path: Path) -> None:
    save_graph(tmp_path, captured)
    other = replace(captured, graph=replace(captured.graph, name="other"))
    save_graph(tmp_path, other)
    assert load_graph(tmp_path).graph.name == "other"


def test_nothing_half_written_remains(captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_graph(tmp_path, captured)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_graph(tmp_path, replace(captured, graph=replace(captured.graph, name="other")))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written(captured: Captured, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError):
        save_graph(tmp_path / "file", captured)


def test_weights_that_are_not_the_graph_s_are_not_saved(captured: Captured, tmp_path: Path) -> None:
    weights = dict(captured.weights)
    for change in ({"scale": torch.zeros(2)}, {"scale": torch.tensor(2)}, {"conv.weight": torch.randn(4, 3, 2, 2)}):
        with pytest.raises(GraphError):
            save_graph(tmp_path / "x", Captured(captured.graph, {**weights, **change}))
    del weights["scale"]
    with pytest.raises(GraphError, match="missing"):
        save_graph(tmp_path / "x", Captured(captured.graph, weights))
    assert not (tmp_path / "x").exists()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / WEIGHTS_FILE)
    return found


def test_weights_lie_in_the_file_in_memory_order(captured: Captured, tmp_path: Path) -> None:
    save_graph(tmp_path, captured)
    assert captured.graph.weights["conv.weight"].order == (0, 2, 3, 1)
    assert tuple(stored(tmp_path)["conv.weight"].shape) == (4, 2, 2, 3)


@pytest.mark.parametrize("missing", [GRAPH_FILE, WEIGHTS_FILE])
def test_a_missing_file(captured: Captured, tmp_path: Path, missing: str) -> None:
    save_graph(tmp_path, captured)
    (tmp_path / missing).unlink()
    with pytest.raises(InputError) as caught:
        load_graph(tmp_path)
    assert caught.value.expected == missing


def resave(folder: Path, graph_digest: str, change: Any) -> None:
    tensors = stored(folder)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"motte_graph": graph_digest})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("scale"), "not those of the graph"),
        (lambda t: t.update(more=torch.zeros(1)), "not those of the graph"),
        (lambda t: t.update(scale=torch.zeros(1)), "another type"),
        (lambda t: t.update(scale=torch.tensor(1.0, dtype=torch.float64)), "another type"),
        (lambda t: t.update({"conv.weight": torch.zeros(4, 3, 2, 2)}), "another type"),
        (lambda t: t.update(keep=torch.tensor([1, 2, 0, 1], dtype=torch.uint8)), "another type"),
    ],
)
def test_other_weights_are_refused(captured: Captured, tmp_path: Path, change: Any, message: str) -> None:
    save_graph(tmp_path, captured)
    resave(tmp_path, digest(captured.graph), change)
    with pytest.raises(GraphError, match=message):
        load_graph(tmp_path)


def test_weights_of_another_graph_are_refused(captured: Captured, tmp_path: Path) -> None:
    save_graph(tmp_path, captured)
    (tmp_path / GRAPH_FILE).write_text(dumps(replace(captured.graph, name="other")))
    with pytest.raises(GraphError, match="another graph"):
        load_graph(tmp_path)
    save_graph(tmp_path, captured)
    save_file(stored(tmp_path), tmp_path / WEIGHTS_FILE)
    with pytest.raises(GraphError, match="another graph"):
        load_graph(tmp_path)


def test_truth_values_that_are_neither_are_refused(captured: Captured, tmp_path: Path) -> None:
    save_graph(tmp_path, captured)
    path = tmp_path / WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[data.rindex(b"\x01\x00\x01\x01")] = 2
    path.write_bytes(data)
    with pytest.raises(GraphError, match="neither true nor false"):
        load_graph(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 16, b"PK\x03\x04"])
def test_files_that_are_something_else(captured: Captured, tmp_path: Path, content: bytes) -> None:
    save_graph(tmp_path, captured)
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(GraphError, match="not a safetensors file"):
        load_graph(tmp_path)
    save_graph(tmp_path, captured)
    (tmp_path / GRAPH_FILE).write_bytes(content)
    with pytest.raises(GraphError):
        load_graph(tmp_path)


def test_a_truncated_file(captured: Captured, tmp_path: Path) -> None:
    save_graph(tmp_path, captured)
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(GraphError, match="not a safetensors file"):
        load_graph(tmp_path)

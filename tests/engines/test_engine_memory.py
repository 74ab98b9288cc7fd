"""What an engine takes beside the weights that it is given, and what it leaves behind, each in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from motte.capture.graph import Dim, Graph, Ref, Size, TensorType, Value, Weight, WeightRef

SCRIPT = Path(__file__).with_name("fresh_engine.py")
BATCH = Size("batch")


def fresh(mode: str, engine: str, folder: Path) -> dict[str, Any]:
    places = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ORT_", "XDG_"))}
    environment |= {name: str(folder) for name in places} | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), mode, engine, str(folder)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lowered programs as fresh_engine.py reads them: a product, a table, and one whose activations are 8 MiB."""
    place = tmp_path_factory.mktemp("fresh")
    kinds: dict[str, tuple[Any, ...]] = {
        "gemm": ((2048, 2048), TensorType("f32", (BATCH, 2048)), (BATCH, 2048), [tiny.op("MatMul", ["x", "w"], "y")]),
        "gather": ((65536, 64), TensorType("i64", (BATCH,)), (BATCH, 64), [tiny.op("Gather", ["w", "x"], "y")]),
        "wide": (
            (4,),
            TensorType("f32", (BATCH,)),
            (BATCH, 4),
            [
                tiny.op("Unsqueeze", ["x", "one"], "0"),
                tiny.op("Mul", ["0", "w"], "1"),
                tiny.op("Exp", ["1"], "2"),
                tiny.op("Transpose", ["2"], "3", perm=[1, 0]),
                tiny.op("Sin", ["3"], "4"),
                tiny.op("Transpose", ["4"], "y", perm=[1, 0]),
            ],
        ),
    }
    for kind, (shape, x, y, nodes) in kinds.items():
        graph: Graph = tiny.one_node(
            "aten.some.op", (Ref("x"), WeightRef("w")), TensorType("f32", y), inputs=(Value("x", x),),
            weights=(Weight("w", "f32", shape, tuple(range(len(shape)))),), dims=(Dim("batch", 1, 1 << 30),),
        )  # fmt: skip
        program = tiny.lowered(graph, nodes, [tiny.number("one", [1])] if kind == "wide" else [])
        for name in ("core", "weight_inputs", "weight_initializers"):
            (place / f"{kind}.{name}").write_bytes(getattr(program, name))
    return place


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_nothing_but_the_engine_appears(engine: str, folder: Path) -> None:
    seen = fresh("watch", engine, folder)
    # OpenVINO has worker threads of its own; onnxruntime with one thread has none, and its telemetry would be one.
    assert seen.pop("threads") == 0 or engine == "openvino"
    packages = set(seen.pop("packages"))
    assert packages - set(sys.stdlib_module_names) <= {engine, "numpy", "motte"}
    assert set(seen.pop("stages")) <= {"errors", "limits", "strict_json", "measure", "capture", "engines"}
    assert seen == {"open files": [], "children": [], "files": [], "calls": []}


def test_what_is_planted_is_seen(folder: Path) -> None:
    seen = fresh("watch", "plant", folder)
    assert seen["threads"] == 1
    assert any(name.startswith("socket:") for name in seen["open files"])
    assert len(seen["children"]) == 1
    assert seen["files"] == ["planted"]
    assert {"socket.__new__", "subprocess.Popen"} <= set(seen["calls"])


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_what_an_engine_takes(engine: str, folder: Path) -> None:
    found = fresh("memory", engine, folder)
    # A table is read where it lies; a matrix product reads a packed copy, and that is all that is made.
    assert found["gather in place"] is True
    assert found["gather first"] < 4
    assert found["gemm in place"] is False
    assert 14 < found["gemm first"] < 22
    # With weights as inputs: nothing grows, and what stays of 16 MiB of weights behind a run is at most what a kernel
    # packs at a time.
    assert found["held"] < 8
    assert found["growth"] < 1
    assert found["left"] < 1
    assert found["planted"] > 15
    if engine == "onnxruntime":
        # A session that is dropped gives its packed weights back, and is measured alike when made anew.
        assert 14 < found["gemm again"] < 22
        # Six parts whose activations take 16 MiB each share one allocator's memory.
        assert found["chain"] < 40

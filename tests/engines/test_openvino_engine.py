"""The openvino engine: the precision that is asked for is the one that runs, and integers are not cut in silence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from motte.capture.graph import Dim, Ref, Size, TensorType, Value, Weight, WeightRef
from motte.engines import openvino_engine
from motte.engines.openvino_engine import OpenvinoEngine
from motte.errors import GraphError, InputError, UnsupportedError

BATCH = Size("batch")


def product(tiny: Any) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """A matrix product: graph, lowered form, weights."""
    graph = tiny.one_node(
        "aten.matmul.default",
        (Ref("x"), WeightRef("w")),
        TensorType("f32", (BATCH, 32)),
        inputs=(Value("x", TensorType("f32", (BATCH, 32))),),
        weights=(Weight("w", "f32", (32, 32), (0, 1)),),
        dims=(Dim("batch", 1, 8),),
    )
    weight = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    return graph, tiny.lowered(graph, [tiny.op("MatMul", ["x", "w"], "y")]), {"w": weight}


def integers(tiny: Any) -> tuple[Any, Any]:
    graph = tiny.one_node(
        "aten.add.Tensor",
        (Ref("x"), WeightRef("w")),
        TensorType("i64", (BATCH,)),
        inputs=(Value("x", TensorType("i64", (BATCH,))),),
        weights=(Weight("w", "i64", (1,), (0,)),),
        dims=(Dim("batch", 0, 8),),
    )
    return graph, tiny.lowered(graph, [tiny.op("Add", ["x", "w"], "y")])


def test_the_precision_that_is_asked_for_is_the_one_that_runs(tiny: Any) -> None:
    graph, lowered, held = product(tiny)
    x = np.random.default_rng(1).standard_normal((4, 32)).astype(np.float32)
    exact = x.astype(np.float64) @ held["w"]
    worst = {}
    for precision in ("f32", "bf16"):
        engine = OpenvinoEngine(precision=precision)
        assert engine.precision == precision
        program, bound = engine.compile(graph, lowered=lowered), engine.load(graph, held, lowered=lowered)
        assert precision in program.precisions
        assert precision in bound.precisions
        (streamed,), (resident,) = program.run([x], held, {"batch": 4}), bound.run([x], {"batch": 4})
        assert streamed.dtype == resident.dtype == np.float32
        worst[precision] = [float(np.abs(found - exact).max() / np.abs(exact).max()) for found in (streamed, resident)]
    assert max(worst["f32"]) < 1e-6
    # bfloat16 has 8 bits: had it run in f32 after all, it would be as exact as that.
    assert 1e-4 < min(worst["bf16"]) <= max(worst["bf16"]) < 2e-2


def test_another_precision_than_asked_for_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, lowered, held = product(tiny)
    monkeypatch.setattr(openvino_engine, "_precisions", lambda compiled: ("bf16", "f32"))
    engine = OpenvinoEngine(precision="f32")
    for refused in (
        lambda: engine.compile(graph, lowered=lowered),
        lambda: engine.load(graph, held, lowered=lowered),
    ):
        with pytest.raises(UnsupportedError, match="another precision"):
            refused()
    monkeypatch.setattr(openvino_engine, "_precisions", lambda compiled: ("f32",))
    with pytest.raises(UnsupportedError, match="does not compute in bf16"):
        OpenvinoEngine(precision="bf16")


def test_integers_beyond_32_bits_are_refused(tiny: Any) -> None:
    graph, lowered = integers(tiny)
    engine = OpenvinoEngine()
    program = engine.compile(graph, lowered=lowered)
    one, large = np.array([1]), np.array([1 << 31])
    (found,) = program.run([np.array([(1 << 31) - 2, -(1 << 31)])], {"w": one}, {"batch": 2})
    assert found.tolist() == [(1 << 31) - 1, 1 - (1 << 31)]
    for x, w in ((large, one), (one, large), (-large - 1, one)):
        with pytest.raises(InputError, match="cannot compute with"):
            program.run([x], {"w": w}, {"batch": 1})
    with pytest.raises(InputError, match="cannot compute with"):
        engine.load(graph, {"w": large}, lowered=lowered)


def test_what_openvino_refuses_is_said_in_one_line(tiny: Any, capfd: pytest.CaptureFixture[str]) -> None:
    graph, lowered, held = product(tiny)
    program = OpenvinoEngine().compile(graph, lowered=lowered)
    with pytest.raises(GraphError, match="an operation failed") as caught:
        program.run([np.zeros((4, 32), np.float32)], {"w": np.zeros((32, 31), np.float32)}, {"batch": 4})
    assert "\n" not in str(caught.value)
    assert not str(caught.value.got).startswith("Exception from")
    assert capfd.readouterr() == ("", "")
    (found,) = program.run([np.zeros((3, 32), np.float32)], held, {"batch": 3})
    assert not found.any()


def test_an_index_beyond_a_table_reads_nothing(tiny: Any) -> None:
    # torch and onnxruntime refuse it; openvino answers with zeros.
    graph = tiny.one_node(
        "aten.embedding.default",
        (WeightRef("w"), Ref("x")),
        TensorType("f32", (BATCH, 2)),
        inputs=(Value("x", TensorType("i64", (BATCH,))),),
        weights=(Weight("w", "f32", (4, 2), (0, 1)),),
        dims=(Dim("batch", 1, 8),),
    )
    bound = OpenvinoEngine().load(
        graph, {"w": np.ones((4, 2), np.float32)}, lowered=tiny.lowered(graph, [tiny.op("Gather", ["w", "x"], "y")])
    )
    (found,) = bound.run([np.array([3, 4, 1 << 30, -5])], {"batch": 4})
    assert found.tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]


def test_memory_that_is_marked_read_only_is_shared_too() -> None:
    array = np.frombuffer(bytes(64), np.float32)
    tensor = openvino_engine._tensor(array)
    assert tensor.data.ctypes.data == array.ctypes.data
    halves = np.frombuffer(bytes(64), np.uint16)
    assert openvino_engine._tensor(halves).data.ctypes.data == halves.ctypes.data


def test_what_it_was_asked_for_is_what_is_set(tiny: Any) -> None:
    graph, lowered, _ = product(tiny)
    compiled = OpenvinoEngine(threads=2).compile(graph, lowered=lowered)._compiled._compiled
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 2
    assert compiled.get_property("NUM_STREAMS") == 1
    assert compiled.get_property("ENABLE_CPU_PINNING") is False
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"

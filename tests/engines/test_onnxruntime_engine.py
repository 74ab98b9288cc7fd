"""The onnxruntime engine: its own failures as ours, quietly; initializers that nobody reads; weights in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from motte.capture import capture
from motte.capture.graph import Dim, Ref, Size, TensorType, Value, Weight, WeightRef
from motte.engines.checks import used_weights
from motte.engines.interface import Engine
from motte.engines.onnxruntime_engine import OnnxruntimeEngine
from motte.engines.select import ENGINES, make_engine
from motte.errors import GraphError, ResourceError
from motte.lower.lower import lower
from motte.lower.lowered import Lowered
from motte.plan.planner import plan_parts
from motte.split.chain import run_parts
from motte.split.split import split

BATCH = Size("batch")
TABLE = Weight("w", "f32", (4, 2), (0, 1))


def table(tiny: Any, *weights: Weight) -> Any:
    """Rows of a table, by number."""
    return tiny.one_node(
        "aten.embedding.default",
        [*(WeightRef(weight.name) for weight in weights), Ref("x")],
        TensorType("f32", (BATCH, 2)),
        inputs=(Value("x", TensorType("i64", (BATCH,))),),
        weights=weights,
        dims=(Dim("batch", 1, 1 << 40),),
    )


def test_an_operation_that_fails_says_so_in_one_line(tiny: Any, capfd: pytest.CaptureFixture[str]) -> None:
    graph = table(tiny, TABLE)
    program = OnnxruntimeEngine().compile(graph, lowered=tiny.lowered(graph, [tiny.op("Gather", ["w", "x"], "y")]))
    with pytest.raises(GraphError, match="an operation failed") as caught:
        program.run([np.array([4])], {"w": np.zeros((4, 2), np.float32)}, {"batch": 1})
    assert "out of data bounds" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(GraphError, match="an operation failed"):
        program.run([np.array([1])], {"w": np.zeros((4, 3), np.float32)}, {"batch": 1})
    # Nobody else hears of it.
    assert capfd.readouterr() == ("", "")


def test_too_much_memory_is_an_error_of_its_own(tiny: Any, capfd: pytest.CaptureFixture[str]) -> None:
    graph = tiny.one_node(
        "aten.expand.default",
        (WeightRef("w"),),
        TensorType("f32", (BATCH, 4, 2)),
        inputs=(),
        weights=(TABLE,),
        dims=(Dim("batch", 1, 1 << 40),),
    )
    nodes = [
        tiny.op("Unsqueeze", ["dim:batch", "zero"], "0"),
        tiny.op("Concat", ["0", "wide"], "1", axis=0),
        tiny.op("Expand", ["w", "1"], "y"),
    ]
    constants = [tiny.number("zero", [0]), tiny.number("wide", [4, 2])]
    lowered = tiny.lowered(graph, nodes, constants, ["batch"])
    program = OnnxruntimeEngine().compile(graph, lowered=lowered)
    held = {"w": np.zeros((4, 2), np.float32)}
    with pytest.raises(ResourceError, match="out of memory") as caught:
        program.run([], held, {"batch": 1 << 40})
    assert "\n" not in str(caught.value)
    (found,) = program.run([], held, {"batch": 3})
    assert found.shape == (3, 4, 2)
    assert capfd.readouterr() == ("", "")


def test_a_weight_that_the_lowered_graph_does_not_read(tiny: Any) -> None:
    # onnxruntime drops such an initializer, and then knows no weight of that name. Names of more than 127 bytes have
    # a length of two bytes in the message.
    long = replace(TABLE, name="long" * 50)
    graph = table(tiny, TABLE, long)
    held = {name: np.arange(8, dtype=np.float32).reshape(4, 2) for name in ("w", long.name)}
    for read in ("w", long.name):
        lowered = tiny.lowered(graph, [tiny.op("Gather", [read, "x"], "y")])
        bound = OnnxruntimeEngine().load(graph, held, lowered=lowered)
        (found,) = bound.run([np.array([3])], {"batch": 1})
        assert found.tolist() == [[6, 7]]


def test_a_bound_program_reads_the_weights_where_they_lie(tiny: Any) -> None:
    weight = replace(TABLE, shape=(64, 2))
    graph = table(tiny, weight)
    buffer = bytearray(weight.bytes)
    engine = OnnxruntimeEngine()
    held = {"w": engine.weight(graph, "w", memoryview(buffer))}
    bound = engine.load(graph, held, lowered=tiny.lowered(graph, [tiny.op("Gather", ["w", "x"], "y")]))
    buffer[-4:] = np.float32(3).tobytes()
    (found,) = bound.run([np.array([63])], {"batch": 1})
    assert found.tolist() == [[0, 3]]


class Net(torch.nn.Module):
    """Convolutions with a shortcut, a pool, a layer whose result depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.second = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.last = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.first(x)))
        y = torch.relu(self.second(y) + y).mean((2, 3))
        return self.last(y) * x.shape[0]


@pytest.mark.slow
def test_a_captured_model_gives_the_same_on_every_engine_joined_and_in_parts() -> None:
    torch.manual_seed(0)
    captured = capture(Net().eval(), (torch.randn(2, 3, 12, 12),), dims={"x": {0: "batch"}}, name="net")
    graph, plan = captured.graph, plan_parts(captured.graph, parts=3, objective="weights", dims={"batch": 2})
    lowered, parts = lower(graph, plan), split(graph, plan)
    assert isinstance(lowered, Lowered)
    x = torch.randn(3, 3, 12, 12)
    reference = make_engine("torch", threads=1)
    (expected,) = reference.load(graph, captured.weights).run([x], {"batch": 3})
    for name in ENGINES[1:]:
        engine = make_engine(name, threads=1)
        held = _held(engine, captured)

        @contextmanager
        def part(index: int, held: dict[str, Any] = held) -> Iterator[dict[str, Any]]:
            yield {name: held[name] for name in used_weights(parts[index].graph)}

        programs = [engine.compile(each.graph, lowered=form) for each, form in zip(parts, lowered.parts, strict=True)]
        given = engine.from_bytes(*reference.to_bytes(x))
        (chained,) = run_parts(list(parts), programs, graph, [given], part, {"batch": 3})
        (joined,) = engine.load(graph, held, lowered=lowered.joined).run([given], {"batch": 3})
        for found in (chained, joined):
            assert float(np.abs(found - expected.numpy()).max()) <= 1e-5 * float(expected.abs().max())


def _held(engine: Engine, captured: Any) -> dict[str, Any]:
    found = {}
    for name in used_weights(captured.graph):
        order = captured.graph.weights[name].order
        stored = captured.weights[name].detach().permute(order).contiguous()
        data = memoryview(bytearray(stored.view(torch.uint8).numpy().tobytes()))
        found[name] = engine.weight(captured.graph, name, data)
    return found

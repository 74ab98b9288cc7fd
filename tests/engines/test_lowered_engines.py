"""What both engines without torch do alike: answer and refuse as the torch engine, keep nothing, share memory."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from motte.capture import tensors
from motte.capture.graph import Arg, Dim, Graph, Node, Ref, Size, TensorType, Value, Weight, WeightRef
from motte.engines.interface import Bound, Engine, OnnxProgram, Program
from motte.engines.select import ENGINES, make_engine
from motte.errors import GraphError, InputError, SettingError, UnsupportedError

NAMES = ("onnxruntime", "openvino")
BATCH = Size("batch")
ROWS = TensorType("f32", (BATCH, 4))
VIEWED = TensorType("f32", (Size("2*batch"), 4))


@pytest.fixture(params=NAMES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return make_engine(request.param, threads=1)


def node(name: str, op: str, *args: Arg, type_: TensorType = ROWS, **kwargs: Arg) -> Node:
    return Node(name, f"aten.{op}", args, kwargs, (Value(name, type_),))


def small() -> Graph:
    """A linear layer whose weight is stored transposed, a join, a reshape and a factor that depend on the batch."""
    return Graph(
        name="small",
        dims=(Dim("batch", 1, 8),),
        inputs=(Value("x", ROWS), Value("unread", TensorType("i64", (BATCH,)))),
        weights={"w": Weight("w", "f32", (4, 4), (1, 0)), "b": Weight("b", "f32", (4,), (0,))},
        nodes=(
            node("fc", "linear.default", Ref("x"), WeightRef("w"), bias=WeightRef("b")),
            node("relu", "relu.default", Ref("fc")),
            node("cat", "cat.default", (Ref("relu"), Ref("x")), 1, type_=TensorType("f32", (BATCH, 8))),
            node("view", "view.default", Ref("cat"), (Size("2*batch"), 4), type_=VIEWED),
            node("scaled", "mul.Tensor", Ref("view"), BATCH, type_=VIEWED),
        ),
        outputs=("scaled", "relu"),
        output_names=("scaled", "relu"),
    )


def small_lowered(tiny: Any) -> OnnxProgram:
    nodes = [
        tiny.op("MatMul", ["x", "w"], "0"),
        tiny.op("Add", ["0", "b"], "1"),
        tiny.op("Relu", ["1"], "relu"),
        tiny.op("Concat", ["relu", "x"], "2", axis=1),
        tiny.op("Reshape", ["2", "rows"], "3"),
        tiny.op("Cast", ["dim:batch"], "4", to=1),
        tiny.op("Mul", ["3", "4"], "scaled"),
    ]
    lowered: OnnxProgram = tiny.lowered(small(), nodes, [tiny.number("rows", np.array([-1, 4]))], ["batch"])
    return lowered


def weights(engine: Engine) -> dict[str, Any]:
    """Row-major bytes in memory order, as an arena holds them."""
    found = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    graph = small()
    return {
        "w": engine.weight(graph, "w", memoryview(bytearray(found[:4].tobytes()))),
        "b": engine.weight(graph, "b", memoryview(bytearray(found[4].tobytes()))),
    }


def inputs(engine: Engine, batch: int) -> list[Any]:
    x = np.random.default_rng(batch).standard_normal((batch, 4)).astype(np.float32)
    return [
        engine.from_bytes("f32", (batch, 4), memoryview(x.tobytes())),
        engine.from_bytes("i64", (batch,), memoryview(bytes(8 * batch))),
    ]


def as_torch(batch: int) -> list[np.ndarray]:
    """The outputs of the torch engine, resident."""
    engine = make_engine("torch", threads=1)
    bound = engine.load(small(), weights(engine))
    assert bound.copy_bytes == 0
    return [np.asarray(value) for value in bound.run(inputs(engine, batch), {"batch": batch})]


def close(found: list[Any], expected: list[np.ndarray]) -> bool:
    return all(
        a.shape == b.shape and a.dtype == b.dtype and np.allclose(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(found, expected, strict=True)
    )


def test_the_engines_and_what_they_say_of_themselves() -> None:
    assert list(ENGINES) == ["torch", *NAMES]
    made = [make_engine(name, threads=1) for name in ENGINES]
    assert [each.name for each in made] == list(ENGINES)
    assert [(each.joins, each.needs_lowered) for each in made] == [(False, False), (True, True), (True, True)]


def test_both_ways_answer_as_torch_at_every_size(engine: Engine, tiny: Any) -> None:
    lowered, held = small_lowered(tiny), weights(engine)
    program: Program = engine.compile(small(), lowered=lowered)
    bound: Bound = engine.load(small(), held, lowered=lowered)
    assert bound.copy_bytes is not None
    before = {name: array.copy() for name, array in held.items()}
    kept: list[tuple[int, list[Any]]] = []
    for batch in (3, 1, 8, 3, *range(1, 9), *range(8, 0, -1)):
        given, again = inputs(engine, batch), inputs(engine, batch)
        kept += [(batch, program.run(given, held, {"batch": batch})), (batch, bound.run(again, {"batch": batch}))]
        assert given == again == []
    expected = {batch: as_torch(batch) for batch in range(1, 9)}
    # Compared at the end: no result is written over by a later run.
    assert all(close(found, expected[batch]) for batch, found in kept)
    assert all(np.array_equal(held[name], array) for name, array in before.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, w, d: i.pop(), "number of inputs"),
        (lambda i, w, d: i.append(i[0]), "number of inputs"),
        (lambda i, w, d: i.__setitem__(0, i[0].astype(np.float64)), "another type"),
        (lambda i, w, d: i.__setitem__(0, np.zeros((2, 5), np.float32)), "another type"),
        (lambda i, w, d: i.__setitem__(0, torch.zeros(2, 4)), "another type"),
        (lambda i, w, d: w.pop("b"), "weight is missing"),
        (lambda i, w, d: d.clear(), "no size"),
        (lambda i, w, d: d.update(batch=9), "out of range"),
        (lambda i, w, d: d.update(batch=0), "out of range"),
    ],
)
def test_refusals_are_those_of_torch(engine: Engine, tiny: Any, change: Callable[..., Any], message: str) -> None:
    program = engine.compile(small(), lowered=small_lowered(tiny))
    given, held, dims = inputs(engine, 2), weights(engine), {"batch": 2}
    change(given, held, dims)
    with pytest.raises(InputError, match=message):
        program.run(given, held, dims)


def test_load_wants_every_weight(engine: Engine, tiny: Any) -> None:
    held = weights(engine)
    del held["w"]
    with pytest.raises(InputError, match="weight is missing"):
        engine.load(small(), held, lowered=small_lowered(tiny))
    with pytest.raises(InputError, match="weight is missing"):
        make_engine("torch", threads=1).load(small(), {})


def test_what_cannot_be_compiled(engine: Engine, tiny: Any) -> None:
    graph, lowered, held = small(), small_lowered(tiny), weights(engine)
    for refused in (lambda: engine.compile(graph), lambda: engine.load(graph, held)):
        with pytest.raises(UnsupportedError, match="needs the lowered form"):
            refused()
    with pytest.raises(UnsupportedError, match="runs every node itself"):
        engine.compile(graph, lowered=lowered, runners={"fc": lambda x: x})
    with pytest.raises(GraphError, match="other dimensions"):
        engine.compile(graph, lowered=replace(lowered, dims=("time",)))
    with pytest.raises(GraphError, match="refuses the lowered graph") as caught:
        engine.compile(graph, lowered=replace(lowered, core=b"no message"))
    assert "\n" not in str(caught.value)
    other = replace(graph, inputs=(Value("z", ROWS), graph.inputs[1]))
    with pytest.raises(GraphError, match="takes 'x', and the graph does not"):
        engine.compile(other, lowered=lowered)
    lying = replace(graph.nodes[1], outputs=(Value("relu", TensorType("f64", (BATCH, 4))),))
    for bad in (replace(graph, outputs=("scaled",), output_names=("o",)), replace(graph, outputs=("scaled", "unread"))):
        with pytest.raises(GraphError, match="other outputs"):
            engine.compile(bad, lowered=lowered)
    with pytest.raises((GraphError, UnsupportedError)):
        engine.compile(replace(graph, nodes=(graph.nodes[0], lying, *graph.nodes[2:])), lowered=lowered)
    with pytest.raises(GraphError, match="refuses"):
        engine.load(graph, {**held, "b": np.zeros(5, np.float32)}, lowered=lowered)
    # A weight that the lowered graph reads and the graph does not: it is not looked for anywhere.
    del held["b"]
    unbiased = replace(graph, nodes=(node("fc", "linear.default", Ref("x"), WeightRef("w")), *graph.nodes[1:]))
    with pytest.raises(GraphError, match=r"still takes weights|refuses"):
        engine.load(unbiased, held, lowered=lowered)


def test_an_output_of_another_shape_than_promised(engine: Engine, tiny: Any) -> None:
    graph = small()
    wrong = TensorType("f32", (BATCH, 8))
    graph = replace(graph, nodes=(*graph.nodes[:-1], replace(graph.nodes[-1], outputs=(Value("scaled", wrong),))))
    program = engine.compile(graph, lowered=small_lowered(tiny))
    with pytest.raises(GraphError, match="another type than the graph says"):
        program.run(inputs(engine, 3), weights(engine), {"batch": 3})


def test_nothing_is_kept_after_a_run(engine: Engine, tiny: Any) -> None:
    program = engine.compile(small(), lowered=small_lowered(tiny))
    held, given = weights(engine), inputs(engine, 2)
    outputs = program.run(list(given), held, {"batch": 2})
    watched = [weakref.ref(array) for array in (*held.values(), *given, *outputs)]
    del held, given, outputs
    assert [watch() for watch in watched] == [None] * 6


def test_a_bound_program_keeps_its_weights_alive(engine: Engine, tiny: Any) -> None:
    bound = engine.load(small(), weights(engine), lowered=small_lowered(tiny))
    for _ in range(20):
        bytearray(64)
    assert close(bound.run(inputs(engine, 2), {"batch": 2}), as_torch(2))


def test_weights_are_read_anew_in_every_call(engine: Engine, tiny: Any) -> None:
    program = engine.compile(small(), lowered=small_lowered(tiny))
    held = weights(engine)
    first = program.run(inputs(engine, 2), held, {"batch": 2})[1].copy()
    held["w"] *= 2
    held["b"] *= 2
    assert np.allclose(program.run(inputs(engine, 2), held, {"batch": 2})[1], 2 * first, rtol=1e-5)


def test_several_threads_share_a_program(engine: Engine, tiny: Any) -> None:
    program = engine.compile(small(), lowered=small_lowered(tiny))
    held, wrong = weights(engine), []

    def work(batch: int, expected: list[np.ndarray]) -> None:
        found = [program.run(inputs(engine, batch), held, {"batch": batch}) for _ in range(15)]
        wrong.extend(batch for outputs in found if not close(outputs, expected))

    threads = [threading.Thread(target=work, args=(batch, as_torch(batch))) for batch in (1, 2, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_output_that_is_an_input_lives_on_its_own(engine: Engine, tiny: Any) -> None:
    type_ = TensorType("f32", (BATCH,))
    graph = Graph("same", (Dim("batch", 1, 1 << 20),), (Value("x", type_),), {}, (), ("x",), ("o",))
    program = engine.compile(graph, lowered=tiny.lowered(graph, []))
    given = np.arange(1 << 18, dtype=np.float32)
    (found,) = program.run([given], {}, {"batch": 1 << 18})
    assert not np.shares_memory(found, given)
    del given
    assert np.array_equal(np.full(1 << 18, 7, np.float32) * 0 + found, np.arange(1 << 18, dtype=np.float32))


def test_a_part_that_gives_nothing(engine: Engine, tiny: Any) -> None:
    # A part may hold nothing but views of weights, which no other part can be given.
    graph = replace(small(), nodes=(), outputs=(), output_names=())
    lowered = tiny.lowered(graph, [])
    assert engine.compile(graph, lowered=lowered).run(inputs(engine, 2), {}, {"batch": 2}) == []
    bound = engine.load(graph, {}, lowered=lowered)
    assert bound.run(inputs(engine, 2), {"batch": 2}) == []
    with pytest.raises(InputError, match="out of range"):
        bound.run(inputs(engine, 2), {"batch": 9})


@pytest.mark.parametrize("dtype", sorted(tensors.DTYPES))
def test_every_element_type_goes_through(engine: Engine, tiny: Any, dtype: str) -> None:
    type_ = TensorType(dtype, (BATCH, 2))
    weight = Weight("w", dtype, (2, 2), (0, 1))
    graph = tiny.one_node(
        "aten.cat.default",
        ((Ref("x"), WeightRef("w")), 0),
        TensorType(dtype, (Size("batch+2"), 2)),
        inputs=(Value("x", type_),),
        weights=(weight,),
        dims=(Dim("batch", 0, 4),),
    )
    lowered = tiny.lowered(graph, [tiny.op("Concat", ["x", "w"], "y", axis=0)])
    if engine.name == "openvino" and dtype == "f64":
        with pytest.raises(UnsupportedError, match="f64 in f32"):
            engine.compile(graph, lowered=lowered)
        return
    wanted = torch.tensor([[1, 0], [3, 2], [0, 1]], dtype=tensors.DTYPES[dtype])
    data = memoryview(wanted.contiguous().view(torch.uint8).reshape(-1).numpy().tobytes())
    held = {"w": engine.weight(graph, "w", data[wanted.element_size() * 2 :])}
    program, bound = engine.compile(graph, lowered=lowered), engine.load(graph, held, lowered=lowered)
    one, empty = data[: wanted.element_size() * 2], memoryview(b"")
    (found,) = program.run([engine.from_bytes(dtype, (1, 2), one)], held, {"batch": 1})
    assert engine.to_bytes(found) == (dtype, (3, 2), data)
    (found,) = bound.run([engine.from_bytes(dtype, (1, 2), one)], {"batch": 1})
    assert engine.to_bytes(found) == (dtype, (3, 2), data)
    (found,) = bound.run([engine.from_bytes(dtype, (0, 2), empty)], {"batch": 0})
    assert engine.to_bytes(found)[1] == (2, 2)


# --- weights and bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readonly", [True, False])
def test_a_weight_is_a_view_in_its_stored_shape(engine: Engine, readonly: bool) -> None:
    graph = Graph("g", (), (), {"w": Weight("w", "f32", (2, 3, 4), (2, 0, 1))}, (), (), ())
    buffer = bytearray(np.arange(24, dtype=np.float32).tobytes())
    found = engine.weight(graph, "w", memoryview(buffer).toreadonly() if readonly else memoryview(buffer))
    assert np.array_equal(found, np.arange(24).reshape(4, 2, 3))
    buffer[:] = bytes(len(buffer))
    assert not found.any()
    for length in (0, 95, 97):
        with pytest.raises(InputError, match="another length"):
            engine.weight(graph, "w", memoryview(bytearray(length)))
    with pytest.raises(InputError, match="not aligned"):
        engine.weight(graph, "w", memoryview(bytearray(97))[1:])


def test_bytes_round_trip(engine: Engine) -> None:
    data = memoryview(np.arange(12, dtype=np.float32).tobytes())
    array = engine.from_bytes("f32", (3, 4), data)
    assert engine.to_bytes(array) == ("f32", (3, 4), data)
    assert engine.to_bytes(array.T)[1:] == ((4, 3), memoryview(np.ascontiguousarray(array.T)).cast("B"))
    shifted = memoryview(b"?" + bytes(data))[1:]
    assert engine.to_bytes(engine.from_bytes("f32", (3, 4), shifted)) == ("f32", (3, 4), data)
    assert engine.to_bytes(engine.from_bytes("i64", (), memoryview(bytes(8)))) == ("i64", (), memoryview(bytes(8)))
    with pytest.raises(InputError, match="do not match"):
        engine.from_bytes("f32", (4, 4), data)


# --- by name --------------------------------------------------------------------------------------------------------


def test_an_engine_by_name() -> None:
    with pytest.raises(SettingError, match="unknown engine"):
        make_engine("tensorrt", threads=1)
    with pytest.raises(SettingError, match="unknown precision"):
        make_engine("openvino", threads=1, precision="f16")
    for name in ("torch", "onnxruntime"):
        with pytest.raises(UnsupportedError, match="types of the graph"):
            make_engine(name, threads=1, precision="bf16")
    for name in NAMES:
        with pytest.raises(SettingError, match="needs a thread"):
            make_engine(name, threads=0)


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (f"motte.engines.{name}_engine", "motte.engines.quiet_openvino"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match="not installed") as caught:
        make_engine(name, threads=1)
    assert caught.value.hint == f"pip install {name}"

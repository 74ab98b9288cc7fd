"""The torch engine: what it refuses, what it keeps, what it lets go."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from motte.capture.graph import Arg, Dim, Graph, Node, Ref, Size, TensorType, Value, Weight, WeightRef
from motte.engines import torch_engine
from motte.engines.interface import Engine, Program
from motte.engines.torch_engine import TorchEngine, TorchProgram
from motte.errors import GraphError, InputError

BATCH = Size("batch")
ROWS = TensorType("f32", (BATCH, 4))


def node(name: str, op: str, *args: Arg, type_: TensorType = ROWS, **kwargs: Arg) -> Node:
    return Node(name, f"aten.{op}", args, kwargs, (Value(name, type_),))


def small() -> Graph:
    """A linear layer, a reshape that depends on the batch, a join, a keyword tensor argument."""
    return Graph(
        name="small",
        dims=(Dim("batch", 1, 8),),
        inputs=(Value("x", ROWS), Value("unread", TensorType("i64", (BATCH,)))),
        weights={"w": Weight("w", "f32", (4, 4), (1, 0)), "b": Weight("b", "f32", (4,), (0,))},
        nodes=(
            node("fc", "linear.default", Ref("x"), WeightRef("w"), bias=WeightRef("b")),
            node("relu", "relu.default", Ref("fc")),
            node("cat", "cat.default", (Ref("relu"), Ref("x")), 1, type_=TensorType("f32", (BATCH, 8))),
            node(
                "view", "view.default", Ref("cat"), (Size("2*batch"), 4), type_=TensorType("f32", (Size("2*batch"), 4))
            ),
            node("scaled", "mul.Tensor", Ref("view"), BATCH, type_=TensorType("f32", (Size("2*batch"), 4))),
        ),
        outputs=("scaled", "relu"),
        output_names=("scaled", "relu"),
    )


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"w": torch.randn(4, 4, generator=generator).t(), "b": torch.randn(4, generator=generator)}


def inputs(batch: int) -> list[torch.Tensor]:
    return [
        torch.randn(batch, 4, generator=torch.Generator().manual_seed(batch)),
        torch.zeros(batch, dtype=torch.int64),
    ]


def test_it_is_an_engine() -> None:
    engine: Engine = TorchEngine()
    program: Program = engine.compile(small())
    assert engine.name == "torch"
    assert len(program.run(inputs(1), weights(), {"batch": 1})) == 2


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_every_size_from_one_program(batch: int, interpret: Callable[..., Any]) -> None:
    program = TorchEngine().compile(small())
    for size in (3, batch, 3, batch):
        expected = interpret(small(), inputs(size), weights(), {"batch": size})
        found = program.run(inputs(size), weights(), {"batch": size})
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_prepared_sizes_are_bounded() -> None:
    program = TorchProgram(replace(small(), dims=(Dim("batch", 1, 100),)))
    for batch in range(1, 41):
        program.run(inputs(batch), weights(), {"batch": batch})
    assert len(program._prepared) <= torch_engine._MAX_PREPARED
    assert (40,) in program._prepared


def test_inputs_are_emptied_and_let_go() -> None:
    given = inputs(2)
    watched = [weakref.ref(tensor) for tensor in given]
    TorchEngine().compile(small()).run(given, weights(), {"batch": 2})
    assert given == []
    assert [watch() for watch in watched] == [None, None]


def test_values_are_dropped_after_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    original = torch_engine._execute

    def watch(step: Any, env: list[Any]) -> None:
        original(step, env)
        alive.append(sum(value is not None for value in env))

    monkeypatch.setattr(torch_engine, "_execute", watch)
    TorchEngine().compile(small()).run(inputs(2), weights(), {"batch": 2})
    # x, fc | x, relu | relu, cat | relu, view | relu, scaled; the weights go after the first.
    assert alive == [2, 2, 2, 2, 2]


def test_nothing_is_kept_after_a_run() -> None:
    program = TorchEngine().compile(small())
    held = weights()
    outputs = program.run(inputs(2), held, {"batch": 2})
    watched = [weakref.ref(tensor) for tensor in (*held.values(), *outputs)]
    del held, outputs
    assert [watch() for watch in watched] == [None] * 4


def test_outputs_that_are_inputs_come_back() -> None:
    made = replace(small(), nodes=(), weights={}, outputs=("unread", "x"), output_names=("a", "b"))
    given = inputs(2)
    expected = list(given)
    found = TorchEngine().compile(made).run(given, {}, {"batch": 2})
    assert found[0] is expected[1]
    assert found[1] is expected[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, w, d: i.pop(), "number of inputs"),
        (lambda i, w, d: i.append(i[0]), "number of inputs"),
        (lambda i, w, d: i.__setitem__(0, i[0].double()), "another type"),
        (lambda i, w, d: i.__setitem__(0, torch.zeros(2, 5)), "another type"),
        (lambda i, w, d: i.__setitem__(0, torch.zeros(3, 4)), "another type"),
        (lambda i, w, d: i.__setitem__(0, [1.0]), "another type"),
        (lambda i, w, d: w.pop("b"), "weight is missing"),
        (lambda i, w, d: d.clear(), "no size"),
        (lambda i, w, d: d.update(batch=9), "out of range"),
        (lambda i, w, d: d.update(batch=0), "out of range"),
    ],
)
def test_refusals(change: Callable[..., Any], message: str) -> None:
    given, held, dims = inputs(2), weights(), {"batch": 2}
    change(given, held, dims)
    with pytest.raises(InputError, match=message):
        TorchEngine().compile(small()).run(given, held, dims)


def test_an_operation_that_fails_names_its_node() -> None:
    made = small()
    bad = node("view", "view.default", Ref("cat"), (3, 5), type_=TensorType("f32", (3, 5)))
    made = replace(made, nodes=(*made.nodes[:3], bad), outputs=("view",), output_names=("o",))
    with pytest.raises(GraphError, match="failed") as caught:
        TorchEngine().compile(made).run(inputs(2), weights(), {"batch": 2})
    assert caught.value.where == "view"


def test_an_index_out_of_bounds_is_an_error_and_no_read() -> None:
    type_ = TensorType("i64", (1,))
    table = Weight("w", "f32", (3, 2), (0, 1))
    found = node("e", "embedding.default", WeightRef("w"), Ref("i"), type_=TensorType("f32", (1, 2)))
    made = Graph("g", (), (Value("i", type_),), {"w": table}, (found,), ("e",), ("o",))
    with pytest.raises(GraphError):
        TorchEngine().compile(made).run([torch.tensor([3])], {"w": torch.zeros(3, 2)}, {})


def test_an_output_of_another_type_than_promised() -> None:
    made = small()
    lying = replace(made.nodes[-1], outputs=(Value("scaled", TensorType("f32", (4, 4))),))
    made = replace(made, nodes=(*made.nodes[:-1], lying))
    with pytest.raises(GraphError, match="another type"):
        TorchEngine().compile(made).run(inputs(3), weights(), {"batch": 3})


def test_a_list_of_another_length_than_promised() -> None:
    halves = TensorType("f32", (BATCH, 2))
    split = Node("s", "aten.split.Tensor", (Ref("x"), 1, 1), {}, (Value("s", halves), Value("s:1", halves)))
    made = replace(small(), nodes=(split,), outputs=("s",), output_names=("o",))
    with pytest.raises(GraphError, match="number of results"):
        TorchEngine().compile(made).run(inputs(3), weights(), {"batch": 3})


def test_unknown_operation_is_refused_when_compiled() -> None:
    made = replace(small(), nodes=(node("n", "nonzero.default", Ref("x")),))
    with pytest.raises(GraphError, match="not in the table"):
        TorchEngine().compile(made)


def test_several_threads_share_a_program(interpret: Callable[..., Any]) -> None:
    program = TorchEngine().compile(small())
    held = weights()
    wrong: list[int] = []

    def work(batch: int) -> None:
        expected = interpret(small(), inputs(batch), held, {"batch": batch})
        for _ in range(20):
            found = program.run(inputs(batch), held, {"batch": batch})
            if not all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)):
                wrong.append(batch)

    threads = [threading.Thread(target=work, args=(batch,)) for batch in (1, 2, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_profile_names_every_node_and_keeps_the_inputs() -> None:
    given = inputs(2)
    found = TorchEngine().profile(small(), weights(), given, {"batch": 2}, 3)
    assert list(found) == ["fc", "relu", "cat", "view", "scaled"]
    assert all(seconds > 0 for seconds in found.values())
    assert len(given) == 2
    with pytest.raises(InputError):
        TorchEngine().profile(small(), weights(), given, {"batch": 2}, 0)


# --- weights --------------------------------------------------------------------------------------------------------


def one_weight(weight: Weight) -> Graph:
    return Graph("g", (), (), {weight.name: weight}, (), (), ())


@pytest.mark.parametrize("readonly", [True, False])
@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, "f32"), (torch.bfloat16, "bf16"), (torch.int64, "i64"), (torch.bool, "bool"), (torch.uint8, "u8")],
)
def test_weight_is_a_view_of_the_buffer(dtype: torch.dtype, name: str, readonly: bool) -> None:
    source = torch.arange(24).reshape(2, 3, 4).to(dtype)
    stored = source.permute(2, 0, 1).contiguous()
    buffer = bytearray(stored.view(torch.uint8).numpy().tobytes())
    view = memoryview(buffer).toreadonly() if readonly else memoryview(buffer)
    graph = one_weight(Weight("w", name, (2, 3, 4), (2, 0, 1)))
    found = TorchEngine().weight(graph, "w", view)
    assert torch.equal(found, source)
    assert found.stride() == (3, 1, 6)
    buffer[:] = bytes(len(buffer))
    assert not found.any()


def test_empty_and_scalar_weights() -> None:
    engine = TorchEngine()
    empty = engine.weight(one_weight(Weight("w", "f32", (0, 3), (0, 1))), "w", memoryview(b""))
    assert tuple(empty.shape) == (0, 3)
    scalar = engine.weight(one_weight(Weight("w", "f64", (), ())), "w", memoryview(bytearray(8)))
    assert scalar.item() == 0.0


def test_a_buffer_of_another_length_or_alignment_is_refused() -> None:
    graph = one_weight(Weight("w", "f32", (2, 3), (0, 1)))
    for length in (0, 23, 25):
        with pytest.raises(InputError, match="another length"):
            TorchEngine().weight(graph, "w", memoryview(bytearray(length)))
    with pytest.raises(InputError, match="not aligned"):
        TorchEngine().weight(graph, "w", memoryview(bytearray(25))[1:])


def test_bytes_round_trip() -> None:
    engine = TorchEngine()
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4).t()
    dtype, shape, data = engine.to_bytes(tensor)
    assert (dtype, shape, len(data.cast("B"))) == ("f32", (4, 3), 48)
    assert torch.equal(engine.from_bytes(dtype, shape, data), tensor)
    assert torch.equal(engine.from_bytes(dtype, shape, memoryview(bytes(data))), tensor)
    with pytest.raises(InputError):
        engine.from_bytes("f32", (4, 4), data)

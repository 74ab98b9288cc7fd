"""Awkward graphs and cuts: what passes by, what is repeated, what is only a size, and what does not lower."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from motte.capture import capture
from motte.capture.checks import check_graph
from motte.capture.graph import Arg, Dim, Graph, Node, Ref, Size, TensorType, Value, Weight, WeightRef
from motte.errors import PlanError, UnsupportedError
from motte.lower.check import check_lowered
from motte.lower.lower import MAX_REASON, lower
from motte.lower.lowered import NotLowered, from_json, to_json
from motte.plan.plan import Plan, Tile
from motte.plan.planner import plan_parts
from motte.split.split import split

BATCH = Size("batch")


class Builder:
    """Adds nodes to a graph whose dimension ``batch`` is dynamic."""

    def __init__(self, *inputs: tuple[str, str, tuple[int | Size, ...]]) -> None:
        self.inputs = tuple(Value(name, TensorType(dtype, shape)) for name, dtype, shape in inputs)
        self.weights: dict[str, Weight] = {}
        self.nodes: list[Node] = []

    def weight(self, name: str, *shape: int, dtype: str = "f32", order: tuple[int, ...] | None = None) -> WeightRef:
        self.weights[name] = Weight(name, dtype, shape, order or tuple(range(len(shape))))
        return WeightRef(name)

    def add(self, name: str, op: str, args: tuple[Arg, ...], *shape: int | Size, dtype: str = "f32", **kw: Arg) -> Ref:
        out = Value(name, TensorType(dtype, shape))
        self.nodes.append(Node(name, f"aten.{op}", args, kw, (out,)))
        return Ref(name)

    def graph(self, *outputs: str) -> Graph:
        names = tuple(f"out{index}" for index in range(len(outputs)))
        dims = (Dim("batch", 1, 64),) if "batch" in str(self.inputs) else ()
        graph = Graph("toy", dims, self.inputs, self.weights, tuple(self.nodes), outputs, names)
        check_graph(graph)
        return graph


def cut(graph: Graph, *after: str, tiles: tuple[Tile, ...] = ()) -> Plan:
    plan = plan_parts(graph, parts=1, objective="weights", dims={dim.name: 3 for dim in graph.dims})
    return replace(plan, cut_after=after, tiles=tiles)


def drawn(graph: Graph, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights in their own memory order."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in graph.weights.items():
        stored = torch.randn([weight.shape[dim] for dim in weight.order], generator=generator)
        back = sorted(range(len(weight.order)), key=weight.order.__getitem__)
        found[name] = stored.permute(back)
    return found


def awkward() -> Graph:
    b = Builder(
        ("picture", "f32", (BATCH, 3, 6, 6)), ("ids", "i64", (BATCH, 4)), ("mask", "bool", (BATCH, 4)),
        ("unused", "f32", (2,)),
    )  # fmt: skip
    last = b.weight("conv.weight", 8, 3, 3, 3, order=(0, 2, 3, 1))
    table = b.weight("table", 10, 8)
    turned = b.add("turned", "t.default", (table,), 8, 10)
    seen = b.add("seen", "conv2d.default", (Ref("picture"), last, None, (1, 1), (1, 1)), BATCH, 8, 6, 6)
    pooled = b.add("pooled", "adaptive_avg_pool2d.default", (seen, (1, 1)), BATCH, 8, 1, 1)
    flat = b.add("flat", "view.default", (pooled, (BATCH, 8)), BATCH, 8)
    words = b.add("words", "embedding.default", (table, Ref("ids")), BATCH, 4, 8)
    kept = b.add("kept", "masked_fill.Scalar", (words, b.add("off", "logical_not.default", (b.add(
        "wide", "unsqueeze.default", (Ref("mask"), 2), BATCH, 4, 1, dtype="bool"),), BATCH, 4, 1, dtype="bool"), 0.0),
        BATCH, 4, 8)  # fmt: skip
    total = b.add("total", "sum.dim_IntList", (kept, (1,)), BATCH, 8)
    both = b.add("both", "add.Tensor", (total, flat), BATCH, 8)
    same = b.add("same", "contiguous.default", (both,), BATCH, 8)
    scores = b.add("scores", "mm.default", (same, turned), BATCH, 10)
    b.add("best", "argmax.default", (scores, 1), BATCH, dtype="i64")
    b.add("next", "add.Scalar", (Ref("ids"), 1), BATCH, 4, dtype="i64")
    b.add("last", "linear.default", (b.add("again", "mm.default", (scores, table), BATCH, 8), table), BATCH, 10)
    return b.graph("last", "ids", "best", "next", "best", "both", "turned")


def awkward_inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    ids = torch.randint(0, 10, (3, 4), generator=generator)
    return [torch.randn(3, 3, 6, 6, generator=generator), ids, mask, torch.zeros(2)]


def test_awkward_cuts(lowered_and_valid: Any, engines: tuple[str, ...]) -> None:
    graph = awkward()
    plan = cut(graph, "turned", "pooled", "words", "kept", "both", "same", "best")
    parts = split(graph, plan)
    # The first part makes a view of a weight that every reader makes again, so it gives nothing.
    assert parts[0].graph.outputs == ()
    # The third one reads nothing of the second, and two of its results are read by other parts only.
    assert [value.name for value in parts[2].graph.inputs] == ["ids", "pooled"]
    assert sum("turned" in {node.name for node in part.graph.nodes} for part in parts) == 3
    lowered = lowered_and_valid(graph, plan)
    checks = check_lowered(lowered, graph, plan, drawn(graph), awkward_inputs(), engines=engines)
    assert {check.engine for check in checks} == set(engines)
    assert all(check.difference < 1e-5 for check in checks)


def only_sizes() -> Graph:
    """Its second part makes a tensor from the dimension alone; its third has the dimension in no extent by itself."""
    b = Builder(("x", "f32", (BATCH, 6)))
    spread = b.add("spread", "view.default", (Ref("x"), (Size("batch*3"), 2)), Size("batch*3"), 2)
    b.add("steps", "arange.default", (Size("(batch + 5) // 2"),), Size("(batch + 5) // 2"), dtype="i64")
    b.add("ramp", "full.default", ((Size("max(batch, 3)"), 1), 2.0), Size("max(batch, 3)"), 1)
    sums = b.add("sums", "mul.Tensor", (spread, b.weight("scale", 2)), Size("batch*3"), 2)
    ones = b.add("ones", "full.default", ((BATCH, 1, 1), 1.0), BATCH, 1, 1)
    b.add(
        "folded", "add.Tensor", (b.add("cube", "view.default", (sums, (BATCH, 3, 2)), BATCH, 3, 2), ones), BATCH, 3, 2
    )
    return b.graph("folded", "steps", "ramp")


def test_parts_that_need_only_a_size(lowered_and_valid: Any, engines: tuple[str, ...]) -> None:
    graph = only_sizes()
    plan = cut(graph, "spread", "ramp")
    lowered = lowered_and_valid(graph, plan)
    assert [part.dims for part in lowered.parts] == [(), ("batch",), ("batch",)]
    assert lowered.joined.dims == ()
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    (example, *_) = check_lowered(lowered, graph, plan, drawn(graph), [x], engines=engines)
    assert example.difference < 1e-6
    # The same bytes again, and through the manifest.
    assert lower(graph, plan) == lowered
    assert from_json(to_json(lowered)) == lowered


def test_tiles_read_slices(lowered_and_valid: Any, engines: tuple[str, ...]) -> None:
    b = Builder(("x", "f32", (BATCH, 4, 5, 5)))
    seen = b.add(
        "seen", "conv2d.default",
        (Ref("x"), b.weight("c", 8, 2, 3, 3, order=(0, 2, 3, 1)), b.weight("cb", 8), (1, 1), (0, 0), (1, 1), 2),
        BATCH, 8, 3, 3,
    )  # fmt: skip
    flat = b.add("flat", "flatten.using_ints", (seen, 1), BATCH, 72)
    b.add("out", "linear.default", (flat, b.weight("l", 6, 72), b.weight("lb", 6)), BATCH, 6)
    graph = b.graph("out")
    plan = cut(graph, "seen_tile0", "seen", "out_tile1", tiles=(Tile("seen", 2), Tile("out", 3)))
    lowered = lowered_and_valid(graph, plan)
    assert b"c[0:4]" in lowered.parts[0].weight_inputs
    assert b"l[4:6]" in lowered.parts[3].weight_initializers
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    checks = check_lowered(lowered, graph, plan, drawn(graph), [x], engines=engines)
    assert all(check.difference < 1e-5 for check in checks)
    with pytest.raises(PlanError):
        lower(graph, replace(plan, cut_after=("nowhere",)))


def test_a_random_graph(random_graphs: ModuleType, lowered_and_valid: Any, engines: tuple[str, ...]) -> None:
    graph = random_graphs.random_graph(118, 12)
    plan = plan_parts(graph, parts=5, objective="boundary", dims={"batch": 3})
    lowered = lowered_and_valid(graph, plan)
    inputs = random_graphs.random_inputs(graph, {"batch": 3})
    checks = check_lowered(lowered, graph, plan, random_graphs.random_weights(graph), inputs, engines=engines)
    assert all(check.difference < 1e-5 for check in checks)


@pytest.mark.slow
def test_layers_beside_convolutions(lowered_and_valid: Any, engines: tuple[str, ...]) -> None:
    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1)
            self.norm = torch.nn.GroupNorm(2, 4)
            self.recurrent = torch.nn.LSTM(16, 6, batch_first=True)
            self.attention = torch.nn.MultiheadAttention(16, 4, batch_first=True)
            self.last = torch.nn.LayerNorm(16)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            f = torch.nn.functional
            x = self.norm(f.max_pool2d(self.up(x), 3, 2, 1, ceil_mode=True)) + x.mean((2, 3), keepdim=True)
            grown = f.interpolate(x, size=(6, 7), mode="bilinear", align_corners=False)
            rows = f.adaptive_avg_pool2d(f.hardswish(grown) * f.hardsigmoid(grown), (3, 5)).flatten(2)
            rows = f.pad(rows, (0, 1))
            single = f.scaled_dot_product_attention(rows, rows, rows, is_causal=True)
            mixed = self.last(f.gelu(self.attention(single, rows, rows, need_weights=False)[0], approximate="tanh"))
            return self.recurrent(mixed)[0], mixed.topk(3, -1)[1], mixed.softmax(-1).cumsum(-1)

    torch.manual_seed(0)
    x = torch.randn(2, 4, 4, 4)
    captured = capture(Layers().eval().requires_grad_(False), (x,), name="layers", dims={"x": {0: "batch"}})
    plan = plan_parts(captured.graph, parts=4, objective="boundary", dims={"batch": 2})
    lowered = lowered_and_valid(captured.graph, plan)
    checks = check_lowered(lowered, captured.graph, plan, captured.weights, [x], engines=engines)
    assert all(check.difference < 1e-5 for check in checks)


# --- what does not lower --------------------------------------------------------------------------------------------


def small(op: str, dtype: str = "f32", weight: str = "w") -> Graph:
    b = Builder(("x", dtype, (BATCH, 4)))
    first = b.add("first", "linear.default", (Ref("x"), b.weight(weight, 4, 4, dtype=dtype)), BATCH, 4, dtype=dtype)
    second = b.add("second", op, (first,), BATCH, 4, dtype=dtype)
    b.add("third", "neg.default", (second,), BATCH, 4, dtype=dtype)
    return b.graph("third")


def test_a_refused_operation_is_named_with_its_part(capfd: pytest.CaptureFixture[str]) -> None:
    graph = small("erfinv.default")
    found = lower(graph, cut(graph, "first", "second"))
    assert isinstance(found, NotLowered)
    assert list(found.reasons) == [2]
    assert "erf_inv" in found.reasons[2]
    assert "No ONNX function found" in found.reasons[2]
    assert "\n" not in found.reasons[2]
    assert len(found.reasons[2]) <= MAX_REASON
    assert str(found).startswith("part 2: ")
    assert from_json(to_json(found)) == found
    # The exporter keeps its words to itself.
    assert capfd.readouterr() == ("", "")


def test_a_type_without_kernels_is_refused_in_onnxruntimes_words() -> None:
    pytest.importorskip("onnxruntime")
    graph = small("relu.default", "bf16")
    found = lower(graph, cut(graph, "first"))
    assert isinstance(found, NotLowered)
    assert 1 in found.reasons
    assert "onnxruntime" in found.reasons[1]


def test_f64_and_f16_lower(lowered_and_valid: Any) -> None:
    b = Builder(("wide", "f64", (BATCH, 4)), ("narrow", "f16", (BATCH, 4)))
    args = (Ref("wide"), b.weight("w", 4, 4, dtype="f64"))
    b.add("first", "linear.default", args, BATCH, 4, dtype="f64")
    args = (Ref("narrow"), b.weight("n", 4, 4, dtype="f16"))
    b.add("second", "linear.default", args, BATCH, 4, dtype="f16")
    graph = b.graph("first", "second")
    plan = cut(graph, "first")
    lowered = lowered_and_valid(graph, plan)
    weights = drawn(graph)
    given = {"w": weights["w"].double(), "n": weights["n"].half()}
    inputs = [torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).to(t) for t in (torch.float64, torch.half)]
    for check in check_lowered(lowered, graph, plan, given, inputs):
        assert check.difference < 5e-3


def test_a_weight_with_the_name_of_an_input() -> None:
    graph = small("relu.default", weight="x")
    found = lower(graph, cut(graph, "first"))
    assert isinstance(found, NotLowered)
    assert found.reasons[1] == "two inputs of its program would have one name: x"


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motte.lower.lower.find_spec", lambda name: None)
    graph = small("relu.default")
    with pytest.raises(UnsupportedError, match="onnxscript"):
        lower(graph, cut(graph))

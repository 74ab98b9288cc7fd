"""Weights, inputs, outputs and names of a captured graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from motte.capture import capture
from motte.capture.graph import Graph, Weight, read_weights
from motte.capture.tensors import flatten, memory_order, restore
from motte.engines.torch_engine import TorchEngine


def run(captured: Any, *inputs: torch.Tensor, **dims: int) -> list[torch.Tensor]:
    found: list[torch.Tensor] = TorchEngine().compile(captured.graph).run(list(inputs), captured.weights, dims)
    return found


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


def test_tied_weights_are_stored_once() -> None:
    model = Tied().eval()
    ids = torch.randint(0, 7, (2, 3))
    captured = capture(model, (ids,), name="tied")
    assert list(captured.graph.weights) == ["embed.weight"]
    assert captured.graph.weights["embed.weight"].aliases == ("head.weight",)
    assert captured.weights["embed.weight"].data_ptr() == model.embed.weight.data_ptr()
    assert torch.equal(run(captured, ids)[0], model(ids))


def test_weights_tied_by_memory_only_are_stored_once() -> None:
    model = Tied().eval()
    model.head.weight = nn.Parameter(model.embed.weight.data)
    captured = capture(model, (torch.randint(0, 7, (2, 3)),), name="tied")
    assert captured.graph.weights["embed.weight"].aliases == ("head.weight",)
    assert len(captured.graph.weights) == 1


def test_buffers_and_constants_are_weights() -> None:
    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.randn(4))
            self.register_buffer("dropped", torch.randn(4), persistent=False)
            self.plain = torch.randn(4)
            self.unused = nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.exp() * self.kept + self.dropped) * self.plain + torch.tensor([1.0, 2.0, 3.0, 4.0])

    model = Constants().eval()
    x = torch.randn(2, 4)
    captured = capture(model, (x,), name="constants")
    names = set(captured.graph.weights)
    assert {"kept", "dropped"} < names
    assert len(names) == 4
    assert "unused" not in names
    assert torch.equal(run(captured, x)[0], model(x))


def test_memory_order_survives() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1)
    )
    model = model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    captured = capture(model, (x,), name="last", dims={"input": {0: "batch"}})
    assert captured.graph.weights["0.weight"].order == (0, 2, 3, 1)
    assert captured.graph.weights["4.weight"].order == (0, 2, 3, 1)
    assert captured.weights["0.weight"].stride() == model[0].weight.stride()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 9, 9).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            expected = model(x)
        (found,) = run(captured, x, batch=batch)
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3),
        torch.randn(()),
        torch.randn(2, 3, 4),
        torch.randn(2, 3, 4).permute(2, 0, 1),
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(6, 4, 1, 1).contiguous(memory_format=torch.channels_last),
        torch.randn(1, 4, 3, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 1, 3, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(5, 2).t(),
        torch.randn(1, 2).t(),
        torch.empty(0, 3),
        torch.ones(2, 3, dtype=torch.bool),
    ],
)
def test_flatten_and_restore_keep_values_and_strides(tensor: torch.Tensor) -> None:
    order = memory_order(tensor)
    assert order is not None
    weight = Weight("w", "f32", tuple(tensor.shape), order)
    flat = flatten(tensor, order)
    assert flat.dim() == 1
    assert flat.data_ptr() == tensor.data_ptr()
    found = restore(flat.clone(), weight)
    assert torch.equal(found, tensor)
    assert found.stride() == tensor.stride()


@pytest.mark.parametrize(
    "tensor", [torch.randn(4, 6)[:, ::2], torch.randn(3).expand(2, 3), torch.randn(4, 6)[:, :3], torch.randn(8)[::2]]
)
def test_tensors_that_do_not_fill_their_memory_have_no_order(tensor: torch.Tensor) -> None:
    assert memory_order(tensor) is None


def test_strided_weights_are_made_contiguous() -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 8)[:, ::2])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.w

    model = Strided().eval()
    captured = capture(model, (torch.randn(4, 4),), name="strided")
    assert captured.graph.weights["w"].order == (0, 1)
    assert captured.weights["w"].is_contiguous()
    assert torch.equal(captured.weights["w"], model.w)


# --- inputs and outputs ---------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclass
class Result:
    logits: torch.Tensor
    hidden: torch.Tensor


class Returns(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        a, b = x + 1, x * 2
        return {
            "tensor": a,
            "tuple": (a, b),
            "list": [a, b],
            "one": (a,),
            "dict": {"logits": a, "hidden": b},
            "nested": {"a": (a, b), "c": {"d": b}},
            "named": Pair(a, b),
            "dataclass": Result(a, b),
            "same": (a, a),
            "input": (x, a),
            "none": (a, None),
        }[self.kind]


NAMES = {
    "tensor": ("output",),
    "tuple": ("output_0", "output_1"),
    "list": ("output_0", "output_1"),
    "one": ("output_0",),
    "dict": ("logits", "hidden"),
    "nested": ("a.0", "a.1", "c.d"),
    "named": ("first", "second"),
    "same": ("output_0", "output_1"),
    "input": ("output_0", "output_1"),
    "none": ("output_0",),
}


@pytest.mark.parametrize("kind", NAMES)
def test_output_names(kind: str) -> None:
    x = torch.randn(2, 3)
    captured = capture(Returns(kind).eval(), (x,), name="returns")
    assert captured.graph.output_names == NAMES[kind]
    expected = torch.utils._pytree.tree_leaves(Returns(kind)(x))
    found = run(captured, x)
    assert len(found) == len(NAMES[kind])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=False))


def test_a_registered_dataclass_gives_its_field_names() -> None:
    torch.export.register_dataclass(Result)
    captured = capture(Returns("dataclass").eval(), (torch.randn(2, 3),), name="returns")
    assert captured.graph.output_names == ("logits", "hidden")


def test_an_output_that_is_a_weight_is_copied() -> None:
    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3))
            self.register_buffer("b", torch.randn(3))

        def forward(self, x: torch.Tensor) -> Any:
            return x + self.w, self.w, self.b * 1

    model = Gives().eval()
    x = torch.randn(3)
    captured = capture(model, (x,), name="gives")
    found = run(captured, x)
    assert all(torch.equal(a, b) for a, b in zip(found, model(x), strict=True))
    assert found[1].data_ptr() != model.w.data_ptr()


class Inputs(nn.Module):
    def forward(self, x: torch.Tensor, *more: torch.Tensor, state: Any, scale: float = 1.0, flag: bool = False) -> Any:
        return (x + more[0] * more[1]) * scale + state[0] - state[1]["a"] if flag else x


def test_containers_and_plain_settings_as_inputs() -> None:
    x, y, z, h, c = (torch.randn(2, 3) for _ in range(5))
    kwargs = {"state": (h, {"a": c}), "scale": 0.5, "flag": True}
    captured = capture(
        Inputs().eval(),
        (x, y, z),
        kwargs,
        name="inputs",
        dims={
            "x": {0: "batch"},
            "more_0": {0: "batch"},
            "more_1": {0: "batch"},
            "state_0": {0: "batch"},
            "state_1_a": {0: "batch"},
        },
    )
    assert [value.name for value in captured.graph.inputs] == ["x", "more_0", "more_1", "state_0", "state_1_a"]
    assert torch.equal(run(captured, x, y, z, h, c, batch=2)[0], Inputs()(x, y, z, **kwargs))


# --- names ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.conv(x))
        y = self.relu(self.conv(y))
        y += x
        return torch.cat([y, y], 1)[:, :3]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.drop = nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.drop(block(x))
        first, _, third = x.unbind(1)
        return torch.flatten(first - third, 1)


@pytest.fixture(scope="module")
def net() -> Graph:
    return capture(Net().eval(), (torch.randn(2, 3, 4, 4),), name="net", dims={"x": {0: "batch"}}).graph


def test_names_follow_the_modules(net: Graph) -> None:
    assert [node.name for node in net.nodes] == [
        "blocks.0.conv",
        "blocks.0.relu",
        "blocks.0.conv_1",
        "blocks.0.relu_1",
        "blocks.0.add",
        "blocks.0.cat",
        "blocks.0.slice",
        "blocks.1.conv",
        "blocks.1.relu",
        "blocks.1.conv_1",
        "blocks.1.relu_1",
        "blocks.1.add",
        "blocks.1.cat",
        "blocks.1.slice",
        "unbind",
        "sub",
        "view",
    ]
    by_name = {node.name: node for node in net.nodes}
    assert by_name["blocks.0.conv_1"].module == "blocks.0.conv"
    assert by_name["blocks.1.add"].module == "blocks.1"
    assert by_name["sub"].module == ""


def test_source_is_the_line_of_the_model(net: Graph) -> None:
    by_name = {node.name: node for node in net.nodes}
    with open(__file__) as file:
        lines = file.read().splitlines()
    file_name, line = by_name["blocks.1.add"].source.split(":")
    assert file_name == "test_capture_weights.py"
    assert lines[int(line) - 1].strip() == "y += x"


def test_results_that_nobody_reads_are_marked(net: Graph) -> None:
    unbind = next(node for node in net.nodes if node.name == "unbind")
    assert [value.name if value else None for value in unbind.outputs] == ["unbind", None, "unbind:2"]


def test_nothing_dead_and_no_unused_weight(net: Graph) -> None:
    read = {name for node in net.nodes for name in read_weights(node)}
    assert read == set(net.weights)
    assert not any(node.op == "aten.clone.default" for node in net.nodes)

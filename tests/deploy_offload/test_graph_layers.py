"""Which nodes are linear operators, exactly; which layers are chosen; what a placement may not split."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from motte.capture.export import capture
from motte.capture.graph import Size
from motte.errors import BundleError, SettingError
from motte.linear import compute
from motte.linear.nodes import LinearNode, weighted_products
from motte.offload.graph_layers import choose_layers, graph_layers, public_names, split_nodes
from motte.offload.placement import to_plan
from motte.offload.settings import Asymmetric

SCHEME = Asymmetric(noise=None)


def captured(model: nn.Module, *inputs: Tensor, batch: bool = True):
    names = list(inspect.signature(model.forward).parameters)[: len(inputs)]
    dims = {name: {0: "batch"} for name in names} if batch else {}
    return capture(model.eval(), inputs, dims=dims, name="net")


def only(model: nn.Module, x: Tensor) -> LinearNode | str:
    found = [product for _, product in weighted_products(captured(model, x).graph)]
    assert len(found) == 1
    return found[0]


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dims = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    groups = draw(st.sampled_from([1, 2, 3]))
    into, out = (groups * draw(st.integers(1, 3)) for _ in range(2))
    kernel, stride, dilation = (
        tuple(draw(st.lists(st.integers(1, most), min_size=dims, max_size=dims))) for most in (3, 3, 2)
    )
    bias = draw(st.booleans())
    x = torch.randn(2, into, *[draw(st.integers(5, 8)) for _ in range(dims)], dtype=torch.float64)
    if transposed:
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        module = kind(into, out, kernel, stride, 0, extra, groups, bias, dilation)
    else:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        padding = draw(st.sampled_from([0, 1, "same", "valid"]))
        stride = (1,) * dims if padding == "same" else stride
        module = kind(into, out, kernel, stride, padding, dilation, groups, bias)
    return module.double(), x


class Each(nn.Module):
    """Several modules, each on its own input: one capture for all."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(modules)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [module(x) for module, x in zip(self.each, xs, strict=True)]


@given(st.lists(convolutions(), min_size=8, max_size=8))
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_form_of_convolution_is_the_operator_that_torch_runs(cases) -> None:
    modules, inputs = [case[0] for case in cases], [case[1] for case in cases]
    graph = capture(Each(modules).eval(), (inputs,), name="net").graph
    products = [found for _, found in weighted_products(graph)]
    for found, module, x in zip(products, modules, inputs, strict=True):
        assert isinstance(found, LinearNode), found
        pad = [extent for pair in reversed(found.pad) for extent in pair]
        y = compute.forward(found.operation, functional.pad(x, pad), module.weight.detach())
        expected = module(x).detach()
        if module.bias is not None:
            expected = expected - module.bias.detach().reshape(-1, *[1] * (x.dim() - 2))
        assert y.shape == expected.shape
        assert float((y - expected).abs().max()) <= 1e-12 * max(1.0, float(expected.abs().max()))


class Raw(nn.Module):
    """aten.convolution itself, as decomposed graphs hold it."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 2))
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        extra = [1, 0] if self.transposed else [0, 0]
        return torch.ops.aten.convolution(x, self.weight, None, [2, 1], [1, 0], [1, 2], self.transposed, extra, 1)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_general_convolution(transposed: bool) -> None:
    module, x = Raw(transposed), torch.randn(2, 4 if transposed else 3, 6, 7)
    found = only(module, x)
    assert isinstance(found, LinearNode)
    y = compute.forward(found.operation, x, module.weight.detach())
    assert torch.allclose(y, module(x).detach(), atol=1e-5)


class Tokens(nn.Module):
    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if self.first else self.linear(x.transpose(0, 1))


def test_linear_layers_on_tokens_and_what_stays_inside() -> None:
    found = only(Tokens(first=True), torch.randn(2, 5, 6))
    assert isinstance(found, LinearNode)
    assert (found.operation.family, found.operation.weight_shape) == ("linear", (4, 6))
    assert "not the batch" in only(Tokens(first=False), torch.randn(2, 5, 6))  # type: ignore[operator]
    assert "one vector" in only(nn.Linear(6, 4), torch.randn(2, 6))  # type: ignore[operator]
    assert "one position" in only(nn.Conv2d(3, 4, 1), torch.randn(2, 3, 1, 1))  # type: ignore[operator]


class Computed(nn.Module):
    """A convolution whose weight is computed, and one in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3)
        self.b = nn.Conv2d(3, 3, 3).half()

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(x, self.a.weight * 2)
        return self.b(x.half()).float()


def test_what_is_not_exactly_known_stays_inside_with_a_reason() -> None:
    reasons = [found for _, found in weighted_products(captured(Computed(), torch.randn(2, 3, 8, 8)).graph)]
    assert "computed, not stored" in reasons[0]
    assert "f16" in reasons[1]


class Net(nn.Module):
    """stem -> (two branches) -> shared twice -> head; one layer's weight is read elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.left = nn.Conv2d(4, 4, 3, padding=1)
        self.right = nn.Conv2d(4, 4, 1)
        self.shared = nn.Conv2d(4, 4, 1)
        self.read = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.left(x) + self.right(x)
        x = self.read(self.shared(torch.relu(self.shared(x))))
        return self.head(x.mean((2, 3))) + self.read.weight.sum()


@pytest.fixture(scope="module")
def graph():
    return captured(Net(), torch.randn(2, 3, 8, 8)).graph


def test_first_and_last_are_by_what_is_before_and_behind(graph) -> None:
    layers = {layer.name: layer for layer in graph_layers(graph)}
    assert [name for name, layer in layers.items() if layer.first] == ["stem"]
    assert [name for name, layer in layers.items() if layer.last] == ["head"]
    assert "also read by" in (layers["read"].refused or "")
    placement = choose_layers(graph, ["all-but-first-last"])
    assert placement.split == ("left", "right", "shared")
    assert {each.name: each.reason for each in placement.layers if each.side == "inside"}["stem"] == (
        "no layer before it"
    )


def test_names_patterns_and_weights_choose(graph) -> None:
    assert choose_layers(graph, ["left,right"]).split == ("left", "right")
    assert choose_layers(graph, ["*t"]).split == ("left", "right")
    assert choose_layers(graph, ["shared.weight", "left"]).split == ("left", "shared")
    assert choose_layers(graph, ["stem"]).split == ("stem",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lef"], "no such convolution or linear layer"),
        (["left", "x*"], "no such convolution or linear layer"),
        (["head"], r"has to stay inside.*head.*one vector"),
        (["read"], r"has to stay inside.*read.*also read by"),
        (["h*"], "no layer is left"),
        ([], "no layer is left"),
    ],
)
def test_what_cannot_be_chosen_is_refused(graph, words: list[str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        choose_layers(graph, words)


def test_a_weight_that_runs_twice_is_two_nodes_with_one_position(graph) -> None:
    section = to_plan(SCHEME, choose_layers(graph, ["all-but-first-last"]))
    nodes = split_nodes(graph, section, public_names(graph, section))
    assert [(node.name, node.position) for node in nodes] == [
        ("left", 0),
        ("right", 1),
        ("shared", 2),
        ("shared#2", 2),
    ]


def test_a_layer_that_is_not_public_is_refused(graph) -> None:
    section = to_plan(SCHEME, choose_layers(graph, ["left", "right"]))
    with pytest.raises(BundleError, match=r"does not mark public.*layer right, weight right.weight") as caught:
        split_nodes(graph, section, ["left.weight", "right.bias", "right"])
    assert caught.value.check == "M-3"


def test_a_layer_that_must_stay_is_refused_whatever_the_plan_says(graph) -> None:
    section = to_plan(SCHEME, choose_layers(graph, ["left"]))
    for name, message in (("head", "one vector"), ("absent", "not there")):
        layers = tuple(replace(each, name=name) if each.side == "split" else each for each in section.layers)
        layers = tuple(each for each in layers if each.name != name or each.side == "split")
        with pytest.raises(BundleError, match=message) as caught:
            split_nodes(graph, replace(section, layers=layers), [f"{name}.weight"])
        assert caught.value.check == "M-4"


def test_the_batch_of_a_graph_without_dynamic_dimensions() -> None:
    graph = captured(Tokens(first=True), torch.randn(2, 5, 6), batch=False).graph
    assert not any(isinstance(extent, Size) for extent in graph.inputs[0].type.shape)
    assert isinstance(next(found for _, found in weighted_products(graph)), LinearNode)

"""What is evaluated at capture: constants, exactly, and never a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from motte.capture import capture
from motte.capture.export import Captured
from motte.capture.fold import MAX_FOLDED_BYTES
from motte.engines.torch_engine import TorchEngine


class Case(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("b", torch.arange(16.0).reshape(4, 4))
        self.register_buffer("i", torch.tensor([3, 1, 0, 2]))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def take(function: Callable[..., Any]) -> Captured:
    torch.manual_seed(0)
    model = Case(function).eval()
    x = torch.randn(4, 4)
    captured = capture(model, (x,), name="fold")
    found = TorchEngine().compile(captured.graph).run([x], captured.weights, {})
    expected = torch.utils._pytree.tree_leaves(model(x))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(a.stride() == b.stride() for a, b in zip(found, expected, strict=True))
    return captured


def ops(captured: Captured) -> list[str]:
    return [node.op.split(".")[1] for node in captured.graph.nodes]


def shift_mask(self: Case, x: torch.Tensor) -> torch.Tensor:
    mask = x.new_zeros(4, 4)
    mask[:2, :2] = 1
    mask[2:] = 2
    differs = mask.unsqueeze(1) - mask.unsqueeze(2)
    return x + differs.masked_fill(differs != 0, -100.0).masked_fill(differs == 0, 0.0)


def test_a_shift_mask_becomes_one_constant() -> None:
    captured = take(shift_mask)
    assert ops(captured) == ["add"]
    (name,) = captured.graph.weights
    assert name.startswith("constant.")
    assert captured.graph.weights[name].shape == (4, 4, 4)


FOLDED: dict[str, Callable[..., Any]] = {
    "a buffer": lambda self, x: x * (self.b + 1),
    "an index": lambda self, x: x + self.b[self.i],
    "a transposed buffer": lambda self, x: x @ self.b.t().clone(),
    "a literal": lambda self, x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]).unsqueeze(0),
    "a range": lambda self, x: x + torch.arange(4).unsqueeze(1),
    "truth values": lambda self, x: torch.where(torch.ones(4, 4, dtype=torch.bool).tril(), x, 0.0),
    "a scalar": lambda self, x: x + torch.zeros(()),
    "a constant of a list": lambda self, x: torch.cat([x, torch.ones(4, 4) * 3]),
}


@pytest.mark.parametrize("kind", FOLDED)
def test_constants_are_evaluated(kind: str) -> None:
    captured = take(FOLDED[kind])
    assert len(captured.graph.nodes) == 1
    assert any(name.startswith("constant.") for name in captured.graph.weights)


KEPT: dict[str, tuple[Callable[..., Any], str]] = {
    "a parameter": (lambda self, x: x + self.w.t(), "t"),
    "a parameter with a buffer": (lambda self, x: x + (self.b + self.w), "add"),
    "a transcendental function": (lambda self, x: x + self.b.exp(), "exp"),
    "a sum": (lambda self, x: x + self.b.sum(0), "sum"),
    "a scaled addition": (lambda self, x: x + torch.add(self.b, self.b, alpha=0.3), "add"),
    "a range of fractions": (lambda self, x: x + torch.arange(0, 4, 1.0) * 1, "arange"),
    "a large constant": (lambda self, x: x.sum() + torch.zeros(MAX_FOLDED_BYTES // 4 + 1)[:4], "zeros"),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_not_evaluated(kind: str) -> None:
    function, op = KEPT[kind]
    captured = take(function)
    assert op in ops(captured)
    assert len(captured.graph.nodes) > 1


def test_equal_constants_are_stored_once() -> None:
    captured = take(lambda self, x: (x + torch.ones(4, 4) * 3).relu() * (torch.ones(4, 4) + 2))
    assert len(captured.graph.weights) == 1


def test_constants_of_other_strides_or_types_stay_apart() -> None:
    captured = take(lambda self, x: (x + self.b.t()) * (self.b + 0) + (self.b > 3))
    orders = [weight.order for weight in captured.graph.weights.values() if weight.dtype == "f32"]
    assert sorted(orders) == [(0, 1), (1, 0)]
    assert "bool" in {weight.dtype for weight in captured.graph.weights.values()}


def test_a_constant_output_is_a_copy() -> None:
    captured = take(lambda self, x: (self.b + 1, x, self.b + 1))
    assert ops(captured) == ["clone", "clone"]
    assert len(captured.graph.weights) == 1


def test_a_constant_that_an_output_and_a_node_read() -> None:
    def function(self: Case, x: torch.Tensor) -> Any:
        shared = self.b * 2
        return shared, x + shared

    assert sorted(ops(take(function))) == ["add", "clone"]

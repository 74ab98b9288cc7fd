"""Named dynamic dimensions: one capture for every size, ranges found or demanded, relations explained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from motte.capture import capture
from motte.capture.export import Captured
from motte.capture.graph import Dim, Size
from motte.engines.torch_engine import TorchEngine
from motte.errors import CaptureError


class Case(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("positions", torch.arange(12.0))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


BOTH = {"x": {0: "batch", 1: "width"}}


def take(function: Callable[..., Any], shape: tuple[int, ...], **options: Any) -> Captured:
    return capture(Case(function).eval(), (torch.randn(shape),), name="case", **options)


def equal(function: Callable[..., Any], captured: Captured, *shape: int) -> None:
    x = torch.randn(shape)
    model = Case(function).eval()
    with torch.inference_mode():
        expected = model(x)
    dims = {dim.name: shape[index] for index, dim in enumerate(captured.graph.dims)}
    (found,) = TorchEngine().compile(captured.graph).run([x], captured.weights, dims)
    assert torch.equal(expected, found)
    assert expected.stride() == found.stride()


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "size as a number": lambda self, x: x * x.shape[1] + x.shape[0],
    "size in a reshape": lambda self, x: x.reshape(x.shape[0] * x.shape[1], 1),
    "size minus one": lambda self, x: x[:, : x.shape[1] - 1],
    "remainder": lambda self, x: torch.full((x.shape[0],), x.shape[1] % 3) + x.sum(1),
    "larger of two": lambda self, x: torch.zeros(max(x.shape[0], 3), dtype=x.dtype) + x.mean(),
    "square": lambda self, x: torch.arange(x.shape[1] * x.shape[1], dtype=torch.float32) + x.mean(),
    "range": lambda self, x: torch.arange(x.shape[1]) + x,
    "new tensor": lambda self, x: x.new_zeros(x.shape[1], 2) + x.mean(),
    "expand": lambda self, x: x.sum(1, keepdim=True).expand(-1, x.shape[1]),
    "transposed": lambda self, x: x.t().reshape(-1),
    "pad": lambda self, x: nn.functional.pad(x, (1, 2)),
    "cat": lambda self, x: torch.cat([x, x], dim=0),
    "position": lambda self, x: x[:, -1],
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_every_size_from_one_capture(kind: str) -> None:
    function = FUNCTIONS[kind]
    captured = take(function, (2, 5), dims=BOTH)
    assert [dim.name for dim in captured.graph.dims] == ["batch", "width"]
    for shape in ((2, 5), (1, 4), (5, 1), (7, 12), (1, 1)):
        if shape[1] >= captured.graph.dims[1].low:
            equal(function, captured, *shape)
    expected = 3 if kind == "size minus one" else 1
    assert [dim.low for dim in captured.graph.dims] == [1, expected]


def test_an_example_of_extent_1_serves_all_sizes() -> None:
    def function(self: Case, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0], -1).relu()

    captured = take(function, (1, 1), dims=BOTH)
    assert captured.graph.inputs[0].type.shape == (Size("batch"), Size("width"))
    equal(function, captured, 3, 4)
    equal(function, captured, 1, 1)


def test_static_without_dims() -> None:
    captured = take(lambda self, x: x.relu(), (1, 5))
    assert captured.graph.dims == ()
    assert captured.graph.inputs[0].type.shape == (1, 5)


def test_dimensions_of_one_name_are_one() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return x * mask

    dims = {"x": {0: "batch"}, "mask": {0: "batch"}}
    captured = capture(Two().eval(), (torch.randn(1, 3),), {"mask": torch.ones(1, 3)}, name="two", dims=dims)
    assert [value.name for value in captured.graph.inputs] == ["x", "mask"]
    assert captured.graph.dims == (Dim("batch", 1, 1024),)


def test_one_tensor_given_twice_is_two_inputs() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x @ y.t()

    x = torch.randn(3, 4)
    captured = capture(Two().eval(), (x, x), name="two", dims={"x": {0: "rows"}, "y": {0: "columns"}})
    assert [dim.name for dim in captured.graph.dims] == ["rows", "columns"]


def test_a_range_is_narrowed_to_what_the_model_allows() -> None:
    def positions(self: Case, x: torch.Tensor) -> torch.Tensor:
        return x + self.positions[: x.shape[1]]

    captured = take(positions, (2, 5), dims=BOTH)
    assert captured.graph.dims == (Dim("batch", 1, 1024), Dim("width", 1, 12))
    equal(positions, captured, 1, 12)

    def wide(self: Case, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[1] > 3 else x

    captured = take(wide, (2, 5), dims=BOTH)
    assert captured.graph.dims[1] == Dim("width", 4, 1024)


def test_a_range_that_the_caller_gave_is_never_changed() -> None:
    def positions(self: Case, x: torch.Tensor) -> torch.Tensor:
        return x + self.positions[: x.shape[1]]

    captured = take(positions, (2, 5), dims=BOTH, dim_ranges={"width": (2, 10), "batch": (1, 4)})
    assert captured.graph.dims == (Dim("batch", 1, 4), Dim("width", 2, 10))
    with pytest.raises(CaptureError, match="whole range of dimension 'width'") as caught:
        take(positions, (2, 5), dims=BOTH, dim_ranges={"width": (1, 100)})
    assert "12" in (caught.value.expected or "")
    assert "dim_ranges" in (caught.value.hint or "")


def test_an_example_outside_of_its_range_is_refused() -> None:
    with pytest.raises(CaptureError):
        take(lambda self, x: x.relu(), (2, 5), dims=BOTH, dim_ranges={"width": (6, 100)})


@pytest.mark.parametrize(
    ("function", "shape", "message", "hint"),
    [
        (lambda self, x: x.reshape(-1, 5), (2, 5), "fixes dynamic dimension 'width'", "static"),
        (lambda self, x: x * int(x.shape[1]), (2, 5), "fixes dynamic dimension 'width'", "static"),
        (lambda self, x: x + self.positions, (2, 12), "fixes dynamic dimension 'width'", "static"),
        (lambda self, x: x + x.t(), (4, 4), "ties dynamic dimension", "same name"),
        (lambda self, x: x.view(x.shape[0], -1, 2).sum(1), (2, 6), "dimension 'width' to a multiple", "static"),
        (lambda self, x: x[:, : (x.shape[1] + 1) // 2].sum(1), (2, 5), "dimension 'width' to a multiple", "static"),
    ],
)
def test_a_dimension_that_is_not_free_is_named(
    function: Callable[..., Any], shape: tuple[int, ...], message: str, hint: str
) -> None:
    with pytest.raises(CaptureError, match=message) as caught:
        take(function, shape, dims=BOTH)
    assert hint in (caught.value.hint or "")

"""What cannot be captured is refused with the operation, the line of the model, and what to do."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from motte.capture import capture
from motte.errors import CaptureError, InputError, SettingError


class Base(nn.Module):
    """The line marked in ``forward`` is the one to blame."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))


class Case(Base):
    """Runs ``function(self, x)``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


class Item(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(x) * x.sum().item()  # blame


class Nonzero(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return x.nonzero()  # blame


class BooleanMask(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return x[x > 0]  # blame


class RandomNoise(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return x + torch.rand_like(x)  # blame


class Transform(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return torch.fft.rfft(x).abs()  # blame


class Branch(Base):
    def forward(self, x: torch.Tensor) -> Any:
        if x.sum() > 0:  # blame
            return x
        return -x


class ShapeOfValues(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return x[:, : int(x.sum().item())]  # blame


class Broken(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return x @ x  # blame


class Raises(Base):
    def forward(self, x: torch.Tensor) -> Any:
        raise KeyError("no such layer")  # blame


class OneHot(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return nn.functional.one_hot(x.long())  # blame


class ComplexNumbers(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return torch.view_as_complex(x.reshape(-1, 2)).real  # blame


class Counts(Base):
    def forward(self, x: torch.Tensor) -> Any:
        self.count.add_(1)  # blame
        return x + self.count


class ChangesInput(Base):
    def forward(self, x: torch.Tensor) -> Any:
        x.add_(1)  # blame
        return x * 2


LINES: dict[str, tuple[type[Base], str | None, str]] = {
    "item": (Item, "aten.item.default", "where()"),
    "nonzero": (Nonzero, "aten.nonzero.default", "where()"),
    "boolean mask": (BooleanMask, "aten.index.Tensor", "where()"),
    "random": (RandomNoise, "aten.rand_like.default", "make the noise an input"),
    "unknown operation": (Transform, "aten.fft_rfft.default", "docs/spec/graph.md"),
    "branch": (Branch, None, "where()"),
    "shape of values": (ShapeOfValues, None, "where()"),
    "an error of the model": (Broken, None, "example inputs"),
    "an exception of the model": (Raises, None, "example inputs"),
    "one-hot without a count": (OneHot, None, "where()"),
    "complex numbers": (ComplexNumbers, "aten.view_as_complex.default", ""),
    "changes its own state": (Counts, None, "returns a new tensor"),
    "changes its input": (ChangesInput, None, "returns a new tensor"),
}


def blamed(model: type[Base]) -> str:
    lines, first = inspect.getsourcelines(model)
    offset = next(index for index, line in enumerate(lines) if "# blame" in line)
    return f"{Path(__file__)}:{first + offset}"


@pytest.mark.parametrize("flaw", LINES)
def test_operation_line_and_hint(flaw: str) -> None:
    model, op, hint = LINES[flaw]
    with pytest.raises(CaptureError) as caught:
        capture(model().eval(), (torch.randn(2, 4),), name="case")
    assert caught.value.op == op
    assert caught.value.where == blamed(model)
    assert hint in (caught.value.hint or "")
    assert caught.value.hint


@pytest.mark.parametrize("flaw", ["item", "branch", "counts"])
def test_dynamic_dimensions_do_not_change_the_refusal(flaw: str) -> None:
    model = {"item": Item, "branch": Branch, "counts": Counts}[flaw]
    with pytest.raises(CaptureError) as caught:
        capture(model().eval(), (torch.randn(2, 4),), name="case", dims={"x": {0: "batch"}})
    assert caught.value.where == blamed(model)


def test_conditional_operator_is_refused_by_name() -> None:
    def cond(self: Case, x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

    with pytest.raises(CaptureError) as caught:
        capture(Case(cond).eval(), (torch.randn(2, 4),), name="case")
    assert "cond" in (caught.value.op or "")
    assert "where()" in (caught.value.hint or "")


def test_training_mode_is_refused() -> None:
    with pytest.raises(CaptureError, match="training mode") as caught:
        capture(nn.Linear(4, 4), (torch.randn(2, 4),), name="case")
    assert "eval()" in (caught.value.hint or "")
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval()
    model[1].train()
    with pytest.raises(CaptureError, match="training mode") as caught:
        capture(model, (torch.randn(2, 4),), name="case")
    assert caught.value.got == "1"


class Settings:
    """A custom object."""


@pytest.mark.parametrize("value", [Settings(), object(), {1, 2}, Path("x"), 1j])
def test_custom_object_as_input_is_refused(value: object) -> None:
    class Takes(nn.Module):
        def forward(self, x: torch.Tensor, settings: object) -> torch.Tensor:
            return x

    with pytest.raises(CaptureError, match="custom object") as caught:
        capture(Takes().eval(), (torch.randn(2, 4), value), name="case")
    assert "settings" in (caught.value.got or "")


def test_other_devices_and_layouts_are_refused() -> None:
    model = nn.Linear(4, 4).eval()
    with pytest.raises(CaptureError, match="CPU"):
        capture(model, (torch.randn(2, 4, device="meta"),), name="case")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sparse = torch.eye(4).to_sparse()
    with pytest.raises(CaptureError, match="CPU"):
        capture(model, (sparse,), name="case")
    with pytest.raises(CaptureError):
        capture(model.to("meta"), (torch.randn(2, 4),), name="case")


def test_weights_of_other_element_types_are_refused() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.w.abs()

    with pytest.raises(CaptureError, match="element type"):
        capture(Complex().eval(), (torch.randn(2, 4),), name="case")


@pytest.mark.parametrize(
    "result",
    [lambda x: (x, 3), lambda x: {"a": x, "b": "text"}, lambda x: [x, x.shape[0]], lambda x: (None,), lambda x: 3],
)
def test_outputs_that_are_no_tensors_are_refused(result: Callable[..., Any]) -> None:
    with pytest.raises(CaptureError, match=r"output|returns no tensor"):
        capture(Case(lambda self, x: result(x)).eval(), (torch.randn(2, 4),), name="case", dims={"x": {0: "batch"}})


def test_a_tensor_kept_between_calls_is_refused() -> None:
    class Remembers(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = x + 1
            return self.last * 2

    with pytest.raises(CaptureError, match="from one call to the next") as caught:
        capture(Remembers().eval(), (torch.randn(2, 4),), name="case")
    assert "self.last" in (caught.value.got or "")


def test_a_fraction_of_a_dynamic_size_is_refused() -> None:
    def scaled(self: Case, x: torch.Tensor) -> Any:
        return x * x.shape[0] ** -0.5  # blame

    with pytest.raises(CaptureError, match="not an integer") as caught:
        capture(Case(scaled).eval(), (torch.randn(2, 4),), name="case", dims={"x": {0: "batch"}})
    assert "static" in (caught.value.hint or "")


def test_what_is_no_module_or_does_not_fit_forward() -> None:
    with pytest.raises(InputError, match=r"nn\.Module"):
        capture(torch.relu, (torch.randn(2),), name="case")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="do not fit forward"):
        capture(nn.Linear(4, 4).eval(), (torch.randn(2, 4), 1), name="case")
    with pytest.raises(InputError, match="do not fit forward"):
        capture(nn.Linear(4, 4).eval(), (), {"y": torch.randn(2, 4)}, name="case")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": {"y": {0: "batch"}}}, "does not exist"),
        ({"dims": {"input": {2: "batch"}}}, "no such dimension"),
        ({"dims": {"input": {-1: "batch"}}}, "no such dimension"),
        ({"dims": {"input": {0: "batch"}}, "dim_ranges": {"width": (1, 2)}}, "no input has"),
        ({"dims": {"input": {0: "batch"}}, "dim_ranges": {"batch": (0, 2)}}, "not a range"),
        ({"dims": {"input": {0: "batch"}}, "dim_ranges": {"batch": (3, 3)}}, "not a range"),
        ({"dims": {"input": {0: "batch", 1: "batch"}}}, "two sizes"),
        ({"dims": {"input": {0: "max"}}}, "not a name of a dimension"),
        ({"dims": {"input": {0: "Batch size"}}}, "not a name of a dimension"),
    ],
)
def test_contradictory_dims_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        capture(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), name="case", **options)


def test_refused_name() -> None:
    with pytest.raises(SettingError, match="not a name"):
        capture(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), name="two words")


def test_a_refusal_leaves_torch_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(CaptureError):
        capture(Branch().eval(), (torch.randn(2, 4),), name="case")
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert torch.is_grad_enabled()
    assert capfd.readouterr() == ("", "")

"""The comparison with the reference: what it finds, what it lets pass, and on which inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx
import pytest
import torch

from motte.capture import Captured, capture
from motte.engines.select import make_engine
from motte.errors import GraphError, InputError, MismatchError, UnsupportedError
from motte.lower.check import BF16_TOLERANCE, TOLERANCE, check_lowered, difference
from motte.lower.examples import other_sizes, random_inputs
from motte.lower.lower import lower
from motte.lower.lowered import Lowered
from motte.plan.plan import Plan
from motte.plan.planner import plan_cuts

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 8)
        self.second = torch.nn.Linear(8, 8)
        self.third = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.second(torch.relu(self.first(x)))
        return self.third(torch.relu(hidden)), hidden.argmax(1)


@pytest.fixture(scope="module")
def made() -> tuple[Captured, Plan, Lowered]:
    torch.manual_seed(0)
    captured = capture(Model().eval(), (X,), name="model", dims={"x": {0: "batch"}})
    plan = plan_cuts(captured.graph, cut_after=("first", "second"), objective="chosen", dims={"batch": 1})
    lowered = lower(captured.graph, plan)
    assert isinstance(lowered, Lowered)
    return captured, plan, lowered


def check(made: tuple[Captured, Plan, Lowered], lowered: Lowered | None = None, **settings: Any) -> Any:
    captured, plan, honest = made
    return check_lowered(lowered or honest, captured.graph, plan, captured.weights, [X], **settings)


def test_honest_programs_agree_and_say_with_what(made: Any) -> None:
    example, random = check(made)
    assert (example.engine, example.precision, example.inputs) == ("onnxruntime", "f32", "example")
    assert random.inputs == "random"
    assert example.engine_version.count(".") == 2
    assert 0 <= example.difference < 1e-6
    assert 0 <= random.difference < 1e-6


def changed(core: bytes, change: Callable[[onnx.ModelProto], None]) -> bytes:
    model = onnx.load_from_string(core)
    change(model)
    found: bytes = model.SerializeToString()
    return found


def tanh_for_relu(model: onnx.ModelProto) -> None:
    (node,) = (each for each in model.graph.node if each.op_type == "Relu")
    node.op_type = "Tanh"


def test_another_program_is_found_and_its_part_named(made: Any) -> None:
    _, _, lowered = made
    parts = list(lowered.parts)
    parts[1] = replace(parts[1], core=changed(parts[1].core, tanh_for_relu))
    with pytest.raises(MismatchError, match="onnxruntime engine answers otherwise") as refused:
        check(made, replace(lowered, parts=tuple(parts)))
    assert refused.value.where == "part 2 of 3, value second"
    assert refused.value.expected == f"a difference of at most {TOLERANCE} of the largest element"

    def both(model: onnx.ModelProto) -> None:
        for each in model.graph.node:
            each.op_type = "Tanh" if each.op_type == "Relu" else each.op_type

    joined = replace(lowered.joined, core=changed(lowered.joined.core, both))
    with pytest.raises(MismatchError) as refused:
        check(made, replace(lowered, joined=joined))
    assert refused.value.where is not None
    assert refused.value.where.startswith("all parts joined, value ")


@pytest.mark.parametrize("by", [1e-2, float("nan"), float("inf")])
def test_a_weight_that_the_engine_reads_otherwise_is_found(
    made: Any, by: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lying(name: str, **settings: Any) -> Any:
        engine = make_engine(name, **settings)
        honest = engine.weight

        def weight(graph: Any, name: str, buffer: memoryview) -> Any:
            array = honest(graph, name, buffer)
            if name != "third.bias":
                return array
            array = array.copy()
            array[2] += by
            return array

        engine.weight = weight  # type: ignore[method-assign]
        return engine

    monkeypatch.setattr("motte.lower.check.make_engine", lying)
    with pytest.raises(MismatchError) as refused:
        check(made)
    assert refused.value.where is not None
    assert refused.value.where.startswith("part 3 of 3, value ")


def test_an_integer_that_differs_is_found(made: Any) -> None:
    _, _, lowered = made

    def least(model: onnx.ModelProto) -> None:
        (node,) = (each for each in model.graph.node if each.op_type == "ArgMax")
        node.op_type = "ArgMin"

    parts = (*lowered.parts[:2], replace(lowered.parts[2], core=changed(lowered.parts[2].core, least)))
    with pytest.raises(MismatchError) as refused:
        check(made, replace(lowered, parts=parts))
    assert refused.value.where == "part 3 of 3, value argmax"
    assert refused.value.got == "1"


def test_bf16_is_openvinos_alone_and_within_its_bound(made: Any, engines: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedError):
        check(made, precision="bf16")
    if "openvino" not in engines:
        pytest.skip("openvino is not installed")
    try:
        make_engine("openvino", threads=1, precision="bf16")
    except UnsupportedError as problem:
        pytest.skip(str(problem))
    example, _ = check(made, engines=("openvino",), precision="bf16")
    assert example.precision == "bf16"
    assert TOLERANCE < example.difference < BF16_TOLERANCE


def test_inputs_that_do_not_fit_are_refused(made: Any) -> None:
    captured, plan, lowered = made
    with pytest.raises(InputError):
        check_lowered(lowered, captured.graph, plan, captured.weights, [X[:, :5]])
    broken = replace(lowered, joined=replace(lowered.joined, core=b"\x00" + lowered.joined.core))
    with pytest.raises(GraphError):
        check(made, broken)


# --- the figure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reference", "expected"),
    [
        ([1.0, 2.0, 4.0], [1.0, 2.0, 4.0], 0.0),
        ([1.0, 2.5, 4.0], [1.0, 2.0, 4.0], 0.125),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 1e-9], [0.0, 0.0], math.inf),
        ([math.nan, 1.0], [0.0, 1.0], math.inf),
        ([1.0, 1.0], [math.nan, 1.0], math.inf),
        ([math.nan, 1.5], [math.nan, 1.0], 0.5),
        ([math.inf, 1.0], [1.0, 1.0], math.inf),
        ([-math.inf, 1.0], [-math.inf, 1.0], 0.0),
        ([-math.inf, 1.5], [-math.inf, 1.0], 0.5),
        ([math.inf, 1.0], [-math.inf, 1.0], math.inf),
        # A mask's largest number is no scale for the numbers beside it.
        ([-3.4e38, 1.5], [-3.4e38, 1.0], 0.5),
        ([-1.7e38, 1.0], [-3.4e38, 1.0], 0.5),
        ([], [], 0.0),
    ],
)
def test_the_difference_of_floats(value: list[float], reference: list[float], expected: float) -> None:
    found = difference(torch.tensor(value, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64))
    assert found == pytest.approx(expected)


def test_the_difference_of_other_tensors() -> None:
    assert difference(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25
    assert difference(torch.tensor([True, True]), torch.tensor([True, False])) == 0.5
    assert difference(torch.tensor([1, 2]), torch.tensor([1.0, 2.0])) == math.inf
    assert difference(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0]])) == math.inf


# --- random inputs --------------------------------------------------------------------------------------------------


def test_random_inputs_are_of_the_examples_kind(made: Any) -> None:
    graph = made[0].graph
    assert other_sizes(graph, {"batch": 3}) == [{"batch": 1}, {"batch": 4}]
    (dim,) = graph.dims
    narrow = replace(graph, dims=(replace(dim, low=3, high=3),))
    assert other_sizes(narrow, {"batch": 3}) == [{"batch": 3}]
    example = X.abs() * 10 + 5
    (drawn,) = random_inputs(graph, [example], {"batch": 50}, seed=1)
    (again,) = random_inputs(graph, [example], {"batch": 50}, seed=1)
    assert torch.equal(drawn, again)
    assert drawn.shape == (50, 6)
    assert example.min() <= drawn.min()
    assert drawn.max() <= example.max()
    assert drawn.std() == pytest.approx(example.std().item(), rel=0.3)
    ids = torch.tensor([[7, 9, 7, 3, 3, 9]])
    (drawn,) = random_inputs(graph, [ids], {"batch": 50}, seed=1)
    assert drawn.dtype is torch.int64
    assert set(drawn.unique().tolist()) == {3, 7, 9}
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
    (drawn,) = random_inputs(graph, [mask], {"batch": 5}, seed=1)
    assert torch.equal(drawn, mask[[0, 1, 0, 1, 0]])

"""Checks of products: honest ones pass at any magnitude, lies are caught at the stated rate, just above it and far."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from motte.accelerator.calculator import Calculator
from motte.errors import InputError, IntegrityError
from motte.linear.operation import LinearOperation
from motte.offload import integrity, projection
from motte.offload.integrity import (
    Tolerance,
    check_forward,
    check_forward_multiply_adds,
    check_input_gradient,
    check_input_gradient_multiply_adds,
    check_weight_gradient,
    check_weight_gradient_multiply_adds,
    detectable,
    escape_probability,
    forward_tolerance,
    input_gradient_tolerance,
    weight_gradient_tolerance,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
DENSE = LinearOperation("conv", 6, 20, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0))
GROUPED = LinearOperation("conv", 12, 24, (3, 3), (2, 1), (1, 0), (1, 2), (0, 0), 2)
UP = LinearOperation("conv_transpose", 10, 12, (3, 2), (2, 2), (1, 0), (1, 1), (1, 0), 2)
TOKENS = LinearOperation("linear", 24, 16)
SHAPES = {DENSE: (2, 6, 7, 7), GROUPED: (2, 12, 7, 8), UP: (2, 10, 4, 5), TOKENS: (2, 9, 24)}


@dataclass
class Asked:
    """One product of an honest accelerator, how it is checked, and what is tolerated."""

    answer: Tensor
    check: Callable[[Tensor, int], None]
    tolerance: Callable[[Tensor, int], Tolerance]
    arrange: Callable[[Tensor], Tensor]
    """A view of an answer as (errors are projected over this axis, one comparison each)."""


def honest(operation: LinearOperation, x: Tensor, weight: Tensor, gradient: Tensor) -> dict[str, Asked]:
    calculator = Calculator()
    calculator.register(0, operation)
    calculator.put_weight(0, weight)
    y = calculator.forward(0, x, hold=1)
    back = calculator.backward(0, 1, gradient, need_input=True, need_weight=True)
    assert back.input is not None
    assert back.weight is not None
    side = weight_gradient_tolerance(operation, x, gradient, back.weight, vectors=1)[1]

    def of_maps(answer: Tensor) -> Tensor:
        if operation.family == "linear":
            return answer.view(-1, answer.shape[-1]).t()
        wide = answer.unflatten(1, (operation.groups, -1)).flatten(3)
        return wide.transpose(1, 2).transpose(0, 1).flatten(1)

    def of_weight(answer: Tensor) -> Tensor:
        split = answer.view(operation.groups, -1, *answer.shape[1:2], math.prod(operation.kernel))
        output_first = operation.family != "conv_transpose"
        turned = split if (side == "output") == output_first else split.transpose(1, 2)
        return turned.transpose(0, 1).flatten(1)

    shape = tuple(x.shape)
    return {
        "forward": Asked(
            y,
            lambda a, k: check_forward(operation, x, weight, a, vectors=k, where="layer a, step 3"),
            lambda a, k: forward_tolerance(operation, x, weight, a, vectors=k),
            of_maps,
        ),
        "input": Asked(
            back.input,
            lambda a, k: check_input_gradient(operation, shape, weight, gradient, a, vectors=k, where="layer a"),
            lambda a, k: input_gradient_tolerance(operation, shape, weight, gradient, a, vectors=k),
            of_maps,
        ),
        "weight": Asked(
            back.weight,
            lambda a, k: check_weight_gradient(operation, x, gradient, a, vectors=k, where="layer a"),
            lambda a, k: weight_gradient_tolerance(operation, x, gradient, a, vectors=k)[0],
            of_weight,
        ),
    }


def asked(operation: LinearOperation, dtype: torch.dtype, seed: int = 0) -> dict[str, Asked]:
    generator = torch.Generator().manual_seed(seed)
    shape = {**SHAPES, **SMALL}[operation]
    shapes = (shape, operation.weight_shape, operation.output_shape(shape))
    x, weight, gradient = (torch.randn(each, generator=generator, dtype=torch.float64) for each in shapes)
    # Weights stay float32 beside bfloat16 activations, as under autocast.
    return honest(
        operation, x.to(dtype), weight.to(torch.float32 if dtype == torch.bfloat16 else dtype), gradient.to(dtype)
    )


def passes(product: Asked, answer: Tensor, vectors: int) -> bool:
    try:
        product.check(answer, vectors)
    except IntegrityError:
        return False
    return True


# --- honest accelerators are not accused ------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
def test_honest_products_of_every_shape_pass(cases: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, case in enumerate(cases(84, 6)):
        # Few products take another way than many.
        monkeypatch.setattr(projection, "_FEW_PRODUCTS", number % 2 << 20)
        monkeypatch.setattr(projection, "_BLOCK", 64 << 12 * (number % 2))
        x, weight, gradient = case.tensors(dtype)
        for product in honest(case.operation, x, weight, gradient).values():
            product.check(product.answer, number % 3 + 1)


HOSTILE: dict[str, Callable[[Tensor], Tensor]] = {
    "large mean": lambda x: x + 1e5,
    "constant": lambda x: torch.full_like(x, 0.1),
    "half against half": lambda x: (
        torch.where(torch.arange(x.shape[1]).view(1, -1, *[1] * (x.ndim - 2)) % 2 > 0, x, -x)
        + torch.linspace(-9, 9, x.shape[1]).sign().view(1, -1, *[1] * (x.ndim - 2))
    ),
    "scales of channels": lambda x: x * 10.0 ** torch.linspace(-12, 12, x.shape[1]).view(1, -1, *[1] * (x.ndim - 2)),
    "scales of samples": lambda x: x * 10.0 ** torch.linspace(-12, 12, len(x)).view(-1, *[1] * (x.ndim - 1)),
    "scales of positions": lambda x: x * 10.0 ** torch.linspace(-12, 12, x.shape[-1]),
    "tiny": lambda x: x * 1e-25,
    "below normal": lambda x: x * 1e-40,
    "huge": lambda x: x * 1e15,
    "zeros": torch.zeros_like,
    "one value": lambda x: x * (torch.arange(x.numel()).view(x.shape) == 3),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_honest_products_of_hostile_magnitudes_pass(cases: Any, kind: str, dtype: torch.dtype) -> None:
    for case in cases(21, 7, batches=(2,)):
        x, weight, gradient = case.tensors(torch.float32)
        for data in ((HOSTILE[kind](x), weight, gradient), (x, HOSTILE[kind](weight), gradient)):
            for product in honest(case.operation, data[0].to(dtype), data[1], data[2].to(dtype)).values():
                product.check(product.answer, 2)


def test_a_long_chain_of_float32_additions_is_honest() -> None:
    # The worst kernel that computes honestly: one product after the other, one accumulator, planted cancellation.
    operation = LinearOperation("conv", 4096, 8, (1,), (1,), (0,), (1,), (0,))
    halves = torch.ones(4096)
    halves[2048:] = -1
    for x in (halves, torch.full((4096,), 0.1), halves * 0.3 + 1000):
        weight = torch.full((8, 4096, 1), 0.3) * (1 + torch.arange(8).view(8, 1, 1) / 7)
        y = torch.zeros(8)
        for c in range(4096):
            y = y + weight[:, c, 0] * x[c]
        for _ in range(50):
            check_forward(operation, x.view(1, -1, 1), weight, y.view(1, 8, 1), vectors=2, where="a")


# --- lies are caught --------------------------------------------------------------------------------------------------
LIES: dict[str, Callable[[Tensor], Tensor]] = {
    "one element": lambda y: y + (torch.arange(y.numel()).view(y.shape) == y.numel() // 2) * 3 * y.abs().max() * 10,
    "scaled": lambda y: y * 3,
    "zeros": torch.zeros_like,
    "negated": lambda y: -y,
    "rolled channels": lambda y: y.roll(1, 1),
    "rolled positions": lambda y: y.roll(1, -1),
    "samples swapped": lambda y: y.flip(0),
    "huge": lambda y: y + 1e30,
    "not a number": lambda y: torch.where(torch.arange(y.numel()).view(y.shape) == 5, math.nan, y),
    "infinite": lambda y: torch.where(torch.arange(y.numel()).view(y.shape) == 5, math.inf, y),
    "all infinite": lambda y: torch.full_like(y, -math.inf),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("operation", SHAPES, ids=["dense", "grouped", "transposed", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lies_are_caught(operation: LinearOperation, dtype: torch.dtype, lie: str) -> None:
    for name, product in asked(operation, dtype).items():
        # Eight vectors: a lie of these sizes passes less than once in 10^9 runs.
        with pytest.raises(IntegrityError) as caught:
            product.check(LIES[lie](product.answer), 8)
        assert "layer a" in str(caught.value), name
        assert ("not finite" in str(caught.value)) == (lie in ("not a number", "infinite", "all infinite"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", SHAPES)
def test_the_side_of_a_constant_weight_says_the_same(operation: LinearOperation, dtype: torch.dtype) -> None:
    weight = torch.randn(operation.weight_shape, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    side = integrity.weight_side(operation, weight, dtype)
    calculator = Calculator()
    calculator.register(0, operation)
    calculator.put_weight(0, weight)
    for number in range(2):
        x = torch.randn(SHAPES[operation]).to(dtype)
        y = calculator.forward(0, x, hold=number)
        check_forward(operation, x, side, y, vectors=2, where="a")
        with pytest.raises(IntegrityError, match="not the product"):
            check_forward(operation, x, side, y + y.abs().mean(), vectors=2, where="a")
    other = torch.float32 if dtype == torch.float64 else torch.float64
    with pytest.raises(InputError, match="another dtype"):
        check_forward(operation, x.to(other), side, y, vectors=2, where="a")


def test_yesterdays_answer_is_caught() -> None:
    for today, yesterday in zip(
        asked(DENSE, torch.float32).values(), asked(DENSE, torch.float32, seed=1).values(), strict=True
    ):
        with pytest.raises(IntegrityError):
            today.check(yesterday.answer, 8)


SMALL = {
    LinearOperation("conv", 3, 4, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0)): (2, 3, 3, 4),
    LinearOperation("conv", 6, 8, (3,), (2,), (1,), (2,), (0,), 2): (2, 6, 9),
    LinearOperation("conv_transpose", 6, 8, (3,), (2,), (1,), (1,), (1,), 2): (2, 6, 4),
    LinearOperation("linear", 4, 5): (2, 2, 3, 4),
}


@pytest.mark.parametrize("operation", SMALL, ids=["dense", "grouped", "transposed", "linear"])
def test_every_single_element_is_looked_at(operation: LinearOperation) -> None:
    for name, product in asked(operation, torch.float64).items():
        for index in range(product.answer.numel()):
            answer = product.answer.clone()
            answer.view(-1)[index] += 1e-3
            assert not passes(product, answer, 2), (name, index)


def test_the_message_says_what_where_and_by_how_much() -> None:
    product = asked(TOKENS, torch.float32)["forward"]
    answer = product.answer.clone()
    answer[1, 4, 3] += 100
    with pytest.raises(IntegrityError, match=r"output is not the product.*layer a, step 3, sample 1, token \(4,\)"):
        product.check(answer, 4)
    product = asked(DENSE, torch.float32)["input"]
    answer = product.answer.clone()
    answer[1, 2, 3, 5] += 100
    with pytest.raises(IntegrityError, match=r"input is not .*sample 1, position \(3, 5\).*deviation of at most .*got"):
        product.check(answer, 4)


# --- just above and just below the stated magnitude -------------------------------------------------------------------
def planted(product: Asked, direction: Tensor, factor: float, vectors: int) -> Tensor:
    """The answer with an error of ``factor`` times the detectable norm, in ``direction`` at one comparison."""
    arranged = product.arrange(product.answer)
    column, size = arranged.shape[1] // 2, 0.0
    for _ in range(60):
        answer = product.answer.clone()
        product.arrange(answer)[:, column] += direction.to(answer.dtype) * size
        assert size == 0 or not torch.equal(answer, product.answer)  # ``arrange`` is a view here
        tolerance = product.tolerance(answer, vectors)
        limits = Tolerance(
            tolerance.limit.expand_as(tolerance.own).reshape(-1), tolerance.own.reshape(-1), tolerance.spread
        )
        # The largest of all comparisons stands above that of this one.
        size = factor * float(detectable(limits, len(arranged)).max())
    return answer


TRIALS = 300


@pytest.mark.parametrize("name", ["forward", "input", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("channels", [2, 99])
def test_just_above_is_caught_at_the_stated_rate(name: str, dtype: torch.dtype, vectors: int, channels: int) -> None:
    product = asked(TOKENS, dtype)[name]
    rows = len(product.arrange(product.answer))
    direction = (torch.arange(rows) < channels).double()
    answer = planted(product, direction / direction.norm(), 1.01, vectors)
    passed = sum(passes(product, answer, vectors) for _ in range(TRIALS))
    expected = TRIALS * escape_probability(vectors)
    assert passed <= expected + 5 * math.sqrt(expected)


@pytest.mark.parametrize("name", ["forward", "input", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_well_below_may_pass_and_in_between_is_caught_sometimes(name: str, dtype: torch.dtype) -> None:
    product = asked(TOKENS, dtype)[name]
    direction = torch.zeros(len(product.arrange(product.answer)))
    direction[0] = 1
    small = planted(product, direction, 0.01, 1)
    assert sum(passes(product, small, 1) for _ in range(50)) > 25
    middle = planted(product, direction, 0.15, 1)
    assert 0 < sum(passes(product, middle, 1) for _ in range(100)) < 100


def test_where_there_are_no_more_channels_than_vectors_nothing_above_passes() -> None:
    depthwise = LinearOperation("conv", 5, 5, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0), 5)
    generator = torch.Generator().manual_seed(2)
    x, weight, gradient = (
        torch.randn(each, generator=generator) for each in ((2, 5, 6, 6), (5, 1, 3, 3), (2, 5, 6, 6))
    )
    for product in honest(depthwise, x, weight, gradient).values():
        tolerance = product.tolerance(product.answer, 1)
        assert tolerance.spread == 1
        size = 1.1 * float(detectable(tolerance, 1).max())
        for index in range(0, product.answer.numel(), 7):
            answer = product.answer.clone()
            answer.view(-1)[index] += size
            assert not passes(product, answer, 1)


def test_detectable_figures_of_the_documentation() -> None:
    # Relative to P + Y, in float32: what the threat model states.
    assert escape_probability(1) == 1 / 16
    assert escape_probability(2) == 1 / 256
    x, weight = torch.randn(1, 512, 6, 6), torch.randn(512, 512, 3, 3)
    operation = LinearOperation("conv", 512, 512, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0))
    for dtype, bound in ((torch.float32, 0.04), (torch.bfloat16, 0.4)):
        calculator = Calculator()
        calculator.register(0, operation)
        calculator.put_weight(0, weight)
        y = calculator.forward(0, x.to(dtype), hold=None)
        tolerance = forward_tolerance(operation, x.to(dtype), weight, y, vectors=2)
        relative = detectable(tolerance, 512).view(6, 6)[1:5, 1:5] / y.double().norm(dim=1)[0, 1:5, 1:5]
        assert 0.1 * bound < float(relative.min())
        assert float(relative.max()) < bound


# --- the rest ---------------------------------------------------------------------------------------------------------
def test_the_empty_batch_passes_and_its_weight_gradient_is_zero() -> None:
    x, weight = torch.randn(0, 6, 7, 7), torch.randn(DENSE.weight_shape)
    gradient = torch.randn(0, 20, 7, 7)
    check_forward(DENSE, x, weight, gradient, vectors=2, where="a")
    check_input_gradient(DENSE, x.shape, weight, gradient, x, vectors=2, where="a")
    check_weight_gradient(DENSE, x, gradient, torch.zeros_like(weight), vectors=2, where="a")
    with pytest.raises(IntegrityError):
        check_weight_gradient(DENSE, x, gradient, weight, vectors=2, where="a")
    assert forward_tolerance(DENSE, x, weight, gradient, vectors=2).limit.numel() == 0


def test_nothing_is_changed_and_no_generator_touched() -> None:
    x, weight, y = torch.randn(2, 6, 7, 7), torch.randn(DENSE.weight_shape), torch.randn(2, 20, 7, 7)
    before = [each.clone() for each in (x, weight, y)]
    state = torch.get_rng_state()
    with pytest.raises(IntegrityError):
        check_forward(DENSE, x, weight, y, vectors=2, where="a")
    with pytest.raises(IntegrityError):
        check_weight_gradient(DENSE, x, y, weight, vectors=2, where="a")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(*pair) for pair in zip(before, (x, weight, y), strict=True))


def test_coefficients_are_drawn_anew_for_every_check(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    plain = integrity.draw

    def spy(vectors: int, channels: int, dtype: torch.dtype) -> Tensor:
        drawn.append(plain(vectors, channels, dtype))
        return drawn[-1]

    monkeypatch.setattr(integrity, "draw", spy)
    product = asked(DENSE, torch.float32)["forward"]
    drawn.clear()
    for _ in range(3):
        product.check(product.answer, 2)
    assert len(drawn) == 3
    assert not any(torch.equal(drawn[i], drawn[i + 1]) for i in range(2))


def test_autocast_and_channels_last_change_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 6, 7, 7), DENSE.weight_shape, (2, 20, 7, 7))
    x, weight, gradient = (torch.randn(each, generator=generator, dtype=torch.float64) for each in shapes)
    for product in honest(DENSE, x, weight, gradient).values():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product.check(product.answer, 2)
            product.check(product.answer.to(memory_format=torch.channels_last), 2)
    last = honest(DENSE, x.to(memory_format=torch.channels_last), weight, gradient)
    for product in last.values():
        product.check(product.answer, 2)


def test_wrong_shapes_and_magnitudes_beyond_any_bound() -> None:
    x, weight = torch.randn(2, 6, 7, 7), torch.randn(DENSE.weight_shape)
    with pytest.raises(IntegrityError, match="another shape"):
        check_forward(DENSE, x, weight, torch.randn(2, 20, 7, 8), vectors=2, where="a")
    with pytest.raises(InputError, match="weight of another shape"):
        check_forward(DENSE, x, weight[:, :3], torch.randn(2, 20, 7, 7), vectors=2, where="a")
    with pytest.raises(InputError, match="dtype"):
        check_forward(DENSE, x.half(), weight, torch.randn(2, 20, 7, 7), vectors=2, where="a")
    with pytest.raises(IntegrityError, match="too large to be checked"):
        check_forward(
            DENSE,
            x.double() * 1e200,
            weight.double(),
            torch.zeros(2, 20, 7, 7, dtype=torch.float64),
            vectors=2,
            where="a",
        )


def test_costs_are_a_small_part_of_the_product() -> None:
    conv = LinearOperation("conv", 256, 256, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0))
    shape = (2, 256, 28, 28)
    maps = math.prod(shape)
    assert check_forward_multiply_adds(conv, shape, 2) == 2 * 9 * maps + 2 * maps + 3 * 2 * maps + 5 * 256 * 256 * 9
    assert check_input_gradient_multiply_adds(conv, shape, 2) == check_forward_multiply_adds(conv, shape, 2)
    assert check_weight_gradient_multiply_adds(conv, shape, 2) == (
        2 * 9 * maps + 2 * maps + 3 * 2 * maps + 5 * 256 * 256 * 9
    )
    for cost in (check_forward_multiply_adds, check_input_gradient_multiply_adds, check_weight_gradient_multiply_adds):
        assert cost(conv, shape, 2) < 0.015 * conv.multiply_adds(shape)
    linear = LinearOperation("linear", 10, 20)
    assert check_forward_multiply_adds(linear, (3, 50, 10), 2) == 150 * (2 * 10 + 2 * 20 + 3 * 30) + 5 * 200
    depthwise = LinearOperation("conv", 8, 8, (3,), (1,), (1,), (1,), (0,), 8)
    assert check_forward_multiply_adds(depthwise, (1, 8, 10), 2) == 8 * 3 * 10 + 3 * 160 + 4 * 24

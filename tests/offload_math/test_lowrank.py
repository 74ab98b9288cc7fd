"""Operators on the principal part, against the slow obvious way: form X_main, run the operator, loop over samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from motte.errors import InputError
from motte.linear import compute
from motte.linear.operation import LinearOperation
from motte.offload import lowrank
from motte.offload.decompose import Principal, decompose, residual
from motte.offload.settings import Fixed

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def close(got: Tensor, want: Tensor, bound: float) -> None:
    assert got.shape == want.shape
    if want.numel():
        assert float((got.double() - want.double()).abs().max()) <= bound * max(float(want.abs().max()), 1e-6)


def naive(operation: LinearOperation, x: Tensor, gradient: Tensor, clip: float | None) -> Tensor:
    """Sum of per-sample weight gradients, each clipped, in float64."""
    total = torch.zeros(operation.weight_shape, dtype=torch.float64)
    for n in range(x.shape[0]):
        own = compute.weight_gradient(operation, x[n : n + 1].double(), gradient[n : n + 1].double())
        norm = float(own.norm())
        total += own * (1.0 if clip is None or norm <= clip else clip / norm)
    return total


@pytest.fixture(params=["chosen", "factored", "without columns", "formed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way of computing on every shape, and the one that the costs choose."""
    if request.param == "without columns":
        monkeypatch.setattr(lowrank, "_MOST_COLUMNS", -1)
        monkeypatch.setattr(lowrank, "_MOST_GRADIENT_COLUMNS", -1)
    if request.param != "chosen":
        worst = "_factored" if request.param == "formed" else "_formed"
        for name in ("_forward", "_gradient"):
            monkeypatch.setattr(lowrank, name + worst, lambda *_: math.inf)
    return str(request.param)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_forward_equals_the_operator_on_the_formed_part(cases: Any, way: str, dtype: torch.dtype) -> None:
    for number, case in enumerate(cases(56)):
        x, weight, _ = case.tensors(dtype)
        matrices = case.matrices(x)
        principal = decompose(matrices, Fixed((0, 1, 2, 99)[number % 4]))
        formed = (principal.left.double() @ principal.right.double()).view(case.shape)
        got = lowrank.forward(case.operation, principal, case.shape, weight)
        assert got.dtype == dtype
        close(got, compute.forward(case.operation, formed, weight.double()), TOLERANCE[dtype])
        if dtype != torch.bfloat16:
            rest = residual(matrices, principal).view(case.shape)
            both = got + compute.forward(case.operation, rest, weight)
            close(both, compute.forward(case.operation, x, weight), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("clip", [None, 0.5])
def test_weight_gradient_equals_the_sum_over_samples(
    cases: Any, way: str, dtype: torch.dtype, clip: float | None
) -> None:
    for number, case in enumerate(cases(42, 1)):
        x, _, gradient = case.tensors(dtype)
        if x.shape[0] > 1:
            gradient[0] *= 1e-3  # below the clip, the others above it
        principal = decompose(case.matrices(x), Fixed((0, 1, 3, 99)[number % 4]))
        formed = (principal.left.double() @ principal.right.double()).view(case.shape)
        got = lowrank.weight_gradient(case.operation, principal, case.shape, gradient, clip=clip)
        assert got.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
        want = naive(case.operation, formed, gradient, clip)
        # Samples may cancel in the sum: the scale is that of the terms.
        terms = naive(case.operation, formed.abs(), gradient.abs(), clip)
        close(got, want, TOLERANCE[dtype] * (float(terms.max() / want.abs().max()) if want.any() else 1.0))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_no_sample_exceeds_the_clip(cases: Any, way: str, dtype: torch.dtype) -> None:
    for case in cases(28, 2, batches=(1,)):
        x, _, gradient = case.tensors(dtype)
        principal = decompose(case.matrices(x), Fixed(3))
        # Factors that nearly cancel: the norm of the product is far below those of the factors.
        doubled = Principal(
            torch.cat([principal.left, -principal.left * 1.01], 2), torch.cat([principal.right, principal.right], 1)
        )
        for factors in (principal, doubled):
            got = lowrank.weight_gradient(case.operation, factors, case.shape, gradient, clip=0.1)
            assert float(got.double().norm()) <= 0.1 * (1 + 1e-6)


def test_clipping_at_any_magnitude(cases: Any) -> None:
    for case in cases(14, 3, batches=(2,)):
        x, _, gradient = case.tensors(torch.float32)
        for size in (1e-25, 1e-12, 1e12, 1e25):
            principal = decompose(case.matrices(x), Fixed(2))
            got = lowrank.weight_gradient(case.operation, principal, case.shape, gradient * size, clip=1.0)
            formed = (principal.left.double() @ principal.right.double()).view(case.shape)
            close(got / min(size, 1), naive(case.operation, formed, gradient * size, 1.0) / min(size, 1), 1e-5)


@pytest.mark.parametrize("way", ["chosen"], indirect=True)
def test_the_cheaper_way_is_taken(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    plain, columns = compute.forward, lowrank._columns

    def formed(operation: LinearOperation, x: Tensor, weight: Tensor) -> Tensor:
        taken.append("formed")
        return plain(operation, x, weight)

    def factored(narrow: LinearOperation, maps: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        taken.append("factored")
        return columns(narrow, maps)

    monkeypatch.setattr(compute, "forward", formed)
    monkeypatch.setattr(lowrank, "_columns", factored)
    dense = LinearOperation("conv", 8, 16, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0))
    depthwise = LinearOperation("conv", 8, 8, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0), 8)
    x = torch.randn(1, 8, 10, 10)
    for operation, expected in ((dense, "factored"), (depthwise, "formed")):
        taken.clear()
        principal = decompose(x.view(1, 8, 100), Fixed(2))
        lowrank.forward(operation, principal, x.shape, torch.randn(operation.weight_shape))
        assert taken == [expected]


def test_costs() -> None:
    dense = LinearOperation("conv", 64, 64, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0))
    shape = (2, 64, 32, 32)
    weights, narrow = 2 * 4 * 64 * 64 * 9, 2 * 1024 * 4 * 64 * 9
    assert lowrank.forward_multiply_adds(dense, shape, 4) == weights + narrow
    assert lowrank.weight_gradient_multiply_adds(dense, shape, 4) == weights + narrow
    norms = 2 * 16 * (64 + 64 * 9)
    assert lowrank.weight_gradient_multiply_adds(dense, shape, 4, clip=True) == weights + narrow + norms
    small = (2, 64, 4, 4)  # few positions: per-sample weights would cost more than the operator
    assert lowrank.forward_multiply_adds(dense, small, 32) == dense.multiply_adds(small) + 32 * math.prod(small)
    assert lowrank.forward_multiply_adds(dense, shape, 0) == 0
    linear = LinearOperation("linear", 10, 20)
    assert lowrank.forward_multiply_adds(linear, (3, 50, 10), 2) == 3 * 2 * 10 * 20 + 3 * 50 * 2 * 20
    stride = LinearOperation("conv", 8, 16, (3,), (2,), (1,), (1,), (0,))
    assert lowrank.forward_multiply_adds(stride, (1, 8, 10), 1) == 8 * 16 * 3 + 5 * 16 * 3


def test_autocast_does_not_reach_in(cases: Any) -> None:
    for case in cases(7, batches=(2,)):
        x, weight, gradient = case.tensors(torch.float32)
        principal = decompose(case.matrices(x), Fixed(2))
        plain = lowrank.forward(case.operation, principal, case.shape, weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = lowrank.forward(case.operation, principal, case.shape, weight)
            update = lowrank.weight_gradient(case.operation, principal, case.shape, gradient)
        assert torch.equal(cast, plain)
        assert update.dtype == torch.float32


def test_factors_of_another_activation_are_refused() -> None:
    operation = LinearOperation("conv", 4, 3, (1, 1), (1, 1), (0, 0), (1, 1), (0, 0))
    principal = decompose(torch.randn(2, 4, 25), Fixed(2))
    with pytest.raises(InputError, match="another activation"):
        lowrank.forward(operation, principal, (2, 4, 5, 6), torch.randn(operation.weight_shape))
    with pytest.raises(InputError, match="another activation"):
        lowrank.forward(operation, principal, (3, 4, 5, 5), torch.randn(operation.weight_shape))
    with pytest.raises(InputError, match="another shape"):
        lowrank.weight_gradient(operation, principal, (2, 4, 5, 5), torch.randn(2, 4, 5, 5))
    with pytest.raises(InputError, match="positive"):
        lowrank.weight_gradient(operation, principal, (2, 4, 5, 5), torch.randn(2, 3, 5, 5), clip=0.0)


def test_the_batch_goes_through_the_same_memory_in_pieces(monkeypatch: pytest.MonkeyPatch, cases: Any) -> None:
    for case in cases(28, 6, batches=(3,)):
        x, weight, gradient = case.tensors()
        principal = decompose(case.matrices(x), Fixed(2))
        whole = lowrank.forward(case.operation, principal, case.shape, weight)
        update = lowrank.weight_gradient(case.operation, principal, case.shape, gradient)
        with monkeypatch.context() as patch:
            patch.setattr(lowrank, "_COLUMNS", 1)
            torch.testing.assert_close(lowrank.forward(case.operation, principal, case.shape, weight), whole)
            got = lowrank.weight_gradient(case.operation, principal, case.shape, gradient)
            torch.testing.assert_close(got, update)
